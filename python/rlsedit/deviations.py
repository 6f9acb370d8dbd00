"""How far one layer has moved, term by term of the objective, without any history."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from rlsedit_kernels.states import wide

from .config import EditConfig
from .methods import Method, Proposal


@dataclass(frozen=True)
class Deviations:
    """Running figures of one layer; never changed, `after` gives those behind a batch.

    With D = W - W_0, A = mom2_weight E[k k'] (K_0'K_0 of the anchor) and the pseudo-targets V = K W + E of each batch:
        cost       J += <E, E - K dW> / noise                       (cost recursion, docs/mathematics.md, fact 6)
        parameter  |D|^2
        anchor     tr(D' A D) = |K_0 D|^2, increased by 2 <D, A dW> + <dW, A dW>
        innovation sum of |V - K W_0|^2 / noise, from which the bounds of fact 7 follow

    Attributes:
        shift: D in row form (d, v).
        gram: A (d, d).
    """

    shift: Tensor
    gram: Tensor
    cost: float = 0.0
    parameter: float = 0.0
    anchor: float = 0.0
    innovation: float = 0.0
    last_fit: float = 0.0

    def after(self, keys: Tensor, residual: Tensor, proposal: Proposal, noise: float) -> Deviations:
        """Figures after a batch with keys (u, d), residual E (u, v) and the proposed change."""
        posterior = self._posterior(keys, residual, proposal)
        scale = noise if noise > 0 else 1.0
        return replace(
            self.moved(proposal.update, *(() if proposal.gain is None else [(proposal.gain, residual)])),
            cost=self.cost + dot(residual, posterior) / scale,
            innovation=self.innovation + square(self.target(keys, residual)) / scale,
            last_fit=square(posterior) / scale,
        )

    def target(self, keys: Tensor, residual: Tensor) -> Tensor:
        """Pseudo-targets of a batch less K W_0, K (W - W_0) + E (u, v), before it is written."""
        return residual + self._whole(self._own(keys) @ self.shift)

    def error(self, keys: Tensor, target: Tensor) -> Tensor:
        """V - K W (u, v) float64 of keys (u, d) and targets less K W_0 (u, v)."""
        wanted = self._own(keys).double().mT.contiguous()
        return target.double() - self._whole(wide.transposed_product(self.shift, wanted).mT)

    def product(self, gain: Tensor, error: Tensor) -> Tensor:
        """gain (d, u) @ error (u, v), a change of the weight."""
        return gain @ error

    def moved(self, change: Tensor, *products: tuple[Tensor, Tensor]) -> Deviations:
        """Figures after a change (d, v) of the weight alone, without keys and residuals.

        Args:
            change: of W.
            products: pairs of gain (d, u) and error (u, v) whose products add up to it, where that is known.
        """
        image = self._image(change, products)
        shift = self.shift + change
        parameter, crossed, own = self._sums(dot(shift, shift), dot(self.shift, image), dot(change, image))
        return replace(self, shift=shift, parameter=parameter, anchor=self.anchor + 2 * crossed + own)

    def at(self, shift: Tensor) -> Deviations:
        """Figures of a weight with this D (d, v), however it came there; cost and innovation are left to the caller."""
        return replace(self, shift=shift, parameter=dot(shift, shift), anchor=dot(shift, self.gram @ shift))

    def fit(self, method: Method, config: EditConfig) -> float:
        """sum_s |K_s W - V_s|^2 / noise over all batches; of the last batch alone where no objective spans them.

        NaN for a method without keys and residuals (FT).
        """
        if method.prior is None:
            return math.nan
        if method.objective is None:
            return self.last_fit
        lam, mu = method.objective(config)
        return max(0.0, self.cost - lam**2 * self.parameter - mu**2 * self.anchor)

    def bounds(self, method: Method, config: EditConfig) -> tuple[float | None, float | None]:
        """Bounds of |D|_F and |K_0 D|_F (fact 7); None where the objective lacks the term or there is none."""
        if method.objective is None:
            return None, None
        lam, mu = method.objective(config)
        size = self.innovation**0.5
        return (size / (2 * lam) if lam > 0 else None), (size / (2 * mu) if mu > 0 else None)

    def _posterior(self, keys: Tensor, residual: Tensor, proposal: Proposal) -> Tensor:
        """E - K dW (u, v)."""
        return residual - keys @ proposal.update

    def _image(self, change: Tensor, products: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
        """A dW (d, v): (A gain) E costs d d u instead of d d v."""
        if not products or sum(len(error) for _, error in products) > change.shape[1]:
            return self.gram @ change
        first, *others = ((self.gram @ gain) @ error for gain, error in products)
        return sum(others, first)

    def _own(self, keys: Tensor) -> Tensor:
        """The columns of K that meet the rows of D which are here."""
        return keys

    def _whole(self, product: Tensor) -> Tensor:
        """K D (u, v) of what `_own` keys give with the D that is here."""
        return product

    def _sums(self, *values: float) -> list[float]:
        """Sums over all of W of what was found in the part that is here."""
        return list(values)


def dot(a: Tensor, b: Tensor) -> float:
    """The sum of products of all entries, in float64."""
    return float(torch.sum(a * b, dtype=torch.float64))


def square(a: Tensor) -> float:
    """|a|^2."""
    return dot(a, a)
