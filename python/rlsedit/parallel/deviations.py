"""How far one layer has moved, where each process has a part of its weight."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch import Tensor

from rlsedit_kernels.distributed import bounds

from ..deviations import Deviations, dot
from ..methods import Proposal
from .part import Part
from .processes import Processes

__all__ = ["PartDeviations", "start"]

_COLUMNS = 128


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

    def product(self, gain: Tensor, error: Tensor) -> Tensor:
        """This process's part of gain (d, u) @ error (u, v)."""
        return self.part.product(gain, error)

    def at(self, shift: Tensor) -> PartDeviations:
        """As `Deviations.at`, of this process's part of D; a few columns of D at a time are sent to all."""
        ranks = self.processes.ranks
        own = ranks.rows(self.part.d)
        anchor = sum(dot(block[own], self.gram @ block) for block in self._blocks(shift))
        total = ranks.ordered_sum(torch.tensor([anchor], dtype=torch.float64, device=ranks.device))
        return replace(self, shift=shift, parameter=self._sums(dot(shift, shift))[0], anchor=float(total))

    def _posterior(self, keys: Tensor, residual: Tensor, proposal: Proposal) -> Tensor:
        assert proposal.gain is not None
        return residual - (keys @ proposal.gain) @ residual

    def _image(self, change: Tensor, products: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
        """The part of A dW; `products` must be known, so that u x d numbers are sent and not W."""
        assert products
        first, *others = (self._moved(gain) @ error[:, self.part.columns] for gain, error in products)
        return sum(others, first)

    def _moved(self, gain: Tensor) -> Tensor:
        """The rows of A g (d, u) that belong to this part of the weight."""
        mine = self.gram @ gain
        return mine if self.part.kind == "rows" else self.processes.ranks.gather(mine, self.part.d)

    def _own(self, keys: Tensor) -> Tensor:
        return keys[:, self.part.rows]

    def _whole(self, product: Tensor) -> Tensor:
        ranks, part = self.processes.ranks, self.part
        if part.kind == "rows":
            return ranks.ordered_sum(product)
        return ranks.gather_columns(product, part.v) if part.kind == "columns" else product

    def _sums(self, *values: float) -> list[float]:
        if self.part.kind == "whole":
            return list(values)
        term = torch.tensor(values, dtype=torch.float64, device=self.processes.ranks.device)
        return [float(value) for value in self.processes.ranks.ordered_sum(term)]

    def _blocks(self, shift: Tensor) -> Iterator[Tensor]:
        """Whole columns (d, b) of D, one block after the other, on every process."""
        ranks, part = self.processes.ranks, self.part
        edges = bounds(part.v, ranks.size) if part.kind == "columns" else (0, part.v)
        for holder, (first, last) in enumerate(pairwise(edges)):
            for start in range(first, last, _COLUMNS):
                stop = min(start + _COLUMNS, last)
                if part.kind == "columns" and holder != ranks.rank:
                    yield ranks.broadcast(shift.new_empty(part.d, stop - start), holder)
                    continue
                block = shift[:, start - first : stop - first].contiguous()
                if part.kind == "rows":
                    block = ranks.gather(block, part.d)
                yield ranks.broadcast(block, holder) if part.kind == "columns" else block


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
