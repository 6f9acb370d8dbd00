"""What a checkpoint holds, taken apart: JSON for the structure, one flat table of tensors for the disk."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import torch
from torch.distributed.tensor import DTensor, Replicate, Shard

__all__ = ["Part", "apart", "keys_of", "merged", "plain_json", "rebuilt", "take_weights"]

_MARK = "$tensor"


class Part:
    """What one rank brings: the tree of each name, the tensors by key, and what is known of each tensor.

    Attributes:
        trees: JSON for each name, with {"$tensor": key} where a tensor was.
        tensors: by key, as `torch.distributed.checkpoint` takes them.
        facts: by key: global shape, dtype, the sharded dimension (None: whole), a digest of what is whole, and whether
            columns are contiguous in memory rather than rows: products round differently then.
    """

    def __init__(self) -> None:
        self.trees: dict[str, Any] = {}
        self.tensors: dict[str, torch.Tensor] = {}
        self.facts: dict[str, dict[str, Any]] = {}

    def header(self) -> dict[str, Any]:
        """What the other ranks need to know."""
        return {"trees": self.trees, "facts": self.facts}

    def add(self, key: str, value: torch.Tensor) -> None:
        """A tensor of a state or a weight."""
        value = value.detach() if value.requires_grad else value
        dim: int | None = None
        if isinstance(value, DTensor):
            cut = [place for place in value.placements if not isinstance(place, Replicate)]
            if any(not isinstance(place, Shard) for place in cut):
                raise ValueError(f"save: {key} has the placement {value.placements}, a sum that is still to be made; "
                                 "redistribute it first")  # fmt: skip
            if not cut:
                value = value.to_local()
            else:
                dim = cut[0].dim  # type: ignore[attr-defined]
        self.tensors[key] = value
        digest = None if isinstance(value, DTensor) else _digest(value)
        mine = value.to_local() if isinstance(value, DTensor) else value
        columns = mine.dim() == 2 and not mine.is_contiguous() and mine.mT.is_contiguous()
        self.facts[key] = {"shape": list(value.shape), "dtype": str(value.dtype), "shard": dim, "digest": digest,
                           "columns": columns}  # fmt: skip


def apart(part: Part, name: str, value: Any) -> None:
    """Add what a state's `state_dict()` gave to `part`.

    Raises:
        TypeError: it holds something that is neither a tensor nor a plain value.
    """
    part.trees[name] = _tree(part, f"states/{name}", value)


def _tree(part: Part, key: str, value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        part.add(key, value)
        return {_MARK: key}
    if isinstance(value, Mapping):
        if not all(isinstance(name, str) for name in value) or _MARK in value:
            raise TypeError(f"save: the keys of {key} must be text, got {list(value)}")
        return {name: _tree(part, f"{key}/{name}", entry) for name, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_tree(part, f"{key}/{index}", entry) for index, entry in enumerate(value)]
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise TypeError(f"save: {key} must be a tensor or a plain value, got {type(value).__name__}")


def take_weights(part: Part, weights: Mapping[str, torch.Tensor]) -> None:
    """Add weights to `part`."""
    for name, weight in weights.items():
        part.add(f"weights/{name}", weight)


def merged(headers: list[dict[str, Any]]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Trees and facts of all ranks in one.

    Raises:
        ValueError: two ranks have the same name with different content, or a sharded state is not on all ranks.
    """
    trees: dict[str, Any] = {}
    facts: dict[str, Any] = {}
    owner: dict[str, int] = {}
    for rank, header in enumerate(headers):
        for name, tree in header["trees"].items():
            if owner.setdefault(name, rank) != rank and _text(trees[name]) != _text(tree):
                raise ValueError(f"save: ranks {owner[name]} and {rank} have different states by the name {name!r}: "
                                 f"{_differs(trees[name], tree)}")  # fmt: skip
            trees[name] = tree
        for key, fact in header["facts"].items():
            known = facts.setdefault(key, fact)
            known["columns"] = fact["columns"] = known["columns"] or fact["columns"]  # a short shard cannot tell
            if known != fact:
                raise ValueError(f"save: {key} is not the same on all ranks: {known} on one, {fact} on rank {rank}")
    return trees, facts


def rebuilt(tree: Any, tensors: Mapping[str, torch.Tensor]) -> Any:
    """The value of which `tree` is the structure."""
    if isinstance(tree, dict):
        if _MARK in tree:
            return tensors[tree[_MARK]]
        return {name: rebuilt(entry, tensors) for name, entry in tree.items()}
    if isinstance(tree, list):
        return [rebuilt(entry, tensors) for entry in tree]
    return tree


def keys_of(tree: Any) -> list[str]:
    """Keys of the tensors of a tree."""
    if isinstance(tree, dict):
        if _MARK in tree:
            return [tree[_MARK]]
        return [key for entry in tree.values() for key in keys_of(entry)]
    if isinstance(tree, list):
        return [key for entry in tree for key in keys_of(entry)]
    return []


def plain_json(name: str, value: Any) -> Any:
    """`value`, if it comes back from JSON as it is.

    Raises:
        TypeError: it does not.
    """
    try:
        same = json.loads(json.dumps(value)) == value
    except (TypeError, ValueError) as error:
        raise TypeError(f"save: {name} must be plain JSON values: {error}") from error
    if not same:
        raise TypeError(f"save: {name} must come back from JSON as it is; keys must be text, sequences lists")
    return value


def _text(tree: Any) -> str:
    return json.dumps(tree, sort_keys=True)


def _differs(one: Any, other: Any) -> str:
    if isinstance(one, dict) and isinstance(other, dict):
        for name in one.keys() | other.keys():
            if one.get(name) != other.get(name):
                return f"{name}: {_differs(one.get(name), other.get(name))}"
    return f"{one!r} and {other!r}"


def _digest(value: torch.Tensor) -> str:
    flat = value.contiguous().reshape(-1).cpu()
    return hashlib.blake2b(flat.view(torch.uint8).numpy().data, digest_size=16).hexdigest()
