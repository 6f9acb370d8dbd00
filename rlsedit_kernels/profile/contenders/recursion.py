"""This package's ways to write a batch, as steps of a profile."""

from __future__ import annotations

import torch

from rlsedit_kernels import ops
from rlsedit_kernels.filter import RLSFilter
from rlsedit_kernels.profile.problem import Problem
from rlsedit_kernels.profile.stages import stage
from rlsedit_kernels.states.whitened import WhitenedForm

__all__ = ["Ahead", "Filter", "Fused", "Together", "Unfused"]


class Fused:
    """`rls_update_` for the state and `weight_update_` for the weight: C <- C - g Y', W <- W + g (V - K W)."""

    def __init__(self, problem: Problem, C: torch.Tensor) -> None:
        self.C, self.weight = C, problem.weight.clone()

    def __call__(self, K: torch.Tensor, V: torch.Tensor) -> None:
        with stage("state"):
            gain, _info = ops.rls_update_(self.C, K)
        with stage("weight"):
            ops.weight_update_(self.weight, K, V, gain)


class Together:
    """`Fused` for all layers of the problem in the same calls: a leading dimension of C (layers, d, d)."""

    def __init__(self, problem: Problem) -> None:
        n = problem.layers
        self.C = problem.covariance().expand(n, -1, -1).clone()
        self._weights = problem.weight.expand(n, -1, -1).clone()
        self._keys = {id(K): (K, K.expand(n, -1, -1).contiguous()) for K, _ in problem.batches}  # a layer has its own

    @property
    def weight(self) -> torch.Tensor:
        return self._weights[-1]

    def __call__(self, K: torch.Tensor, V: torch.Tensor) -> None:
        keys = self._keys[id(K)][1]
        with stage("state"):
            gain, _info = ops.rls_update_(self.C, keys)
        with stage("weight"):
            ops.weight_update_(self._weights, keys, V.expand(len(keys), -1, -1), gain)


class Unfused(Fused):
    """The same, op by op."""

    def __call__(self, K: torch.Tensor, V: torch.Tensor) -> None:
        with stage("products"):
            Y, G = ops.gain_products(self.C, K)
        with stage("solve"):
            gain, Z, _info = ops.gain_solve(Y, G, 1.0)
        with stage("commit"):
            ops.downdate_(self.C, Z)
        with stage("weight"):
            ops.weight_update_(self.weight, K, V, gain)


class Ahead(Fused):
    """A stream whose next keys are known: the commit of one batch and the products of the next in one pass over C."""

    def __init__(self, problem: Problem, C: torch.Tensor) -> None:
        super().__init__(problem, C)
        self._problem, self._next = problem, 0
        self._products = ops.gain_products(self.C, problem.batch(0)[0])

    def __call__(self, K: torch.Tensor, V: torch.Tensor) -> None:
        self._next += 1
        with stage("solve"):
            gain, Z, _info = ops.gain_solve(*self._products, 1.0)
        with stage("weight"):
            ops.weight_update_(self.weight, K, V, gain)
        with stage("state"):
            self._products = ops.downdate_gain_products_(self.C, Z, self._problem.batch(self._next)[0])


class Filter:
    """`RLSFilter`: checks, probes, residual, cost and deviation bounds included."""

    def __init__(self, problem: Problem, form: str, dtype: torch.dtype, *, matrix: bool) -> None:
        weight = problem.weight.to(dtype)
        if form == "square_root":
            self.filter = RLSFilter(weight, problem.prior, "square_root", layout="in_out")
        else:
            self.filter = RLSFilter(weight, problem.prior, layout="in_out", form=form)
        inner = getattr(self.filter.state, "_form", None)
        if matrix and isinstance(inner, WhitenedForm):
            inner._densify()  # as after 0.75 d keys: what a long stream costs
        self._dtype = dtype

    @property
    def weight(self) -> torch.Tensor:
        return self.filter.weight

    def __call__(self, K: torch.Tensor, V: torch.Tensor) -> None:
        with stage("update"):
            self.filter.update(K.to(self._dtype), V.to(self._dtype))
        if self.filter.state.form == "square_root":
            with stage("weight"):
                _ = self.filter.weight  # carried: solved for when it is read
