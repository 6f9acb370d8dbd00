"""Checkpoints of sharded states: written by all ranks at once, read by any other number of ranks, whole or not there.

A checkpoint is a folder `step-0000000012` in the format of `torch.distributed.checkpoint` (one file a rank and
`.metadata`) with a manifest beside it: structure of the states, step, extra, and size and digest of every file. It is
written under another name, synced, and gets its own by one rename on rank 0 once all ranks have said that their part is
on the disk. Plans, files and metadata are torch's; they travel through `Ranks`, so that a rank that fails is heard of.
"""

from __future__ import annotations

import json
import logging
import pickle
import shutil
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch.distributed.checkpoint import FileSystemWriter
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner

from rlsedit_kernels.distributed import disk as disks
from rlsedit_kernels.distributed import layout, reading
from rlsedit_kernels.distributed.disk import DISK, Disk
from rlsedit_kernels.distributed.exchange import announce, exchange, position, together
from rlsedit_kernels.distributed.ranks import Ranks

__all__ = ["Checkpoint", "Saved", "latest", "load", "save"]

logger = logging.getLogger(__name__)

FORMAT = 1
"""Of the manifest."""


class Saved(Protocol):
    """What can be in a checkpoint: the states of this package, sharded or not, and whatever has these methods."""

    def state_dict(self) -> dict[str, Any]:
        """Tensors (DTensor where they are sharded) and plain values, in dictionaries and lists."""

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Restore what `state_dict` gave, or raise and change nothing."""


@dataclass(frozen=True)
class Checkpoint:
    """What `load` found.

    Attributes:
        step: as given to `save`.
        extra: as given to `save`.
        path: its folder.
    """

    step: int
    extra: Any
    path: Path


def latest(folder: Path | str, *, ranks: Ranks | None = None) -> int | None:
    """The step of the newest checkpoint in `folder`, the same on all ranks; None if there is none.

    Args:
        folder: of the checkpoints.
        ranks: who asks; all of them call this. None for a process alone.
    """
    with together(ranks, "latest"):
        steps = disks.steps_in(Path(folder)) if position(ranks)[0] == 0 else []
    return json.loads(announce(ranks, json.dumps(steps[-1] if steps else None).encode()))


def save(
    folder: Path | str,
    states: Mapping[str, Saved],
    *,
    step: int,
    weights: Mapping[str, torch.Tensor] | None = None,
    extra: Any = None,
    keep: int = 2,
    ranks: Ranks | None = None,
    disk: Disk = DISK,
) -> Path:
    """Write a checkpoint; when this returns, it is on the medium and whole.

    All ranks call this with the same `step`. A sharded state stands under one name on all ranks. A plain state stands
    where it lives; where several ranks have it, it must be the same to the bit. A process that is killed in here
    leaves the former checkpoints as they are.

    Args:
        folder: on a file system that all ranks see; made if it is not there.
        states: by name (of a layer, of an expert); names are text without "/".
        step: >= 0, larger than that of any checkpoint in `folder`; the number of batches in the stream, say.
        weights: by name; a DTensor of any mesh and placement, or a tensor where it lives.
        extra: plain JSON values, the position in the stream, say; the same on all ranks, or None on all but rank 0.
        keep: >= 1, how many checkpoints stay in `folder`; older ones are removed.
        ranks: who saves. None: those of the first sharded state, otherwise this process alone.
        disk: for tests.

    Returns:
        The folder of the checkpoint.

    Raises:
        ValueError, TypeError: an argument does not fit, or differs between ranks.
        OSError: a part could not be written, on the rank that met it.
        RankError: another rank could not do its part, or is gone.
    """
    ranks = _whose(ranks, states)
    rank, _ = position(ranks)
    folder, part, plans = Path(folder), layout.Part(), DefaultSavePlanner()
    with together(ranks, "save"):
        _check_names("save", states, weights)
        _check_numbers(step, keep)
        layout.plain_json("extra", extra)
        for name, state in states.items():
            layout.apart(part, name, state.state_dict())
        layout.take_weights(part, weights or {})
        plans.set_up_planner(part.tensors, is_coordinator=rank == 0)
        header = {**part.header(), "step": step, "extra": extra}
        mine = pickle.dumps((json.dumps(header), plans.create_local_plan()))
    everyone = [pickle.loads(data) for data in exchange(ranks, mine)]
    headers = [json.loads(text) for text, _ in everyone]
    begun = b""
    with together(ranks, "save"):
        _check_same(headers)
        trees, facts = layout.merged(headers)
        if rank == 0:
            aside = _begin(folder, step, disk)
            all_plans, metadata = plans.create_global_plan([plan for _, plan in everyone])
            all_plans = FileSystemWriter(aside).prepare_global_plan(all_plans)
            begun = pickle.dumps((aside.name, all_plans))
    name, all_plans = pickle.loads(announce(ranks, begun))
    aside = folder / name
    with together(ranks, "save"):
        written = _write(aside, all_plans[rank], plans, disk)
    parts = [pickle.loads(data) for data in exchange(ranks, pickle.dumps(written))]
    final = disks.folder_of(folder, step)
    with together(ranks, "save"):
        if rank == 0:
            FileSystemWriter(aside).finish(metadata, [results for results, _ in parts])
            files = {name: about for _, mine in parts for name, about in mine.items()}
            files[".metadata"] = _about(aside / ".metadata")
            content = {"format": FORMAT, "step": step, "extra": headers[0]["extra"], "states": trees,
                       "tensors": facts, "files": files}  # fmt: skip
            disk.write(aside / disks.MANIFEST, disks.manifest_bytes(content))
            disk.sync(aside)
            disk.publish(aside, final)
            _thin(folder, keep, disk)
    return final


def load(
    folder: Path | str,
    states: Mapping[str, Saved],
    *,
    weights: Mapping[str, torch.Tensor] | None = None,
    step: int | None = None,
    strict: bool = True,
    ranks: Ranks | None = None,
) -> Checkpoint:
    """Restore states and weights from a checkpoint, at any number of ranks, to the bit; or raise and change nothing.

    All ranks call this. A sharded state reads the rows of this rank, a plain one all of them, whichever of the two
    was saved; a plain state may be asked for by any rank, whoever had it before.

    Args:
        folder: as for `save`.
        states: by the names they were saved under, made with the same priors and dtypes.
        weights: by name, filled in place; shape and dtype as they were saved, placement as it is now.
        step: of an older checkpoint; None for the newest.
        strict: whether something in the checkpoint that no rank asks for is an error.
        ranks: as for `save`.

    Raises:
        FileNotFoundError: there is no checkpoint (of this step) in `folder`.
        CheckpointError: a file of it is damaged, missing or foreign; the text names it.
        ValueError: prior, shape, dtype or names do not fit.
        RankError: one of these happened on another rank, or a rank is gone.
    """
    ranks, folder = _whose(ranks, states), Path(folder)
    with together(ranks, "load"):
        _check_names("load", states, weights)
    newest = latest(folder, ranks=ranks) if step is None else step
    with together(ranks, "load"):
        path = _found(folder, newest, step)
        content, digest = disks.read_manifest(path)
        if content["format"] != FORMAT:
            raise ValueError(f"load: {path / disks.MANIFEST} must have format {FORMAT}, got {content['format']!r}")
    asked = {"digest": digest, "sharded": [n for n in sorted(states) if reading.sharded(states[n])],
             "names": sorted(states), "weights": sorted(weights or {})}  # fmt: skip
    everyone = [json.loads(data) for data in exchange(ranks, json.dumps(asked).encode())]
    with together(ranks, "load"):
        reading.check_asked(path, content, everyone, strict=strict)
        rank, size = position(ranks)
        disks.verify(path, content["files"], rank, size)
    with together(ranks, "load"):
        found, new_weights = reading.read(path, content, states, weights or {}, ranks)
    reading.restore(states, found, ranks)
    with together(ranks, "load"), torch.no_grad():
        for name, weight in (weights or {}).items():
            reading.local(weight).copy_(reading.local(new_weights[name]))
    return Checkpoint(content["step"], content["extra"], path)


def _write(aside: Path, plan: Any, plans: DefaultSavePlanner, disk: Disk) -> tuple[list[Any], dict[str, Any]]:
    """Write this rank's file; torch's account of it, and size and digest by name."""
    if not aside.is_dir():
        raise OSError(f"save: this rank does not see {aside}, which rank 0 has made: folder must be on a file system "
                      "that all ranks share")  # fmt: skip
    disk.reached("begun")
    results = FileSystemWriter(aside).write_data(plans.finish_plan(plan), plans).wait()
    disk.reached("written")
    names = sorted({result.storage_data.relative_path for result in results})
    about = {name: _about(aside / name) for name in names}
    for path in aside.glob(f"{plan.storage_data.prefix}*"):
        if path.name not in about:  # a rank without a part leaves an empty file
            path.unlink()
    disk.sync(aside)
    disk.reached("synced")
    return results, about


def _about(path: Path) -> dict[str, Any]:
    return {"bytes": path.stat().st_size, "digest": disks.digest_of(path)}


def _begin(folder: Path, step: int, disk: Disk) -> Path:
    """A folder to write in, on rank 0; what killed saves have left is removed."""
    folder.mkdir(parents=True, exist_ok=True)
    steps = disks.steps_in(folder)
    if steps and step <= steps[-1]:
        raise ValueError(f"save: step must be larger than {steps[-1]}, the newest checkpoint in {folder}, got {step}; "
                         "to go back to an older one remove those behind it")  # fmt: skip
    for left in disks.leftovers(folder):
        logger.info("removing %s, which a save has left unfinished", left)
        shutil.rmtree(left)
    aside = disks.aside_of(folder, step, uuid.uuid4().hex[:8])
    aside.mkdir()
    disk.reached("made")
    return aside


def _thin(folder: Path, keep: int, disk: Disk) -> None:
    """Remove old checkpoints; a failure is logged only, since the new one is there."""
    for step in disks.steps_in(folder)[:-keep]:
        try:
            disk.discard(disks.folder_of(folder, step))
        except OSError as error:
            logger.warning("an old checkpoint could not be removed: %s", error)


def _found(folder: Path, newest: int | None, asked: int | None) -> Path:
    if newest is None:
        raise FileNotFoundError(f"load: there is no checkpoint in {folder}")
    path = disks.folder_of(folder, newest)
    if asked is not None and not path.is_dir():
        steps = ", ".join(map(str, disks.steps_in(folder))) or "none"
        raise FileNotFoundError(f"load: there is no checkpoint of step {asked} in {folder}; there are: {steps}")
    return path


def _whose(ranks: Ranks | None, states: Mapping[str, Saved]) -> Ranks | None:
    for state in states.values() if isinstance(states, Mapping) else ():
        if ranks is None and reading.sharded(state):
            return state.ranks  # type: ignore[attr-defined]
    if ranks is None and dist.is_initialized() and dist.get_world_size() > 1:
        raise ValueError("checkpoint: ranks must be given where no state is sharded: Ranks(), for all processes")
    return ranks


def _check_names(op: str, states: Mapping[str, Saved], weights: Mapping[str, torch.Tensor] | None) -> None:
    for what, names in (("states", states), ("weights", weights or {})):
        if not isinstance(names, Mapping):
            raise TypeError(f"{op}: {what} must be a mapping from names, got {type(names).__name__}")
        for name in names:
            if not isinstance(name, str) or not name or "/" in name:
                raise ValueError(f"{op}: names of {what} must be text without '/', got {name!r}")
    for name, weight in (weights or {}).items():
        if not isinstance(weight, torch.Tensor):
            raise TypeError(f"{op}: weight {name!r} must be a tensor, got {type(weight).__name__}")


def _check_numbers(step: int, keep: int) -> None:
    for name, value, least in (("step", step, 0), ("keep", keep, 1)):
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"save: {name} must be an int, got {type(value).__name__}")
        if value < least:
            raise ValueError(f"save: {name} must be >= {least}, got {value}")


def _check_same(headers: list[dict[str, Any]]) -> None:
    """Step and extra of all ranks."""
    for rank, header in enumerate(headers):
        if header["step"] != headers[0]["step"]:
            raise ValueError(f"save: step must be the same on all ranks, got {headers[0]['step']} on rank 0 and "
                             f"{header['step']} on rank {rank}")  # fmt: skip
        if header["extra"] is not None and header["extra"] != headers[0]["extra"]:
            raise ValueError(f"save: extra must be the same on all ranks, or None on all but rank 0; got "
                             f"{headers[0]['extra']!r} on rank 0 and {header['extra']!r} on rank {rank}")  # fmt: skip
