"""What a contender is: a name, and a function that makes a step for a problem."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

import torch

from rlsedit_kernels.backends import use_backend
from rlsedit_kernels.profile.problem import Problem

__all__ = ["Contender", "Step"]

Step = Callable[[torch.Tensor, torch.Tensor], object]
"""step(K, V): writes keys (u, d) to targets (u, v). Where it has an attribute `weight` (d, v), its error is measured;
where it has a method `age(K, V)`, that takes its place when batches are written that nobody times."""

Truth = Literal["anchor", "null_space"]


@dataclass(frozen=True)
class Contender:
    """One way to write a batch.

    Attributes:
        name: as it stands in tables; distinct.
        make: from a `Problem` to a step that has written nothing yet, for one layer (`at_once`: for all of them).
        summary: one line: what is done and where it comes from.
        truth: which float64 solution its weight is compared with after the first batches: that of S_0 = the anchor, or
            of C_0 = P / l2 ("null_space"); None where neither is meant to come out.
        history: whether later batches know earlier ones. MEMIT's do not: its error is taken after one batch.
        bytes: what it keeps and needs at once for one layer, at least; None where that is not known.
        flops: of one step, roughly, so that one that would take too long can be left out before it is run.
        start: flops that it takes to make one, where they count.
        age: flops of a batch that nobody times, where its step has a method `age`; None for those of a step.
        backend: that of the ops while it runs; None for the automatic choice.
        shared: makes what several contenders have in common, such as the problem's prior, before memory is measured.
        at_once: whether one step writes to all layers of the problem; otherwise there is one for each.

    Raises:
        TypeError, ValueError: a name, maker or truth that does not fit.
    """

    name: str
    make: Callable[[Problem], Step]
    summary: str = ""
    truth: Truth | None = None
    history: bool = True
    bytes: Callable[[Problem], float] | None = None
    flops: Callable[[Problem], float] | None = None
    start: Callable[[Problem], float] | None = None
    backend: str | None = None
    shared: Callable[[Problem], object] | None = None
    at_once: bool = False
    age: Callable[[Problem], float] | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not self.name:
            raise TypeError(f"Contender: name must be a string that is not empty, got {self.name!r}")
        if not callable(self.make):
            raise TypeError(f"Contender: make must be callable with a problem, got {self.make!r}")
        if self.truth not in (*get_args(Truth), None):
            known = ", ".join(map(repr, get_args(Truth)))
            raise ValueError(f"Contender: truth must be one of {known}, or None, got {self.truth!r}")

    def forced(self) -> contextlib.AbstractContextManager[object]:
        """Its back end, in force within the block."""
        return contextlib.nullcontext() if self.backend is None else use_backend(self.backend)
