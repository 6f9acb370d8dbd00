"""How far one layer has moved, where each process has a part of its weight."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..deviations import Deviations, dot, square
from ..methods import Proposal
from .part import Part
from .processes import Processes

__all__ = ["PartDeviations", "start"]


@dataclass(frozen=True, kw_only=True)
class PartDeviations(Deviations):
    """As `Deviations`, the same figures on all processes.

    Attributes:
        shift: this process's part of D.
        gram: this process's rows of A, shards of (d, d) as of DTensor's `Shard(0)`.
        part: which part of the weight is here.
        processes: those that hold the model.
    """

    part: Part
    processes: Processes

    def after(self, keys: Tensor, residual: Tensor, proposal: Proposal, noise: float) -> PartDeviations:
        """Figures after a batch; `proposal` has this process's part of the change and the whole gain."""
        change, gain = proposal.update, proposal.gain
        assert gain is not None
        posterior = residual - (keys @ gain) @ residual
        moved = self._moved(gain) @ residual[:, self.part.columns]
        shift = self.shift + change
        parameter, crossed, own = self._sums(dot(shift, shift), dot(self.shift, moved), dot(change, moved))
        scale = noise if noise > 0 else 1.0
        return replace(
            self,
            shift=shift,
            cost=self.cost + dot(residual, posterior) / scale,
            parameter=parameter,
            anchor=self.anchor + 2 * crossed + own,
            innovation=self.innovation + square(self.target(keys, residual)) / scale,
            last_fit=square(posterior) / scale,
        )

    def target(self, keys: Tensor, residual: Tensor) -> Tensor:
        """Pseudo-targets of a batch less K W_0, (u, v), the same bits on all processes."""
        ranks, part = self.processes.ranks, self.part
        if part.kind == "rows":
            return residual + ranks.ordered_sum(keys[:, part.rows] @ self.shift)
        reach = keys @ self.shift
        return residual + (ranks.gather_columns(reach, part.v) if part.kind == "columns" else reach)

    def _moved(self, gain: Tensor) -> Tensor:
        """The rows of A g (d, u) that belong to this part of the weight."""
        mine = self.gram @ gain
        return mine if self.part.kind == "rows" else self.processes.ranks.gather(mine, self.part.d)

    def _sums(self, *values: float) -> list[float]:
        """Sums over the parts."""
        if self.part.kind == "whole":
            return list(values)
        term = torch.tensor(values, dtype=torch.float64, device=self.processes.ranks.device)
        return [float(value) for value in self.processes.ranks.ordered_sum(term)]


def start(processes: Processes, part: Part, moment: Tensor, weight: Tensor, dtype: torch.dtype) -> PartDeviations:
    """Figures of a layer that has not moved.

    Args:
        processes, part: who holds what.
        moment: A (d, d) in any precision, on any device.
        weight: this process's part of W.
        dtype: of the edit.
    """
    rows = processes.ranks.rows(part.d)
    gram = moment[rows].to(device=weight.device, dtype=dtype)
    zero = torch.zeros(weight.shape, dtype=dtype, device=weight.device)
    return PartDeviations(zero, gram, part=part, processes=processes)
