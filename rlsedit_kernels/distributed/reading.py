"""Reading a checkpoint into tensors as this number of ranks needs them, and states from these."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.tensor import DTensor

from rlsedit_kernels.distributed import layout
from rlsedit_kernels.distributed.exchange import together
from rlsedit_kernels.distributed.ranks import Ranks, bounds
from rlsedit_kernels.errors import CheckpointError

_ROWS = ("tensors/C", "tensors/A", "tensors/matrix", "tensors/basis", "/restriction")
"""What a plain state saves whole and a sharded one takes as rows."""

__all__ = ["check_asked", "local", "read", "restore", "sharded"]


def sharded(state: object) -> bool:
    """Whether a state has its rows on several ranks, so that all of them have to load it."""
    return isinstance(getattr(state, "ranks", None), Ranks)


def local(tensor: torch.Tensor) -> torch.Tensor:
    """This rank's part."""
    tensor = tensor.detach()
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def check_asked(path: Path, content: dict[str, Any], everyone: list[dict[str, Any]], *, strict: bool) -> None:
    """All ranks have read the same manifest, and ask for what it has; with `strict`, for all of it.

    Raises:
        ValueError, CheckpointError: with the names.
    """
    for rank, asked in enumerate(everyone):
        if asked["digest"] != everyone[0]["digest"]:
            raise CheckpointError(f"load: rank {rank} sees another {path / 'manifest.json'} than rank 0")
        if asked["sharded"] != everyone[0]["sharded"]:
            raise ValueError(f"load: all ranks must ask for the same sharded states, got {everyone[0]['sharded']} on "
                             f"rank 0 and {asked['sharded']} on rank {rank}")  # fmt: skip
    weights = {key.removeprefix("weights/") for key in content["tensors"] if key.startswith("weights/")}
    for kind, there, wanted in (
        ("state", set(content["states"]), {name for asked in everyone for name in asked["names"]}),
        ("weight", weights, {name for asked in everyone for name in asked["weights"]}),
    ):
        if wanted - there:
            raise ValueError(f"load: {path} has no {kind} {_listed(wanted - there)}; it has {_listed(there)}")
        if strict and there - wanted:
            raise ValueError(f"load: no rank asks for the {kind} {_listed(there - wanted)} of {path}; give it, or say "
                             "strict=False")  # fmt: skip


def read(
    path: Path,
    content: dict[str, Any],
    states: Mapping[str, Any],
    weights: Mapping[str, torch.Tensor],
    ranks: Ranks | None,
) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """What `load_state_dict` of each state takes, and weights like those given; nothing is sent.

    Raises:
        ValueError: a weight has another shape or dtype.
        CheckpointError: the files are not what the manifest says.
    """
    facts = content["tensors"]
    wanted: dict[str, torch.Tensor] = {}
    for name, state in states.items():
        for key in layout.keys_of(content["states"][name]):
            wanted[key] = _room(key, facts[key], state, ranks)
    for name, weight in weights.items():
        key = f"weights/{name}"
        have, saved = (list(weight.shape), str(weight.dtype)), (facts[key]["shape"], facts[key]["dtype"])
        if have != saved:
            raise ValueError(f"load: weight {name!r} must be {saved[1]} of shape {tuple(saved[0])} as it was saved, "
                             f"got {have[1]} of {tuple(have[0])}")  # fmt: skip
        wanted[key] = torch.empty_like(weight.detach())
    _fill(path, facts, wanted)
    found = {name: layout.rebuilt(content["states"][name], wanted) for name in states}
    for name, state in states.items():
        if not sharded(state):
            _turn_factor(found[name])
    return found, {name: wanted[f"weights/{name}"] for name in weights}


def restore(states: Mapping[str, Any], found: Mapping[str, Any], ranks: Ranks | None) -> None:
    """Restore all states, or none: each is tried on a copy first.

    Sharded states may talk to each other while they load, and do so one by one in the order of their names.
    """
    plain = [name for name in sorted(states) if not sharded(states[name])]
    rows = [name for name in sorted(states) if sharded(states[name])]
    for name in rows:
        _try(name, states[name], found[name])
    with together(ranks, "load"):
        for name in plain:
            _try(name, states[name], found[name])
    for name in rows + plain:
        states[name].load_state_dict(found[name])


def _try(name: str, state: Any, found: Any) -> None:
    twin = state.clone() if hasattr(state, "clone") else copy.deepcopy(state)
    try:
        twin.load_state_dict(found)
    except ValueError as error:
        raise ValueError(f"load: state {name!r}: {error}; nothing was changed") from error


def _room(key: str, fact: dict[str, Any], state: object, ranks: Ranks | None) -> torch.Tensor:
    """An empty tensor as this state keeps it: rows of this rank, or all."""
    shape, dtype = tuple(fact["shape"]), getattr(torch, fact["dtype"].removeprefix("torch."))
    dim = fact["shard"]
    if dim is None and key.endswith(_ROWS):
        dim = 0
    if not sharded(state) or dim is None:
        return _empty(shape, dtype, fact["columns"])
    owner: Ranks = state.ranks  # type: ignore[attr-defined]
    edges = bounds(shape[dim], owner.size)
    mine = list(shape)
    mine[dim] = edges[owner.rank + 1] - edges[owner.rank]
    return owner.dtensor(_empty(mine, dtype, fact["columns"]).to(owner.device), shape[dim], dim)


def _empty(shape: Sequence[int], dtype: torch.dtype, columns: bool) -> torch.Tensor:
    """With rows contiguous in memory, or columns."""
    return torch.empty(tuple(reversed(shape)), dtype=dtype).mT if columns else torch.empty(tuple(shape), dtype=dtype)


def _turn_factor(saved: Any) -> None:
    """The factor of a `ShardedSquareRootState`, L = R', as a `SquareRootState` saves it."""
    tensors = saved.get("tensors") if isinstance(saved, dict) else None
    if not isinstance(tensors, dict) or "L" not in tensors or "R" in tensors:
        return
    tensors["R"] = tensors.pop("L").mT.contiguous()


def _fill(path: Path, facts: dict[str, Any], wanted: dict[str, torch.Tensor]) -> None:
    """Read this rank's parts of the wanted tensors."""
    reader, planner = FileSystemReader(path), DefaultLoadPlanner()
    metadata = reader.read_metadata()
    for key, fact in facts.items():
        entry = metadata.state_dict_metadata.get(key)
        if not isinstance(entry, TensorStorageMetadata):
            raise CheckpointError(f"load: {path / '.metadata'} has no tensor {key}, which the manifest has")
        if list(entry.size) != fact["shape"] or str(entry.properties.dtype) != fact["dtype"]:
            raise CheckpointError(f"load: {path / '.metadata'} has {key} as {entry.properties.dtype} of "
                                  f"{list(entry.size)}, {path.name} as {fact['dtype']} of {fact['shape']}")  # fmt: skip
        if sum(math.prod(chunk.sizes) for chunk in entry.chunks) != math.prod(entry.size):
            raise CheckpointError(f"load: {path / '.metadata'} does not have all of {key}")
    planner.set_up_planner(wanted, metadata, is_coordinator=True)
    reader.set_up_storage_reader(metadata, is_coordinator=True)
    plan = reader.prepare_local_plan(planner.create_local_plan())
    reader.read_data(planner.finish_plan(plan), planner).wait()


def _listed(names: set[str]) -> str:
    return ", ".join(map(repr, sorted(names))) or "none"
