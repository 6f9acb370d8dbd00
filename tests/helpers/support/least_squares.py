"""The least-squares problem that every filter solves, worked out from nothing by dense float64 algebra."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace

import torch


@dataclass(frozen=True)
class Term:
    """A batch in the objective: |K W - V|^2 scale / noise."""

    K: torch.Tensor
    V: torch.Tensor
    noise: float
    scale: float = 1.0

    @property
    def weight(self) -> float:
        return self.scale / self.noise


class Problem:
    """prior_scale |W - W_0|_S^2 + sum of terms, least where held W = values: nothing recursive."""

    def __init__(self, S: torch.Tensor, W_0: torch.Tensor) -> None:
        self.S, self.W_0, self.prior_scale = S, W_0, 1.0
        self.terms: list[Term] = []
        self.held = W_0.new_zeros(0, W_0.shape[0])
        self.values = W_0.new_zeros(0, W_0.shape[1])
        self.restricted: list[torch.Tensor] = []

    def copied(self) -> Problem:
        twin = copy.copy(self)
        twin.terms, twin.restricted = list(self.terms), list(self.restricted)
        return twin

    def hold(self, A: torch.Tensor, values: torch.Tensor) -> None:
        self.held, self.values = torch.cat([self.held, A]), torch.cat([self.values, values])

    def restrict(self, A: torch.Tensor) -> None:
        """Nothing changes any more in these directions."""
        self.hold(A, A @ self.weight())
        self.restricted.append(A)

    def forget(self, by: float) -> None:
        self.prior_scale *= by
        self.terms = [replace(term, scale=term.scale * by) for term in self.terms]

    def lift(self) -> None:
        """What `refactor` does: forgetting starts anew, hard writes are lifted, restrictions hold what is there."""
        W = self.weight()
        self.prior_scale = 1.0
        self.terms = [replace(term, scale=1.0) for term in self.terms]
        self.held, self.values = self.held[:0], self.values[:0]
        for A in self.restricted:
            self.hold(A, A @ W)

    def misfit(self, term: Term) -> float:
        return float(torch.linalg.norm(term.V - term.K @ self.weight()))

    def precision(self) -> torch.Tensor:
        S = self.prior_scale * self.S
        for term in self.terms:
            S = S + term.weight * term.K.mT @ term.K
        return S

    def _free(self) -> torch.Tensor:
        """An orthonormal basis (d, f) of what is not held."""
        if not len(self.held):
            return torch.eye(len(self.S), dtype=self.S.dtype, device=self.S.device)
        _, sizes, basis = torch.linalg.svd(self.held)
        return basis[int((sizes > 1e-9).sum()) :].mT

    def covariance(self) -> torch.Tensor:
        N = self._free()
        return N @ torch.linalg.inv(N.mT @ self.precision() @ N) @ N.mT

    def weight(self) -> torch.Tensor:
        right = self.prior_scale * self.S @ self.W_0
        for term in self.terms:
            right = right + term.weight * term.K.mT @ term.V
        start = torch.linalg.pinv(self.held, rtol=1e-9) @ self.values if len(self.held) else torch.zeros_like(self.W_0)
        return start + self.covariance() @ (right - self.precision() @ start)

    def objective(self) -> float:
        W = self.weight()
        shift = W - self.W_0
        total = self.prior_scale * float((shift * (self.S @ shift)).sum())
        return total + sum(term.weight * float((term.K @ W - term.V).square().sum()) for term in self.terms)
