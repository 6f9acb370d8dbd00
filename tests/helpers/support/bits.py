"""Whether two things are the same to the bit."""

from __future__ import annotations

import torch


def same(one: object, other: object) -> bool:
    """Of tensors every number, of modules their `state_dict`, of dictionaries, lists and tuples all that is in them."""
    if isinstance(one, torch.nn.Module) and isinstance(other, torch.nn.Module):
        return same(one.state_dict(), other.state_dict())
    if isinstance(one, torch.Tensor):
        return isinstance(other, torch.Tensor) and torch.equal(one, other)
    if isinstance(one, dict):
        return isinstance(other, dict) and one.keys() == other.keys() and all(same(one[k], other[k]) for k in one)
    if isinstance(one, (list, tuple)):
        return isinstance(other, (list, tuple)) and len(one) == len(other) and all(map(same, one, other))
    return bool(one == other)
