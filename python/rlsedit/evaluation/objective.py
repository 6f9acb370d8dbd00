"""The terms of the objective over a stream, for every method, at a cost that does not grow with the stream.

With D = W - W_0 of a layer, T_s = V_s - K_s W_0 of its batches, H = sum K'K / noise, X = sum K'T / noise:

    fit of all edits    sum_s |K_s W - V_s|^2 / noise = sum |T|^2 / noise - 2 <D, X> + <D, H D>
    parameter           |W - W_0|^2
    anchor              |K_0 (W - W_0)|^2 = <D, A D>, A = mom2_weight E[k k']

H and X take d^2 + d v numbers a layer in float64. Whatever a method does after its solve is in W.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..methods import Method, Proposal, Solver, Start
from ..models.adapter import Adapter

__all__ = ["Objective", "Terms", "listening"]


@dataclass(frozen=True)
class Terms:
    """Sums over the edited layers; `fit` is NaN for a method without keys and residuals (FT)."""

    fit: float
    parameter: float
    anchor: float


@dataclass(frozen=True)
class _Heard:
    """A solver that leaves what it is given in a list."""

    inner: Solver
    given: list[tuple[Tensor, Tensor]]

    def propose(self, keys: Tensor, residual: Tensor, bare: Tensor | None = None) -> tuple[Proposal, _Heard]:
        self.given.append((keys, residual))
        proposal, following = self.inner.propose(keys, residual, bare)
        return proposal, replace(self, inner=following)

    def health(self) -> dict[str, object]:
        return self.inner.health()


def listening(method: Method, given: list[list[tuple[Tensor, Tensor]]]) -> Method:
    """`method` whose solvers leave keys (u, d) and residuals (u, v) in lists, one for each layer as they are made."""

    def make(start: Start) -> Solver:
        given.append([])
        return _Heard(method.start(start.moment, start.config, start.dtype, start.device), given[-1])

    return replace(method, solver=make)


class Objective:
    """Accumulates the terms of a stream.

    Args:
        adapter: the model, with the weights before the first batch.
        layers: edited layers, ascending.
        grams: A (d, d) of each layer.
        given: what `listening` fills.
        noise: of a batch from its number of keys.
    """

    def __init__(
        self,
        adapter: Adapter,
        layers: Sequence[int],
        grams: Mapping[int, Tensor],
        given: Sequence[list[tuple[Tensor, Tensor]]],
        noise,  # type: ignore[no-untyped-def]
    ) -> None:
        self._adapter, self._layers, self._given, self._noise = adapter, tuple(layers), given, noise
        self._grams = {n: grams[n].double() for n in layers}
        self._first = {n: adapter.rows(n).detach().to(torch.float64, copy=True) for n in layers}
        self._before = {n: weight.clone() for n, weight in self._first.items()}
        self._H: dict[int, Tensor] = {}
        self._X: dict[int, Tensor] = {}
        self._targets = 0.0

    @torch.no_grad()
    def absorb(self) -> None:
        """Take in what the last batch was given; to be called behind every batch."""
        for n, given in zip(self._layers, self._given, strict=False):
            for keys, residual in given:
                K, E = keys.double(), residual.double()
                T = E + K @ (self._before[n] - self._first[n])
                noise = self._noise(len(K)) or 1.0
                H, X = K.mT @ K / noise, K.mT @ T / noise
                self._H[n] = H if n not in self._H else self._H[n].add_(H)
                self._X[n] = X if n not in self._X else self._X[n].add_(X)
                self._targets += float(T.square().sum()) / noise
            given.clear()
            self._before[n] = self._adapter.rows(n).detach().to(torch.float64, copy=True)

    @torch.no_grad()
    def terms(self) -> Terms:
        """Of the weights as they are; d^2 v flops a layer."""
        fit, parameter, anchor = self._targets, 0.0, 0.0
        for n in self._layers:
            D = self._adapter.rows(n).detach().double() - self._first[n]
            parameter += float(D.square().sum())
            anchor += float((D * (self._grams[n] @ D)).sum())
            if n in self._H:
                fit += float((D * (self._H[n] @ D)).sum()) - 2.0 * float((D * self._X[n]).sum())
        return Terms(max(0.0, fit) if self._H else float("nan"), parameter, anchor)
