"""What rounding a weight with every batch adds up to, in the S-norm, estimated without history."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

from rlsedit_kernels.priors import Prior
from rlsedit_kernels.states.keys import Keys
from rlsedit_kernels.states.reading import squared_norm

RELATIVE = 0.42
"""Root mean square rounding error of a number, in units of the unit roundoff times the number: an error uniform within
half a unit in the last place, averaged over the numbers of a binade."""

EVERY = 32
"""Batches between two measurements of |W|."""


class Rounding:
    """Follows S_t e_t = forget S_(t-1) e_(t-1) + S_t delta_t, delta_t the rounding error of W with batch t.

    With tau = tr(S) / d in the place of S, and errors of independent sign, |e_t|^2 in the S-norm is a_t / tau_t with
    a_t = forget^2 a_(t-1) + tau_t^2 |delta_t|^2. Costs O(1) a batch, and |W| at batches 1, 2, 4, ... and every `EVERY`.

    Args:
        prior: gives tr(S_0).
        dtype: of the weight.
        size: the squared Frobenius norm of keys and weights as their owner has them; None for `Keys` and tensors.
        trace: tr(S_0), where it is known.
    """

    def __init__(
        self,
        prior: Prior,
        dtype: torch.dtype,
        size: Callable[[Any], float] | None = None,
        trace: float | None = None,
    ) -> None:
        self._unit = 0.5 * torch.finfo(dtype).eps * RELATIVE
        self._d = prior.d
        self._size_of = _size if size is None else size
        self._trace = (0.0 if prior.is_nothing else _trace(prior)) if trace is None else trace
        self._sum = 0.0
        self._steps = 0
        self._size = 0.0

    def write(self, K: Any, noise: float, forget: float, W: Any) -> None:
        """A batch; W (d, v) as it is afterwards, None where no weight was changed."""
        self._trace = forget * self._trace + (self._size_of(K) / noise if noise > 0.0 else 0.0)
        self._steps += 1
        if W is None:
            return
        if self._steps % EVERY == 0 or (self._steps < EVERY and self._steps & (self._steps - 1) == 0):
            self._size = self._size_of(W)
        tau = self._trace / self._d
        self._sum = forget**2 * self._sum + tau**2 * self._unit**2 * self._size

    def remove(self, K: Any, noise: float) -> None:
        """A batch taken back."""
        self._trace = max(self._trace - self._size_of(K) / noise, 0.0)

    def error(self, W: torch.Tensor, summed: bool) -> float:
        """|e| in the S-norm: of the sum of all roundings, or of one where the weight is always made anew."""
        tau = self._trace / self._d
        once = tau * self._unit**2 * self._size_of(W)
        return math.sqrt(max(self._sum / tau, once) if summed and tau > 0.0 else once)


def _size(value: Keys | torch.Tensor) -> float:
    return value.squared if isinstance(value, Keys) else squared_norm(value)


def _trace(prior: Prior) -> float:
    factor = prior.factor
    return factor.rank / factor.scale**2 if factor.scale is not None else squared_norm(factor.root_inverse)  # type: ignore[arg-type]
