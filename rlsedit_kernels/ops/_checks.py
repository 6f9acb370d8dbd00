"""Checks of arguments shared by the ops: TypeError and ValueError that name the argument.

Only shapes, types and devices are looked at, never values of tensors, so that nothing synchronises.
"""

from __future__ import annotations

import math

import torch

from rlsedit_kernels.ops.contract import aligned, may_overlap, share_elements

DTYPES = (torch.float32, torch.float64)
LARGEST = {dtype: torch.finfo(dtype).max for dtype in DTYPES}


def tensor(op: str, name: str, value: object, like: torch.Tensor | None = None) -> torch.Tensor:
    """`value` as a dense float32 or float64 tensor, of the dtype and device of `like` where given."""
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"{op}: {name} must be a torch.Tensor, got {type(value).__name__}")
    if value.layout != torch.strided:
        raise TypeError(f"{op}: {name} must be a dense (strided) tensor, got layout {value.layout}")
    if value.dtype not in DTYPES:
        raise TypeError(f"{op}: {name} must be float32 or float64, got {value.dtype}")
    if like is not None and value.dtype != like.dtype:
        raise TypeError(f"{op}: {name} must have the dtype of the first argument, {like.dtype}, got {value.dtype}")
    if like is not None and value.device != like.device:
        raise ValueError(f"{op}: {name} must be on the device of the first argument, {like.device}, got {value.device}")
    if not aligned(value):
        raise ValueError(
            f"{op}: {name} must lie at an address that is a multiple of its element size, {value.element_size()}, got "
            f"one with a remainder of {value.data_ptr() % value.element_size()}: clone() it"
        )
    return value


def square(op: str, name: str, value: object, size: str) -> torch.Tensor:
    """A tensor (..., n, n), n >= 1; `size` is the letter that the message uses for n."""
    matrix = tensor(op, name, value)
    if matrix.dim() < 2 or matrix.shape[-1] != matrix.shape[-2] or matrix.shape[-1] == 0:
        raise ValueError(
            f"{op}: {name} must have shape (..., {size}, {size}) with {size} >= 1, got {tuple(matrix.shape)}"
        )
    return matrix


def matrix(op: str, name: str, value: object, rows: str, columns: str) -> torch.Tensor:
    """A tensor (..., m, n), m and n >= 1; the letters are those that the message uses for them."""
    found = tensor(op, name, value)
    if found.dim() < 2 or 0 in found.shape[-2:]:
        raise ValueError(f"{op}: {name} must have shape (..., {rows}, {columns}), both >= 1, got {tuple(found.shape)}")
    return found


def fitting(
    op: str,
    name: str,
    value: object,
    first_name: str,
    first: torch.Tensor,
    *sizes: tuple[str, int | None],
    hint: str = "",
) -> torch.Tensor:
    """A matrix that goes with the first argument: of its dtype, device and leading dimensions; nothing is broadcast.

    Each of the two sizes comes with what a message says of it: ("d = C.shape[-1]", 4096), or ("u", None) for one that
    may be any number >= 1. The hint ends the message.
    """
    found = tensor(op, name, value, first)
    shape = tuple(found.shape)
    if len(shape) < 2 or any(n == 0 or size not in (None, n) for n, (_, size) in zip(shape[-2:], sizes, strict=True)):
        letters = ", ".join(text.split(" = ")[0] for text, _ in sizes)
        known = dict.fromkeys(f"{text} = {size}" for text, size in sizes if size is not None)
        free = [f"{text} >= 1" for text, size in sizes if size is None]
        raise ValueError(
            f"{op}: {name} must have shape (..., {letters}) with {', '.join([*known, *free])}, got {shape}{hint}"
        )
    if shape[:-2] != tuple(first.shape[:-2]):
        raise ValueError(
            f"{op}: {name} and {first_name} must have the same leading dimensions, "
            f"got {shape[:-2]} and {tuple(first.shape[:-2])}"
        )
    return found


def keys(op: str, K: object, C: torch.Tensor, name: str = "C") -> torch.Tensor:
    """Keys (..., u, d) that belong to a square matrix (..., d, d), called `name` in messages."""
    return fitting(op, "K", K, name, C, ("u", None), (f"d = {name}.shape[-1]", C.shape[-1]))


def writable(op: str, name: str, value: torch.Tensor, **read: torch.Tensor) -> None:
    """An argument that is written to must not map two elements to one place, nor need a gradient.

    Nor may it share elements with what is read while it is written (`read`, by name).
    """
    for other, tensor in read.items():
        if share_elements(value, tensor):
            raise ValueError(
                f"{op}: {other} must not lie in the memory of {name}, which is written in place; give {other}.clone()"
            )
    if may_overlap(value):
        raise ValueError(
            f"{op}: {name} is written in place and must not overlap itself (an expanded tensor, a sliding window?), "
            f"got strides {tuple(value.stride())} for shape {tuple(value.shape)}"
        )
    if not torch.compiler.is_compiling() and value.is_neg():  # torch gives kernels a copy and cannot write back
        raise ValueError(f"{op}: {name} is written in place and must not be a negated view; give resolve_neg() of it")
    if value.requires_grad and torch.is_grad_enabled():
        raise ValueError(f"{op}: {name} is written in place and must not require a gradient; call it under no_grad")


# Numbers are only compared: `math.isfinite` of one that torch.compile has made symbolic breaks the graph.
def noise(op: str, value: float, dtype: torch.dtype = torch.float64) -> float:
    """Noise of a batch: a number >= 0 that is finite in the dtype of its tensors."""
    number = _number(op, "noise", value)
    if not 0.0 <= number <= LARGEST[dtype]:
        raise ValueError(f"{op}: noise must be finite and >= 0{_limit(number, dtype)}, got {value!r}")
    return number


def forget(op: str, value: float, dtype: torch.dtype = torch.float64) -> float:
    """Forgetting factor in (0, 1] whose reciprocal is finite in the dtype of its tensors."""
    number = _number(op, "forget", value)
    if not 0.0 < number <= 1.0:
        raise ValueError(f"{op}: forget must be in (0, 1], got {value!r}")
    if number < 1.0 / LARGEST[dtype]:
        name = str(dtype).removeprefix("torch.")
        raise ValueError(f"{op}: forget must be at least {1.0 / LARGEST[dtype]:.4g} in {name}, got {value!r}")
    return number


def finite_number(op: str, name: str, value: float, dtype: torch.dtype = torch.float64) -> float:
    """A number that is finite in the dtype of its tensors."""
    number = _number(op, name, value)
    if not -LARGEST[dtype] <= number <= LARGEST[dtype]:
        raise ValueError(f"{op}: {name} must be finite{_limit(number, dtype)}, got {value!r}")
    return number


def _limit(number: float, dtype: torch.dtype) -> str:
    """What a message adds where a number is finite, but not in `dtype`."""
    overflows = LARGEST[dtype] < abs(number) < math.inf
    return f" (at most {LARGEST[dtype]:.4g} in {str(dtype).removeprefix('torch.')})" if overflows else ""


def _number(op: str, name: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{op}: {name} must be a Python number, got {type(value).__name__}")
    try:
        return float(value)
    except OverflowError:  # of an int
        raise ValueError(f"{op}: {name} must be finite, got an int that is no float") from None
