"""What the matrices that are handed over have to be, asked at O(d^2) and read from their device at once.

The questions are launched while an expression is put together, and answered behind the first wait that a state makes
anyway (`Doubts.settle`), so that a GPU is not waited for once more for each of them.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Tensor

from rlsedit_kernels.backends.precision import ieee_products
from rlsedit_kernels.states.reading import blocks, scalars

ROUNDING = 1e-5
"""Largest relative difference of K K' to that of the keys which rounding in float32 explains."""

SECOND_FORWARD = 1e-2
"""The same for keys that were computed a second time, by another forward pass."""

SAME_PROJECTOR = 3e-4
"""Largest difference of two copies of one projector in float32, relative to the vector it is applied to."""

_LOWERED = {"tf32": 2.0**-10, "bf16": 2.0**-7}

_Judge = Callable[..., None]


class Doubts:
    """Questions about matrices of one device."""

    def __init__(self) -> None:
        self._asked: list[tuple[list[Tensor], _Judge]] = []

    @torch.no_grad()
    def multiple_of_identity(self, where: str, name: str, A: Tensor, factor: float) -> None:
        """Whether A (d, d), any floating dtype, is factor > 0 times the identity: all of its elements."""
        slack = max(1e-6, torch.finfo(A.dtype).eps) * factor

        def judge(low: float, high: float, others: float) -> None:
            if not (abs(low - factor) <= slack and abs(high - factor) <= slack):
                got = f"{low:g}" if low == high else f"a diagonal from {low:g} to {high:g}"
                raise ValueError(f"dropin.{where}: {name} must be {factor:g} as it was given, got {got}")
            if others != len(A):
                raise ValueError(
                    f"dropin.{where}: beside {name} there are {others - len(A):.0f} elements off the diagonal that are "
                    "not zero: only a multiple of the identity can be answered for"
                )

        low, high = torch.aminmax(A.diagonal())
        self._asked.append(([low, high, torch.count_nonzero(A)], judge))

    @torch.no_grad()
    def gram(self, gram: Tensor, keys: Tensor, *, again: bool = False) -> None:
        """Whether a matrix (d, d) is K K' of keys (d, u): by its trace, and by its products with two fixed vectors.

        Args:
            gram, keys: of one device, any floating dtypes.
            again: the keys of `gram` come from another forward pass than `keys`.
        """
        tolerance = max(ROUNDING, 2.0 * _eps(gram, keys))
        wide = torch.float64 if torch.float64 in (gram.dtype, keys.dtype) else torch.float32
        with ieee_products():
            K = keys.to(wide)
            Z = _vectors(len(K), gram.device).to(wide)
            numbers = [
                gram.diagonal().double().sum(),
                torch.linalg.vector_norm(K, dtype=torch.float64).square(),
                torch.linalg.vector_norm(_products(Z, gram, (Z @ K) @ K.mT), dtype=torch.float64) / len(Z) ** 0.5,
            ]

        @torch.no_grad()
        def judge(trace: float, square: float, apart: float) -> None:
            if not abs(trace - square) <= max(tolerance, 0.1 * SECOND_FORWARD if again else 0.0) * square:
                raise ValueError(
                    f"dropin: K K' must be that of the keys of this batch, got trace {trace:.6g} beside |K|^2 = "
                    f"{square:.6g}; is there another term in the system?"
                )
            allowed = max(tolerance, SECOND_FORWARD if again else 0.0)
            if apart <= allowed * square / min(K.shape) ** 0.5:  # at most |K K'|, which costs a product
                return
            with ieee_products():  # |K K'| = |K' K|, which is the smaller one
                norm = float(torch.linalg.vector_norm(K.mT @ K if K.shape[1] < K.shape[0] else gram.to(wide)))
            if not apart <= allowed * norm:
                raise ValueError(
                    f"dropin: K K' must be that of the keys of this batch; it is of their size, but differs by about "
                    f"{apart / max(norm, 1e-300):.1e} of it. Are the keys on the right-hand side others?"
                )

        self._asked.append((numbers, judge))

    @torch.no_grad()
    def projector(self, P: Tensor, basis: Tensor, message: str) -> None:
        """Whether P (d, d) is Q Q' of a basis (d, r) float64 on any device, by its products with two fixed vectors."""
        tolerance = max(SAME_PROJECTOR, 2.0 * torch.finfo(P.dtype).eps)
        with ieee_products():
            Z = _vectors(len(P), P.device)
            wanted = (Z.to(basis) @ basis) @ basis.mT
            apart = torch.linalg.vector_norm(_products(Z, P, wanted.to(Z))) / torch.linalg.vector_norm(Z)

        def judge(found: float) -> None:
            if not found <= tolerance:
                raise ValueError(f"{message} (they differ by {found:.1e} of a random vector)")

        self._asked.append(([apart], judge))

    @torch.no_grad()
    def equal(self, where: str, name: str, found: Tensor, wanted: Tensor) -> None:
        """Whether two tensors of one shape have the same elements; the same memory is not read."""
        if _same_view(found, wanted):
            return

        def judge(others: float) -> None:
            if others:
                raise ValueError(f"dropin.{where}: {name} has {others:.0f} elements that are not those of this batch")

        self._asked.append(([(found != wanted).sum()], judge))

    def settle(self) -> None:
        """Read all answers.

        Raises:
            ValueError: one of them is no.
        """
        if self._asked:
            found = iter(scalars([number for numbers, _ in self._asked for number in numbers]))
            for numbers, judge in self._asked:
                judge(*(next(found) for _ in numbers))
            self._asked = []  # not before: what was refused is refused again


def wide_gram(gram: Tensor, keys: Tensor) -> Tensor:
    """K K' (d, d) float64 as it was handed over; worked out again where it was rounded to less than float32.

    Such a rounding, which `Doubts.gram` lets pass, may be larger than L2 or the second moment: a solve with it says
    nothing about the solve that is meant.
    """
    if 2.0 * _eps(gram, keys) <= ROUNDING:
        return gram.double()
    wide = keys.double()
    return wide @ wide.T


def _products(Z: Tensor, A: Tensor, less: Tensor) -> Tensor:
    """Z A - less for a few vectors Z (n, d): A (d, d) of any floating dtype is read once, by parts that fit a cache."""
    found, first = less.neg(), 0
    for part in blocks(A) if A.device.type == "cpu" else (A,):
        found.addmm_(Z[:, first : first + len(part)], part.to(Z.dtype))
        first += len(part)
    return found


def _same_view(one: Tensor, other: Tensor) -> bool:
    alike = one.shape == other.shape and one.stride() == other.stride() and one.dtype == other.dtype
    return alike and one.device == other.device and one.data_ptr() == other.data_ptr()


def _eps(*tensors: Tensor) -> float:
    """Machine epsilon of the narrowest format that may have been in a product of float32 tensors by now."""
    kind = tensors[0].device.type
    found = [torch.finfo(tensor.dtype).eps for tensor in tensors]
    if torch.is_autocast_enabled(kind):
        found.append(torch.finfo(torch.get_autocast_dtype(kind)).eps)
    switch = torch.backends.cuda.matmul if kind == "cuda" else torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    found.append(_LOWERED.get(switch.fp32_precision, 0.0))
    return max(found)


@lru_cache(maxsize=32)
def _vectors(d: int, device: torch.device) -> Tensor:
    """Two vectors (2, d) float32 that no key knows, always the same ones."""
    with torch.inference_mode(False):
        generator = torch.Generator("cpu").manual_seed(d)
        return torch.randn(2, d, generator=generator, device="cpu").to(device)
