"""The published sequences, each written anew from its paper and its released code, as steps of a profile."""

from __future__ import annotations

import torch

from rlsedit_kernels.profile.problem import Problem
from rlsedit_kernels.profile.stages import stage

__all__ = ["AlphaEdit", "Memit", "ReferenceRLSEdit", "Woodbury"]


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
