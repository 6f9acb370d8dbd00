"""Padding of token rows so that one chosen token of every row stands in the same column."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Aligned:
    """Token rows padded to one length.

    Attributes:
        ids: (B, T) int64, zero where padded.
        mask: (B, T) int64, 1 for tokens.
        positions: (B, T) int64, index of each token in its own row, zero where padded.
        at: (B,) int64, the column in which the chosen token of each row stands.
        column: the first of them; with padding in front that of every row.
    """

    ids: Tensor
    mask: Tensor
    positions: Tensor
    at: Tensor
    column: int

    def chosen(self, states: Tensor) -> Tensor:
        """Of states (B, T, ...) those of the chosen tokens, (B, ...)."""
        return states[torch.arange(len(states), device=states.device), self.at.to(states.device)]

    def replaced(self, states: Tensor, values: Tensor) -> Tensor:
        """States (B, T, ...) with `values` (B, ...) in the place of the chosen tokens'; differentiable in both."""
        return states.index_put((torch.arange(len(states), device=states.device), self.at.to(states.device)), values)


def align(
    rows: Sequence[Sequence[int]],
    pivots: Sequence[int],
    device: torch.device | str = "cpu",
    *,
    front: bool = True,
) -> Aligned:
    """Pad rows left and right so that `rows[i][pivots[i]]` stands in one column for all i.

    Padding in front is masked and shifts no position, so that attention (causal or with a sliding window, which
    depend on differences only) and position embeddings see what they see without it. A convolution or a state space
    may not know the mask: without `front` rows are padded on the right alone, where nothing that is causal looks.
    """
    columns = [max(pivots)] * len(rows) if front else list(pivots)
    length = max(column + len(row) - pivot for row, pivot, column in zip(rows, pivots, columns, strict=True))
    ids = torch.zeros(len(rows), length, dtype=torch.long)
    mask, positions = torch.zeros_like(ids), torch.zeros_like(ids)
    for i, (row, pivot, column) in enumerate(zip(rows, pivots, columns, strict=True)):
        start = column - pivot
        ids[i, start : start + len(row)] = torch.tensor(row)
        mask[i, start : start + len(row)] = 1
        positions[i, start : start + len(row)] = torch.arange(len(row))
    at = torch.tensor(columns, device=device)
    return Aligned(ids.to(device), mask.to(device), positions.to(device), at, min(columns))
