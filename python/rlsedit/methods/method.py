"""A method is a recipe over one state: prior, residual rule, noise, time of commit, and a step after the solve."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

import rlsedit_kernels as rk

from ..config import EditConfig
from .solver import Commit, RecursionSolver, Solver, Start

Signal = Literal["targets", "components", "tokens", "gradients", "steps"]
"""What a method is driven by; each has one writer in `rlsedit.writing`."""

Removal = Literal["downdate", "solve"]
"""How single edits are taken back: by a downdate of the state, or by solving their batch again without them."""


@dataclass(frozen=True)
class Signals:
    """What a residual is made from, all for one batch and one layer.

    Attributes:
        z: (u, v) targets z*.
        h: (u, v) present values of what z* replaces, with the layers below edited.
        left: number of layers that are still to be edited, this one included.
        keys, bare: (u, d) mean keys over the contexts, and keys of the bare prompts.
        weight: W (d, v) as it is.
    """

    z: Tensor
    h: Tensor
    left: int
    keys: Tensor
    bare: Tensor
    weight: Tensor


def spread(signals: Signals) -> Tensor:
    """(z* - h) / (layers left): MEMIT, algorithm 1 (docs/mathematics.md, fact 11)."""
    return (signals.z - signals.h) / signals.left


def config_noise(config: EditConfig, _keys: int) -> float:
    """The noise of the configuration, whatever the size of the batch."""
    return config.noise


@dataclass(frozen=True)
class Method:
    """Recipe of one editing method.

    Attributes:
        name: as given to `Editor`.
        summary: one line with the source.
        prior: S_0 from (second moment, config); None where there is no recursion.
        noise: noise of a batch from (config, number of keys).
        commit: when keys enter the state.
        residual: rule of the residual E (u, v).
        solver: makes the state of one layer, for rules that need more than prior, noise and commit.
        objective: (lambda, mu) of lambda^2 |W - W_0|^2 + mu^2 |K_0 (W - W_0)|^2, the prior terms beside the fit to all
            batches that the recursion minimises; None where later batches do not know earlier ones in that sense.
        post: (update, weight, config) -> update, a step after the solve.
        finish: (shift W - W_0, W_0, config) -> shift, a step at the end of a sequence of batches.
        signal: what drives the method.
        soft: whether the noise of the configuration has to be positive: the solver divides keys by its root.
        single: one fact at a time, one layer, all contexts of equal weight in the key (ROME).
        early_stop: whether z* stops early where the new answer has become the likeliest (ENCORE).
        removable: how single edits are taken back, for a recipe whose `solver`, `commit` and steps do not say it.
        entangled: why single edits cannot be taken back; empty where they can, or where the recipe says it.
    """

    name: str
    summary: str
    prior: Callable[[Tensor, EditConfig], rk.Prior] | None = None
    noise: Callable[[EditConfig, int], float] = config_noise
    commit: Commit = "batch"
    residual: Callable[[Signals], Tensor] = spread
    solver: Callable[[Start], Solver] | None = None
    objective: Callable[[EditConfig], tuple[float, float]] | None = None
    post: Callable[[Tensor, Tensor, EditConfig], Tensor] | None = None
    finish: Callable[[Tensor, Tensor, EditConfig], Tensor] | None = None
    signal: Signal = "targets"
    soft: bool = False
    single: bool = False
    early_stop: bool = False
    removable: Removal | None = None
    entangled: str = ""

    @property
    def removal(self) -> Removal:
        """How single edits are taken back, where `lasting` is empty."""
        return self.removable or ("solve" if self.commit == "never" else "downdate")

    @property
    def lasting(self) -> str:
        """Why single edits cannot be taken back; empty where they can."""
        if self.entangled or self.removable is not None:
            return self.entangled
        if self.post is not None:
            return "the step after the solve depends on the weights as they were"
        if self.commit == "hard":
            return "a hard commit (noise 0) leaves no trace to remove"
        return "its solver does not say how" if self.solver is not None else ""

    @property
    def residuals(self) -> bool:
        """Whether it writes residuals, for which targets have to follow the edited weight linearly."""
        return self.signal not in ("gradients", "steps")

    def check(self, config: EditConfig) -> None:
        """Refuse hyper-parameters with which the prior would be zero or no solve possible, before anything is computed.

        Raises:
            ValueError: naming the hyper-parameter.
        """
        if self.soft and config.noise == 0:
            raise ValueError(
                f"EditConfig: noise must be positive for {self.name!r}, whose solver keeps keys by it, got 0"
            )
        if self.prior is not None:  # a moment with one direction to leave alone and one to write in
            self.prior(torch.diag(torch.tensor([0.0, 2 * config.null_threshold], dtype=torch.float64)), config)

    def start(
        self, moment: Tensor, config: EditConfig, dtype: torch.dtype, device: torch.device | str = "cpu"
    ) -> Solver:
        """The state of one layer before the first batch.

        Raises:
            ValueError: the moment is not a finite square matrix, or the prior would be zero.
        """
        check_moment(moment)
        start = Start(moment, config, dtype, device)
        return self.recursion(start) if self.solver is None else self.solver(start)

    def recursion(self, start: Start) -> RecursionSolver:
        """Its prior, noise and commit on a covariance state.

        Hard commits project until nothing may be left of the covariance: a root stays semi-definite there, by
        construction.
        """
        assert self.prior is not None
        config, noise = start.config, self.noise
        form = "inverse_root" if self.commit == "hard" else "auto"
        prior = self.prior(start.moment, config)
        state = rk.CovarianceState(prior, form=form, dtype=start.dtype, device=start.device)
        return RecursionSolver(state, lambda keys: noise(config, keys), self.commit)


def check_moment(moment: Tensor) -> None:
    """Refuse a second moment that is not a finite square matrix."""
    if moment.ndim != 2 or moment.shape[0] != moment.shape[1]:
        raise ValueError(f"moments: E[k k'] must have shape (d, d), got {tuple(moment.shape)}")
    if not bool(moment.isfinite().all()):
        raise ValueError("moments: E[k k'] must be finite, got NaN or Inf")
