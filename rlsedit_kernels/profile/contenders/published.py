"""The published sequences, each written anew from its paper and its released code, and what a dense solve can be at its
best, as steps of a profile."""

from __future__ import annotations

import torch

from rlsedit_kernels.profile.problem import Problem
from rlsedit_kernels.profile.stages import stage

__all__ = ["AlphaEdit", "AlphaEditCholesky", "DenseCholesky", "Memit", "ReferenceRLSEdit", "Woodbury"]


class Woodbury:
    """The Woodbury step as one writes it first: full products, fresh buffers, the gain from the new C."""

    def __init__(self, problem: Problem) -> None:
        self.C, self.weight = problem.covariance(), problem.weight.clone()

    def __call__(self, K: torch.Tensor, V: torch.Tensor) -> None:
        with stage("products"):
            Y = self.C @ K.T
            system = torch.eye(len(K), dtype=K.dtype, device=K.device) + K @ Y
        with stage("solve"):
            L = torch.linalg.cholesky(system)
            Z = torch.linalg.solve_triangular(L, Y.T, upper=False).T
        with stage("commit"):
            self.C = self.C - Z @ Z.T
        with stage("weight"):
            self.weight = self.weight + (self.C @ K.T) @ (V - K @ self.weight)


class ReferenceRLSEdit:
    """The sequence of RLSEdit's released code: columns for rows, the state cloned at entry, the new covariance and
    weight sent to the host and back each batch, the gain from the new covariance."""

    def __init__(self, problem: Problem) -> None:
        self.stack = problem.covariance().unsqueeze(0)
        self.weight = problem.weight.clone()

    def __call__(self, K: torch.Tensor, V: torch.Tensor) -> None:
        keys = K.T  # (d, u)
        with stage("transfer"):
            stack = self.stack.clone()
            old = stack[0].to(K.device)
            first = self.weight.detach().to("cpu").to(K.device)
        with stage("products"):
            F = old @ keys
            system = torch.eye(keys.shape[1], dtype=K.dtype, device=K.device) + keys.T @ F
        with stage("solve"):
            upper = torch.linalg.cholesky(system, upper=True)
            G = torch.linalg.solve_triangular(upper, F, upper=True, left=False)
        with stage("commit"):
            new = old - G @ G.T
        with stage("transfer"):
            stack[0] = new.detach().to("cpu")
        with stage("weight"):
            change = first + new @ keys @ (V - keys.T @ first) - first
            self.weight = self.weight + change
        with stage("transfer"):
            self.kept = (first + change).detach().to("cpu")
            self.stack = stack


class AlphaEdit:
    """[P (K'K + M) + l2 I] X = P K'E by a dense solve for every batch (Fang et al. 2025, released code).

    Args:
        problem: the layer.
        host: whether P and the sum M of earlier K'K live on the host, as released, or on the device.
    """

    def __init__(self, problem: Problem, *, host: bool) -> None:
        self._device = torch.device("cpu") if host else problem.device
        self.P = problem.projector().to(self._device)
        self.cache = torch.zeros_like(self.P)
        self.weight, self._l2 = problem.weight.clone(), problem.l2

    def __call__(self, K: torch.Tensor, V: torch.Tensor) -> None:
        with stage("weight"):
            E = V - K @ self.weight
        with stage("transfer"):
            P, cache = self.P.to(K.device), self.cache.to(K.device)
        with stage("products"):
            eye = torch.eye(K.shape[1], dtype=K.dtype, device=K.device)
            system = P @ (K.T @ K + cache) + self._l2 * eye
            right = P @ K.T @ E
        with stage("solve"):
            update = torch.linalg.solve(system, right)
        with stage("weight"):
            self.weight = self.weight + update
        with stage("commit"):
            self.age(K, V)

    def age(self, K: torch.Tensor, V: torch.Tensor) -> None:
        """M <- M + K'K: what later batches know of this one."""
        keys = K.to(self._device)
        self.cache += keys.T @ keys


class Memit:
    """(mom2 + K'K) X = K' in float64, W <- W + X E (Meng et al. 2023, released code): a dense solve for every batch,
    and no memory of the batches before."""

    def __init__(self, problem: Problem) -> None:
        self.moment, self.weight = problem.information(), problem.weight.clone()

    def __call__(self, K: torch.Tensor, V: torch.Tensor) -> None:
        with stage("weight"):
            E = V - K @ self.weight
        with stage("products"):
            keys = K.T.double()
            system = self.moment + keys @ keys.T
        with stage("solve"):
            gain = torch.linalg.solve(system, keys)
        with stage("weight"):
            self.weight = self.weight + (gain @ E.double()).to(self.weight.dtype)

    def age(self, K: torch.Tensor, V: torch.Tensor) -> None:
        """Nothing: later batches know none of this one."""


class DenseCholesky:
    """S <- S + K'K and W <- W + S^-1 K'E by a Cholesky factorisation for every batch: sequential MEMIT with all that a
    dense solve allows. Half the flops of LU, a right-hand side of u columns, buffers kept.

    Args:
        problem: the layer.
        dtype: of S and its factor.
    """

    def __init__(self, problem: Problem, dtype: torch.dtype) -> None:
        self.S, self.weight = problem.information().to(dtype), problem.weight.clone()
        self._factor = _Factor(self.S)

    def __call__(self, K: torch.Tensor, V: torch.Tensor) -> None:
        with stage("commit"):
            self.age(K, V)
        with stage("solve"):
            gain = self._factor.solved(self.S, K.T.to(self.S)).to(K.dtype)
        with stage("weight"):
            self.weight.addmm_(gain, V - K @ self.weight)

    def age(self, K: torch.Tensor, V: torch.Tensor) -> None:
        """S <- S + K'K: what later batches know of this one."""
        keys = K.to(self.S)
        self.S.addmm_(keys.T, keys)


class AlphaEditCholesky:
    """AlphaEdit's weights by a Cholesky factorisation for every batch, in the null space itself: with N (d, r) a basis,
    P = N N', and B = l2 I + sum of (K N)'(K N), the change is N B^-1 (K N)'E. Smaller, symmetric, buffers kept."""

    def __init__(self, problem: Problem) -> None:
        self.N, self.weight = problem.null_basis(), problem.weight.clone()
        self.B = problem.l2 * torch.eye(problem.free, dtype=problem.dtype, device=problem.device)
        self._factor = _Factor(self.B)

    def __call__(self, K: torch.Tensor, V: torch.Tensor) -> None:
        with stage("products"):
            free = K @ self.N  # (u, r)
        with stage("commit"):
            self.B.addmm_(free.T, free)
        with stage("solve"):
            inner = self._factor.solved(self.B, free.T)
        with stage("products"):
            gain = self.N @ inner
        with stage("weight"):
            self.weight.addmm_(gain, V - K @ self.weight)

    def age(self, K: torch.Tensor, V: torch.Tensor) -> None:
        """B <- B + (K N)'(K N): what later batches know of this one."""
        free = K @ self.N
        self.B.addmm_(free.T, free)


class _Factor:
    """Where the factor of a symmetric matrix goes: memory that is taken once, as the matrix itself keeps its own."""

    def __init__(self, like: torch.Tensor) -> None:
        self._lower = torch.empty_like(like)
        self._info = torch.empty((), dtype=torch.int32, device=like.device)

    def solved(self, A: torch.Tensor, B: torch.Tensor) -> torch.Tensor:
        """A^-1 B for a symmetric positive definite A (n, n) and B (n, u); NaN or rubbish where A is not."""
        torch.linalg.cholesky_ex(A, out=(self._lower, self._info))
        return torch.cholesky_solve(B, self._lower)
