"""What every launch needs: its device, views with one leading dimension, scalars of full precision, precision."""

from __future__ import annotations

import functools
import struct
from collections.abc import Callable, Iterator
from typing import ParamSpec, TypeVar

import torch
import triton
import triton.language as tl

PRECISIONS = ("ieee", "tf32x3", "tf32")

INTERPRETED = bool(triton.knobs.runtime.interpret) if hasattr(triton, "knobs") else False
"""Whether kernels run under Triton's interpreter (TRITON_INTERPRET=1 when this package was first imported)."""

LAUNCH = {"enable_fp_fusion": True}
"""Options of every launch: a product is fused with the sum that takes it, whatever Triton's default is."""


MOST_BATCH = 65535
"""What CUDA allows for the second and third index of a grid, of which the batch is one."""

_P = ParamSpec("_P")
_R = TypeVar("_R")


def on_its_device(op: Callable[_P, _R]) -> Callable[_P, _R]:
    """`op` with the device of its first argument made current: Triton launches on the current one."""

    @functools.wraps(op)
    def call(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        first = args[0]
        if isinstance(first, torch.Tensor) and first.is_cuda and first.get_device() != torch.cuda.current_device():
            with torch.cuda.device(first.get_device()):
                return op(*args, **kwargs)
        return op(*args, **kwargs)

    return call


def views(*tensors: torch.Tensor) -> Iterator[tuple[torch.Tensor, ...]]:
    """The tensors (..., m, n) as (b, m, n), never copied; several times where strides or `MOST_BATCH` ask for it."""
    batch = tensors[0].dim() - 2
    if batch == 0:
        yield tuple(t.unsqueeze(0) for t in tensors)
    elif batch == 1 and tensors[0].shape[0] <= MOST_BATCH:
        yield tensors
    elif batch == 1:
        for start in range(0, tensors[0].shape[0], MOST_BATCH):
            yield tuple(t[start : start + MOST_BATCH] for t in tensors)
    else:
        try:
            flat = tuple(t.view(-1, *t.shape[-2:]) for t in tensors)
        except RuntimeError:
            for i in range(tensors[0].shape[0]):
                yield from views(*(t[i] for t in tensors))
        else:
            yield from views(*flat)


def by_rows(C: torch.Tensor) -> torch.Tensor:
    """A symmetric matrix with adjacent columns where it can be had by exchanging its indices."""
    return C.mT if C.stride(-1) != 1 and C.stride(-2) == 1 else C


def precision(A: torch.Tensor, asked: str | None) -> str:
    """The precision of products for tensors like A; the default where none was asked for."""
    if asked is not None and asked not in PRECISIONS:
        raise ValueError(f"input_precision must be one of {', '.join(map(repr, PRECISIONS))}, got {asked!r}")
    if A.dtype == torch.float64:
        return "ieee"
    if asked is not None:
        return asked
    return "tf32x3" if A.device.type == "cuda" and torch.version.hip is None else "ieee"


def bits(value: float) -> int:
    """A float64 as an integer: Triton passes floats as float32. `scalar` reads it in a kernel."""
    return int(struct.unpack("<q", struct.pack("<d", value))[0])


def common(A: torch.Tensor, *sizes: int) -> int:
    """The elements of 16 bytes where every size and stride in `sizes` is a multiple of them, else 1.

    Triton knows of multiples of 16 only; a batch of 100 keys is none, and would go to shared memory element by element,
    32 of them through one bank. Kernels take this as COMMON and make their sizes `multiple`s of it.
    """
    wide = 16 // A.element_size()
    return wide if all(size % wide == 0 for size in sizes) else 1


def stages(wanted: int, common: int) -> int:
    """Of a pipeline: what is copied element by element goes through registers, which know a better way."""
    return wanted if common > 1 else 1


@triton.jit
def multiple(n, COMMON: tl.constexpr):
    """n, which is a multiple of COMMON, so that the compiler knows it."""
    return n // COMMON * COMMON


@triton.jit
def scalar(value, dtype: tl.constexpr):
    """A number of `dtype` from its `bits`."""
    return value.to(tl.int64).to(tl.float64, bitcast=True).to(dtype)


def ceil_div(n: int, block: int) -> int:
    """Blocks that n takes."""
    return -(-n // block)


def power_of_two(n: int) -> int:
    """The smallest power of two that is at least n and 16, the smallest side of `tl.dot`."""
    return max(16, 1 << (n - 1).bit_length())
