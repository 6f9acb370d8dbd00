"""A method is a recipe over one state: prior, residual rule, noise, and whether a batch is committed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from ..config import EditConfig


@dataclass(frozen=True)
class Proposal:
    """Change of one weight for one batch: `update` (d, v) in row form; `gain` (d, u) where update = gain @ E."""

    update: Tensor
    gain: Tensor | None


class Solver(Protocol):
    """State of one layer. It is never changed: a proposal comes with the state that follows it."""

    def propose(self, keys: Tensor, residual: Tensor) -> tuple[Proposal, Solver]:
        """Change of the weight for keys (u, d) and residuals E (u, v), and the state after the batch."""

    def health(self) -> dict[str, object]:
        """What the state reports of itself."""


@dataclass(frozen=True)
class Method:
    """Recipe of one editing method.

    Attributes:
        name: as given to `Editor`.
        summary: one line with the source.
        solver: makes the state of one layer from (second moment E[k k'] float64 (d, d), config, dtype of the state).
        residual: (z, h, layers left) -> residual E (u, v), z and h behind the last edited layer; by default
            (z - h) / left (docs/mathematics.md, fact 11).
        objective: "anchor" or "null_space", which prior terms the method's objective has.
        commit: whether later batches know earlier ones.
        ridge: whether lam^2 |W - W_0|^2 belongs to the objective.
    """

    name: str
    summary: str
    solver: Callable[..., Solver]
    objective: str
    commit: bool = True
    ridge: bool = False
    residual: Callable[[Tensor, Tensor, int], Tensor] = lambda z, h, left: (z - h) / left


def check_moment(moment: Tensor, config: EditConfig) -> None:
    """Refuse a second moment that is not a finite square float64 matrix."""
    if moment.ndim != 2 or moment.shape[0] != moment.shape[1]:
        raise ValueError(f"moments: E[k k'] must have shape (d, d), got {tuple(moment.shape)}")
    if not bool(moment.isfinite().all()):
        raise ValueError("moments: E[k k'] must be finite, got NaN or Inf")
