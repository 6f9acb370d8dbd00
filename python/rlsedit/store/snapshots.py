"""Snapshots: weights and states of all layers behind one record, so that a resume repeats only what came after.

A file for each layer, written tensor by tensor (one layer's state is copied at a time), then a manifest that names them
with their hashes: without its manifest a snapshot is not there.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import tensors as files
from .errors import StoreError
from .files import Disk, intact, put, stem_of
from .index import Index
from .packing import pack, unpack

__all__ = ["KEPT", "Manifest", "Snapshots"]

logger = logging.getLogger(__name__)

FORMAT = 1
KEPT = 2
"""Snapshots that stay: should the last one be damaged, there is the one before."""


@dataclass(frozen=True)
class Manifest:
    """What a snapshot consists of.

    Attributes:
        path: of the manifest.
        number: of the record behind which it was taken.
        top: hash of that record.
        depth: number of steps that counted then; with `number` on top of them the snapshot stands for a stack.
        files: name of the file of each layer.
        trees: what `packing.pack` gave for each layer.
    """

    path: Path
    number: int
    top: str
    depth: int
    files: Mapping[int, str]
    trees: Mapping[int, Any]

    def fits(self, index: Index) -> bool:
        """Whether the steps that it stands for still are the first ones that count."""
        if not 0 < self.depth <= len(index.stack):
            return False
        top = index.stack[self.depth - 1]
        return top.number == self.number and top.digest == self.top


class Snapshots:
    """The snapshots of a folder.

    Args:
        folder: where they are.
        disk: how they are written.
    """

    def __init__(self, folder: Path, disk: Disk) -> None:
        self.folder, self._disk = folder, disk

    def write(self, index: Index, layers: Mapping[int, tuple[Tensor, object]]) -> None:
        """Take one behind the last step of `index`, and prune the old ones.

        Args:
            index: of the stream.
            layers: weight (d, v) in the precision of the edit, and state, of each layer.

        Raises:
            OSError: it cannot be written; those that are there stay.
        """
        number, depth = index.stack[-1].number, len(index.stack)
        trees, names = {}, {}
        for n, (weight, state) in layers.items():
            parts: dict[str, Tensor] = {"weight": weight}
            trees[str(n)] = pack(state, "state", parts)
            path = put(
                self._disk, self.folder, f"{number:06d}-layer-{n:03d}", ".safetensors", files.blocks(parts, None)
            )
            del parts
            names[str(n)] = path.name
            self._disk.reached("layer of a snapshot")
        content = {
            "format": FORMAT, "number": number, "top": index.stack[-1].digest, "depth": depth, "files": names,
            "trees": trees,
        }  # fmt: skip
        put(self._disk, self.folder, f"{number:06d}-snapshot", ".json", [json.dumps(content).encode()])
        self._disk.reached("snapshot")
        self.prune()

    def prune(self) -> None:
        """Keep the last `KEPT` whole manifests and their files; remove everything else."""
        manifests = [manifest for manifest, _ in self.manifests() if manifest is not None]
        kept = {manifest.path.name for manifest in manifests[:KEPT]}
        kept |= {name for manifest in manifests[:KEPT] for name in manifest.files.values()}
        others = [path for path in self.folder.iterdir() if path.name not in kept]
        for path in sorted(others, key=lambda path: path.suffix != ".json"):  # a manifest before its files
            with suppress(OSError):
                self._disk.remove(path)

    def manifests(self) -> Iterator[tuple[Manifest | None, str]]:
        """Newest first; None with what is wrong for one that is damaged."""
        for path in sorted(self.folder.glob("*-snapshot-*.json"), reverse=True):
            yield _manifest(path)

    def wrong(self) -> list[str]:
        """What is damaged, one line for each file."""
        found, named = [], set()
        for manifest, problem in self.manifests():
            if manifest is None:
                found.append(problem)
                continue
            for name in manifest.files.values():
                named.add(name)
                if not intact(self.folder / name):
                    missing = not (self.folder / name).exists()
                    found.append(f"{self.folder / name}: {'is missing' if missing else 'content and hash differ'}")
        for path in sorted(self.folder.iterdir()):
            stem = stem_of(path)
            if path.name.startswith(".") or path.name in named or (stem or "").endswith("-snapshot"):
                continue
            if not intact(path):
                found.append(f"{path}: content and hash differ")
        return found

    def load(self, manifest: Manifest, layer: int, fresh: object, device: torch.device) -> tuple[Tensor, Any]:
        """Weight and state of a layer.

        Raises:
            StoreError: a file is damaged, or does not fit the method (`packing.RootChanged`: or the machine).
        """
        path = self.folder / manifest.files[layer]
        if not intact(path):
            raise StoreError(f"{path}: content and hash differ")
        parts = files.read(path, device)
        return parts["weight"], unpack(manifest.trees[layer], parts, fresh)


def _manifest(path: Path) -> tuple[Manifest | None, str]:
    if not intact(path):
        return None, f"{path}: content and hash differ"
    content = json.loads(path.read_bytes())
    if content.get("format") != FORMAT:
        return None, f"{path}: format must be {FORMAT}, got {content.get('format')!r}"
    names = {int(n): name for n, name in content["files"].items()}
    trees = {int(n): tree for n, tree in content["trees"].items()}
    return Manifest(path, content["number"], content["top"], content["depth"], names, trees), ""
