"""What a router gives, sorted by expert: the rows of a batch that each expert sees."""

from __future__ import annotations

from typing import NamedTuple

import torch

__all__ = ["Routed", "route"]


class Routed(NamedTuple):
    """What one expert is given.

    Attributes:
        rows: (u,) int64, ascending: positions in the batch.
        keys: (u, d), the keys of the expert in that order.
    """

    rows: torch.Tensor
    keys: torch.Tensor


def route(keys: torch.Tensor, experts: torch.Tensor, weights: torch.Tensor | None = None) -> dict[int, Routed]:
    """Sort the keys of a batch by the experts that a mixture of experts has chosen for them.

    Args:
        keys: (n, d), the same for all experts of a row (what an expert's first product sees), or (n, k, d), one for
            each choice (what its `down_proj` sees).
        experts: (n, k) integers, the experts of each row; negative ones are none (a dropped token).
        weights: (n, k), by which the output of a choice is multiplied; its key is multiplied by it, since
            weight (W k) = W (weight k). None for keys that have it already.

    Returns:
        By expert, ascending, the rows that it was chosen for; experts that were not chosen are not there.

    Raises:
        TypeError, ValueError: shapes or dtypes do not fit, or a row names an expert twice.
    """
    for name, value in (("keys", keys), ("experts", experts)):
        if not isinstance(value, torch.Tensor):
            raise TypeError(f"route: {name} must be a torch.Tensor, got {type(value).__name__}")
    if experts.dtype.is_floating_point or experts.dtype in (torch.bool, torch.complex64, torch.complex128):
        raise TypeError(f"route: experts must be integers, got {experts.dtype}")
    if experts.dim() != 2:
        raise ValueError(f"route: experts must have shape (n, k), got {tuple(experts.shape)}")
    n, k = experts.shape
    if tuple(keys.shape[:-1]) not in ((n,), (n, k)):
        raise ValueError(f"route: keys must have shape ({n}, d) or ({n}, {k}, d), got {tuple(keys.shape)}")
    if weights is not None and tuple(weights.shape) != (n, k):
        raise ValueError(f"route: weights must have shape ({n}, {k}), got {tuple(weights.shape)}")
    chosen = experts.to(device=keys.device, dtype=torch.int64)
    ordered = chosen.sort(dim=1).values
    twice = (ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0)
    if bool(twice.any()):
        row = int(twice.any(dim=1).nonzero()[0])
        raise ValueError(f"route: experts must differ within a row, got {experts[row].tolist()} in row {row}")
    flat = chosen.reshape(-1)
    order = flat.argsort(stable=True)
    order = order[flat[order] >= 0]
    found, counts = flat[order].unique_consecutive(return_counts=True)
    routed = {}
    for expert, choices in zip(found.tolist(), order.split(counts.tolist()), strict=True):
        rows = choices // k
        own = keys[rows] if keys.dim() == 2 else keys[rows, choices % k]
        if weights is not None:
            own = own * weights.to(own)[rows, choices % k][:, None]
        routed[expert] = Routed(rows, own)
    return routed
