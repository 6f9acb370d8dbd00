"""What every kernel refuses, called past the public wrappers: one table of shapes, and the range of each number.

Fakes ask it, and kernels in Python (`enforced`), which would broadcast a wrong shape or take a negative noise; the
native ones check the same by themselves. Like torch's own checks it raises RuntimeError.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from functools import cache, wraps
from typing import Any

import numpy as np
import torch

from rlsedit_kernels.ops.schemas import SCHEMAS, SHAPES, written

_FLOATING = (torch.float32, torch.float64)
_LEADING = "must be a matrix whose leading dimensions are those of the first argument: leading dimensions differ"


@cache
def _arguments(op: str) -> tuple[list[tuple[str, str]], list[str]]:
    """Name and shape of each tensor argument of the schema, and the names of its numbers."""
    given = SCHEMAS[op].split("->")[0]
    tensors = re.findall(r"Tensor(?:\(\w!\))? (\w+)", given)
    return list(zip(tensors, SHAPES[op].split(), strict=True)), re.findall(r"float (\w+)", given)


def require(op: str, *arguments: Any) -> None:
    """RuntimeError where arguments of `op` do not fit together: dtype, device, shape, noise or forget.

    No values of tensors are looked at. A factor that overflows is no error here: `info` tells of it.
    """
    tensors, numbers = _arguments(op)
    first = arguments[0]
    known: dict[str, tuple[Any, str]] = {}
    for (name, letters), t in zip(tensors, arguments, strict=False):
        _need(op, t.dtype in _FLOATING, name, t, "must be float32 or float64")
        _need(op, t.dtype == first.dtype, name, t, "must not differ: all tensors must have one dtype")
        _need(op, t.device == first.device, name, t, "must not differ: all tensors must be on one device")
        _need(op, t.dim() >= 2 and t.dim() == first.dim(), name, t, _LEADING)
        for mine, its in zip(first.shape[:-2], t.shape[:-2], strict=True):
            _need(op, mine == its, name, t, _LEADING)
        for axis, letter in zip((-2, -1), letters, strict=True):
            size = t.shape[axis]
            _need(op, size >= 1, name, t, f"must have shape[{axis}] >= 1")
            wanted, source = known.setdefault(letter, (size, f"{name}.shape[{axis}]"))
            _need(op, size == wanted, name, t, f"must have shape[{axis}] equal to {source}")
    for name, value in zip(numbers, arguments[len(tensors) :], strict=False):
        if name == "noise":
            _within(op, value >= 0.0, "noise must be at least 0", value)
        elif name == "forget":
            _within(op, value > 0.0, "forget must be in (0, 1]", value)
            _within(op, value <= 1.0, "forget must be in (0, 1]", value)


def _need(op: str, good: Any, name: str, t: torch.Tensor, what: str) -> None:
    torch._check(good, lambda: f"{op}: {name} {what}, got {t.dtype} {tuple(t.shape)} on {t.device}")


def _within(op: str, good: Any, what: str, value: float) -> None:
    torch._check(good, lambda: f"{op}: {what}, got {value}")


def enforced(op: str, kernel: Callable[..., Any]) -> Callable[..., Any]:
    """`kernel` behind `require`, and behind what native kernels ask of a tensor that is written to."""

    @wraps(kernel)
    def checked(*arguments: Any, **options: Any) -> Any:
        require(op, *arguments)
        named = [(name, t) for (name, _), t in zip(_arguments(op)[0], arguments, strict=False)]
        for name, t in named:
            _need(op, aligned(t), name, t, "must lie at an address that is a multiple of its element size: clone() it")
        for name, t in named[: written(op)]:
            _need(
                op,
                not may_overlap(t),
                name,
                t,
                f"is written in place and must not overlap itself, strides {t.stride()}",
            )
        return kernel(*arguments, **options)

    return checked


def aligned(value: torch.Tensor) -> bool:
    """Whether a tensor lies at a multiple of its element size; memory from elsewhere (torch.frombuffer) need not.

    Kernels may take it for granted. True where there is no address: fakes, transforms, compilation.
    """
    if torch.compiler.is_compiling() or type(value) not in (torch.Tensor, torch.nn.Parameter):
        return True
    try:
        return value.data_ptr() % value.element_size() == 0
    except RuntimeError:
        return True


def may_overlap(value: torch.Tensor) -> bool:
    """Whether a step along some dimension may land on an element that the smaller steps reach as well.

    No for every view by slices, transpositions and diagonals; yes for whatever repeats an element.
    """
    if value.is_contiguous() or value.numel() == 0:
        return False
    steps = [(stride, size) for stride, size in zip(value.stride(), value.shape, strict=True) if size > 1]
    for i, (stride, _) in enumerate(steps):  # without sorting, which torch.compile cannot do with sizes that vary
        reached = [other * (size - 1) for j, (other, size) in enumerate(steps) if j != i and other <= stride]
        if stride <= sum(reached):
            return True
    return False


class _Places:
    """Where the elements of a tensor lie, as NumPy is told of memory. Nothing is read from there."""

    def __init__(self, value: torch.Tensor) -> None:
        size = value.element_size()
        self.__array_interface__ = {
            "version": 3,
            "typestr": f"|V{size}",
            "shape": tuple(value.shape),
            "strides": tuple(size * stride for stride in value.stride()),
            "data": (value.data_ptr(), False),
        }


def share_elements(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether an element of `a` lies where one of `b` lies; columns side by side in one buffer do not.

    False where there is no address: fakes, transforms, compilation.
    """
    plain = (torch.Tensor, torch.nn.Parameter)
    if torch.compiler.is_compiling() or type(a) not in plain or type(b) not in plain:
        return False
    try:
        if a.untyped_storage().data_ptr() != b.untyped_storage().data_ptr() or math.prod((*a.shape, *b.shape)) == 0:
            return False
        places = np.asarray(_Places(a)), np.asarray(_Places(b))
        return bool(np.may_share_memory(*places, max_work=100_000))  # type: ignore[arg-type]  # any number, not 0 or -1
    except RuntimeError:
        return False
