"""The edited model as a Hugging Face folder: the base's own files, with the edited bytes put in their places."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, uint8

from ..paths import atomic_directory
from .changes import Change, given, rounded
from .checkpoint import Checkpoint
from .fingerprint import config_fields, digest, fingerprint
from .structure import config_of
from .versions import versions

__all__ = ["REPORT", "check_target", "export_folder", "write_folder"]

REPORT = "rlsedit-export.json"
_WEIGHTS = {
    ".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".onnx", ".gguf", ".ot", ".npz",
}  # fmt: skip
_OURS = "rlsedit-"


def export_folder(
    base: str | os.PathLike[str],
    weights: Mapping[str | int, Tensor],
    out: str | os.PathLike[str],
    *,
    link: bool = False,
    replace: bool = False,
) -> Path:
    """Write a copy of a model folder with some of its weights replaced.

    Only the bytes of these weights differ: shards, index, tied weights, tokenizer and configuration are those of the
    base. The folder appears whole or not at all.

    Args:
        base: folder with safetensors, sharded or not.
        weights: by tensor name in the stored layout, or by layer in row form (d, v), in the stored dtype or a wider
            one, from which they are rounded once.
        out: folder to write.
        link: make hard links of the weight files that stay as they are. Saves their size on disk; but a program that
            later writes into one of them in place, as `cp` over it does, changes both models.
        replace: replace `out` if it is there.

    Raises:
        ValueError: a base without safetensors, a name that is not there, a wrong shape or dtype, a weight that is not
            finite, an `out` that holds something.
        OSError: it cannot be written.
    """
    checkpoint = Checkpoint(base)
    return write_folder(checkpoint, given(checkpoint, weights), out, link=link, replace=replace)


def write_folder(
    base: Checkpoint,
    changes: Sequence[Change],
    out: str | os.PathLike[str],
    *,
    link: bool = False,
    replace: bool = False,
    facts: Mapping[str, Any] | None = None,
) -> Path:
    """`export_folder` for changes found elsewhere; `facts` go into its report as they are."""
    target = check_target(out, replace, base.folder)
    touched = {base.entries[change.tensor].file for change in changes}
    rows = []
    with atomic_directory(target, replace=replace) as work:
        for file in _files(base):
            if link and file in base.files and file not in touched and _link(file, work / file.name):
                continue
            shutil.copyfile(file, work / file.name)  # follows links: the cache of a hub is links to blobs
        for change in changes:
            entry, value = base.entries[change.tensor], rounded(change)
            with (work / entry.file.name).open("r+b") as stream:
                stream.seek(entry.start)
                stream.write(value.reshape(-1).view(uint8).numpy().data)
            rows.append((change, base.digest(change.tensor), digest(value)))
        (work / REPORT).write_text(_report(base, rows, facts or {}), encoding="utf-8")
        for file in work.iterdir():
            _sync(file)
    return target


def check_target(out: str | os.PathLike[str], replace: bool, base: Path | None = None) -> Path:
    """The folder to write, checked not to hold anything, nor to be the base.

    Raises:
        ValueError: saying what is in the way.
    """
    target = Path(out)
    if target.exists() and not target.is_dir():
        raise ValueError(f"out: {target} is a file, needs a folder that is not there yet")
    if base is not None and target.exists() and target.samefile(base):
        raise ValueError(f"out: {target} is the base model itself; needs another folder")
    if target.is_dir() and any(target.iterdir()) and not replace:
        raise ValueError(f"out: {target} is not empty; needs another folder, or permission to replace it")
    return target


def _files(base: Checkpoint) -> list[Path]:
    """Weights, and what lies beside them; other copies of the weights would be stale and stay behind."""
    besides = [
        file
        for file in sorted(base.folder.iterdir())
        if file.is_file() and file.suffix not in _WEIGHTS and not file.name.startswith((".", _OURS))
    ]
    return [*base.files, *(file for file in besides if not _of_bin(file))]


def _of_bin(file: Path) -> bool:
    return file.name.startswith("pytorch_model.bin")


def _link(file: Path, target: Path) -> bool:
    try:
        os.link(file.resolve(), target)
    except OSError:  # another file system, or one without links
        return False
    return True


def _report(base: Checkpoint, rows: Sequence[tuple[Change, str, str]], facts: Mapping[str, Any]) -> str:
    config = config_fields(config_of(base.folder))
    content = {
        "kind": "hf",
        "base": {
            "name": base.folder.resolve().name,
            "sha256": fingerprint(config, [(c.parameter, _name(c), c.shape, before) for c, before, _ in rows]),
        },
        **facts,
        "tensors": [
            {"name": c.tensor, "dtype": _name(c), "shape": c.shape, "before": before, "after": after}
            for c, before, after in rows
        ],
        "versions": versions(),
    }
    return json.dumps(content, indent=1, ensure_ascii=False) + "\n"


def _name(change: Change) -> str:
    return str(change.dtype).removeprefix("torch.")


def _sync(file: Path) -> None:
    with file.open("rb") as stream:
        os.fsync(stream.fileno())
