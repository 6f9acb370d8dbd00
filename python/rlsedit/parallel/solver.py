"""The state of one layer of a model that lies on many processes, and where it lies itself."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from rlsedit_kernels import Prior
from rlsedit_kernels.distributed import ShardedCovarianceState, ShardedSquareRootState
from rlsedit_kernels.distributed.weight import ShardedWeight
from rlsedit_kernels.errors import LeverageError

from ..methods import Method, Proposal, Start, get_method, list_methods
from ..methods.solver import RecursionSolver
from .part import Part, digest
from .processes import Processes

__all__ = ["PLACEMENTS", "PartSolver", "check_method", "placement", "start"]

PLACEMENTS = ("auto", "replicated", "layers", "sharded")

SMALL = 2**28
"""Bytes of all states up to which every process keeps them whole."""


@dataclass(frozen=True)
class PartSolver:
    """Gives each process its part of the change; the gain (d, u) is what is exchanged.

    Attributes:
        solver: the state: of its own where it is replicated, its rows where it is sharded, None on the processes that
            do not hold it.
        holder: the rank that holds the state; None for all.
        part: which part of the weight is here.
        processes: those that hold the model.
        dtype, device: of keys and gains.
        prior: makes the prior anew, which a sharded state does not keep.
    """

    solver: RecursionSolver | None
    holder: int | None
    part: Part
    processes: Processes
    dtype: torch.dtype
    device: torch.device
    prior: Callable[[], Prior]

    def propose(self, keys: Tensor, residual: Tensor, bare: Tensor | None = None) -> tuple[Proposal, PartSolver]:
        """W_p += g_p E where rows of the weight are here, (g E)[:, columns] where columns are.

        Raises:
            ValueError: the processes have been given different keys or residuals, or do not find the same gain.
        """
        self.processes.agree("Editor", digest_of_the_batch=digest(keys, residual))
        gain, following = self._asked(len(keys), lambda solver: solver.solved(keys))
        return Proposal(self.part.product(gain, residual), gain), replace(self, solver=following)

    def health(self) -> dict[str, object]:
        """The state's own report, with the place of the state; without more where the state is elsewhere."""
        place: dict[str, object] = {"state_on": "all ranks" if self.holder is None else f"rank {self.holder}"}
        return place if self.solver is None else {**self.solver.health(), **place}

    def removed(self, keys: Tensor) -> tuple[Tensor, PartSolver]:
        """See `Removable`; the whole gain (d, u) on every process.

        Raises:
            LeverageError: on all processes, where one of them finds it.
            ValueError: the processes have been given different keys, or do not find the same gain.
        """
        self.processes.agree("remove", digest_of_the_keys=digest(keys))

        def work(solver: RecursionSolver) -> tuple[Tensor, RecursionSolver]:
            try:
                return solver.removed(keys)
            except LeverageError:  # where one process has the state, the others hear of it by the gain
                return torch.full((self.part.d, len(keys)), torch.nan, dtype=self.dtype, device=self.device), solver

        gain, following = self._asked(len(keys), work)
        if bool(gain.isnan().any()):
            with self.processes.in_step():
                raise LeverageError("remove: the rows cannot be taken out of the state by a downdate")
        return gain, replace(self, solver=following)

    def rebuilt(self, rows: Callable[[], Iterable[tuple[Tensor, Tensor, float]]]) -> tuple[Tensor, PartSolver]:
        """See `Removable`; this process's part of W - W_0, from a triangular float64 state that all processes share.

        All rows are held at once: reading them is a call of all processes, and a state is made anew by its own.
        """
        batches = list(rows())
        written = [(keys, noise) for keys, _, noise in batches]
        shift = self._exact(batches)
        if self._sharded is not None:
            with self.processes.in_step():
                return shift, replace(self, solver=self._sharded.refactored(written))
        following = self.solver
        with self.processes.together("remove"):
            if self.solver is not None:
                following = self.solver.refactored(written)
        return shift, replace(self, solver=following)

    @property
    def _sharded(self) -> RecursionSolver | None:
        """The state, where its rows lie on all processes."""
        found = self.solver
        return None if found is None or getattr(found.state, "ranks", None) is None else found

    def _asked(
        self, u: int, work: Callable[[RecursionSolver], tuple[Tensor, RecursionSolver]]
    ) -> tuple[Tensor, RecursionSolver | None]:
        """Gain (d, u) and the state behind it, of whoever holds the state; the same bits everywhere."""
        ranks = self.processes.ranks
        if self._sharded is not None:
            found: Any
            with self.processes.in_step():
                found, following = work(self._sharded)
            gain = ranks.gather(found.to_local(), self.part.d) if isinstance(found, DTensor) else found
            self.processes.agree("Editor", digest_of_the_gain=digest(gain))
            return gain, following
        gain, after = torch.empty(self.part.d, u, dtype=self.dtype, device=self.device), self.solver
        with self.processes.together("Editor"):
            if self.solver is not None:
                gain, after = work(self.solver)
        if self.holder is not None:
            gain = ranks.broadcast(gain.contiguous(), self.holder)
        self.processes.agree("Editor", digest_of_the_gain=digest(gain))
        return gain, after

    def _exact(self, batches: Sequence[tuple[Tensor, Tensor, float]]) -> Tensor:
        """This process's part of the D (d, v) float64 that minimises |D|^2_S_0 + sum |K D - V|^2 / noise."""
        ranks, part = self.processes.ranks, self.part
        with self.processes.together("remove"):
            prior = self.prior()
        with self.processes.in_step():
            state = ShardedSquareRootState(prior, ranks, dtype=torch.float64, guard="off")
            right = state.zeros(part.v)
            for keys, target, noise in batches:
                state.append_with(right, keys, target, noise)
            change = state.solve(right)
        place = "everywhere" if part.kind == "whole" else part.kind
        return ShardedWeight(ranks, change.to_local(), place, (part.d, part.v)).sent_change(change)


def check_method(method: Method) -> None:
    """Refuse a method that needs more than keys, residuals and a recursion.

    Raises:
        ValueError: naming the method, why, and those that serve.
    """
    if reason := _reason(method):
        serving = [name for name in list_methods() if not _reason(get_method(name))]
        raise ValueError(
            f"Editor: method {method.name!r} cannot edit a model that lies on many processes: {reason}; these can: "
            f"{', '.join(serving)}"
        )


def _reason(method: Method) -> str:
    if method.signal == "components":
        return "its targets beside a free attention are not shared out yet"
    if method.signal != "targets":
        return f"it is driven by {method.signal}, which needs whole weights"
    if method.solver is not None:
        return "its state is not a plain recursion"
    if method.post is not None or method.finish is not None:
        return "its step after the solve needs whole weights"
    if method.single:
        return "it reads the whole weight"
    return ""


def placement(asked: str, layers: int, d: int, dtype: torch.dtype) -> str:
    """Where states go: "replicated" where all of them take at most 256 MiB, "sharded" otherwise, or what is asked for.

    Raises:
        ValueError: an unknown placement.
    """
    if asked not in PLACEMENTS:
        raise ValueError(f"Editor: states must be one of {', '.join(map(repr, PLACEMENTS))}, got {asked!r}")
    if asked != "auto":
        return asked
    return "replicated" if layers * d * d * torch.empty((), dtype=dtype).element_size() <= SMALL else "sharded"


def start(method: Method, begin: Start, processes: Processes, part: Part, place: str, index: int) -> PartSolver:
    """The state of the `index`-th edited layer before the first batch.

    Args:
        method: the recipe.
        begin: second moment (d, d), hyper-parameters, dtype and device.
        processes, part: who holds what of the weight.
        place: what `placement` gave.
        index: of the layer among those that are edited; layer-parallel states go round the ranks.
    """
    holder = index % processes.size if place == "layers" else None
    solver: RecursionSolver | None = None
    if place == "sharded":
        solver = _sharded(method, begin, processes)
    elif holder is None or holder == processes.rank:
        solver = method.recursion(begin)
    device = torch.device(begin.device)
    return PartSolver(solver, holder, part, processes, begin.dtype, device, lambda: _prior(method, begin))


def _sharded(method: Method, begin: Start, processes: Processes) -> RecursionSolver:
    config, noise = begin.config, method.noise
    state: Any = ShardedCovarianceState(_prior(method, begin), processes.ranks, dtype=begin.dtype)
    return RecursionSolver(state, lambda keys: noise(config, keys), method.commit)


def _prior(method: Method, begin: Start) -> Prior:
    assert method.prior is not None
    return method.prior(begin.moment, begin.config)
