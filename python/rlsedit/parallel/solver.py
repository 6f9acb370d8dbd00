"""The state of one layer of a model that lies on many processes, and where it lies itself."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from ..methods import Method, Proposal, Start
from ..methods.solver import RecursionSolver, recursion
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
    """

    solver: RecursionSolver | None
    holder: int | None
    part: Part
    processes: Processes
    dtype: torch.dtype
    device: torch.device

    def propose(self, keys: Tensor, residual: Tensor, bare: Tensor | None = None) -> tuple[Proposal, PartSolver]:
        """W_p += g_p E where rows of the weight are here, (g E)[:, columns] where columns are.

        Raises:
            ValueError: the processes have been given different keys or residuals, or do not find the same gain.
        """
        self.processes.agree("Editor", digest_of_the_batch=digest(keys, residual))
        gain, following = self._solved(keys)
        self.processes.agree("Editor", digest_of_the_gain=digest(gain))
        return Proposal(self.part.product(gain, residual), gain), replace(self, solver=following)

    def health(self) -> dict[str, object]:
        """The state's own report, with the place of the state; without more where the state is elsewhere."""
        place: dict[str, object] = {"state_on": "all ranks" if self.holder is None else f"rank {self.holder}"}
        return place if self.solver is None else {**self.solver.health(), **place}

    def _solved(self, keys: Tensor) -> tuple[Tensor, RecursionSolver | None]:
        ranks = self.processes.ranks
        if self.solver is not None and getattr(self.solver.state, "ranks", None) is not None:
            found: Any
            with self.processes.in_step():
                found, following = self.solver.solved(keys)
            return (ranks.gather(found.to_local(), self.part.d) if isinstance(found, DTensor) else found), following
        gain, after = torch.empty(self.part.d, len(keys), dtype=self.dtype, device=self.device), self.solver
        with self.processes.together("Editor"):
            if self.solver is not None:
                gain, after = self.solver.solved(keys)
        return (gain if self.holder is None else ranks.broadcast(gain.contiguous(), self.holder)), after


def check_method(method: Method) -> None:
    """Refuse a method that needs more than keys, residuals and a recursion.

    Raises:
        ValueError: naming the method, why, and those that serve.
    """
    from ..methods import get_method, list_methods

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
        solver = recursion(method, begin)
    return PartSolver(solver, holder, part, processes, begin.dtype, torch.device(begin.device))


def _sharded(method: Method, begin: Start, processes: Processes) -> RecursionSolver:
    from rlsedit_kernels.distributed import ShardedCovarianceState

    assert method.prior is not None
    config, noise = begin.config, method.noise
    state: Any = ShardedCovarianceState(method.prior(begin.moment, config), processes.ranks, dtype=begin.dtype)
    return RecursionSolver(state, lambda keys: noise(config, keys), method.commit)
