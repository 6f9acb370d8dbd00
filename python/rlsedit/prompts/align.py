"""Padding of token rows so that one chosen token of every row stands in the same column."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Aligned:
    """Token rows padded on both sides.

    Attributes:
        ids: (B, T) int64, zero where padded.
        mask: (B, T) int64, 1 for tokens.
        positions: (B, T) int64, index of each token in its own row, zero where padded.
        column: the column in which the chosen token of every row stands.
    """

    ids: Tensor
    mask: Tensor
    positions: Tensor
    column: int


def align(rows: Sequence[Sequence[int]], pivots: Sequence[int], device: torch.device | str = "cpu") -> Aligned:
    """Pad rows left and right so that `rows[i][pivots[i]]` stands in one column for all i.

    Padding in front is masked and shifts no position, so that attention (causal or with a sliding window, which
    depend on differences only) and position embeddings see what they see without it.
    """
    column = max(pivots)
    after = max(len(row) - pivot for row, pivot in zip(rows, pivots, strict=True))
    ids = torch.zeros(len(rows), column + after, dtype=torch.long)
    mask, positions = torch.zeros_like(ids), torch.zeros_like(ids)
    for i, (row, pivot) in enumerate(zip(rows, pivots, strict=True)):
        start = column - pivot
        ids[i, start : start + len(row)] = torch.tensor(row)
        mask[i, start : start + len(row)] = 1
        positions[i, start : start + len(row)] = torch.arange(len(row))
    return Aligned(ids.to(device), mask.to(device), positions.to(device), column)
