"""A model folder on disk: which tensor lies where, read one at a time and byte for byte."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..store.modelfiles import unfinished

__all__ = ["DTYPES", "Checkpoint", "Entry"]

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""Floating-point dtypes of safetensors that hold weights as they are."""

_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"
_HEADER = 100_000_000  # bytes; the limit of the format
_CHUNK = 1 << 24


@dataclass(frozen=True)
class Entry:
    """A tensor of a safetensors file.

    Attributes:
        name: its name in the file.
        file: where it lies.
        code: dtype as the format writes it, such as "BF16".
        shape: its shape.
        start, stop: its bytes in the file.
    """

    name: str
    file: Path
    code: str
    shape: tuple[int, ...]
    start: int
    stop: int


class Checkpoint:
    """The safetensors files of a model folder, sharded or not. Nothing is kept in memory but the headers.

    Args:
        folder: with config.json and model.safetensors, or an index and its shards.

    Raises:
        FileNotFoundError: no folder, no config.json, or a shard that the index names is missing.
        ValueError: no safetensors, a quantised model, or a file that is truncated or not safetensors.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)
        if not self.folder.is_dir():
            raise FileNotFoundError(f"model: {self.folder} is no folder")
        self.config = _config(self.folder)
        self.files = _weight_files(self.folder)
        self.entries: dict[str, Entry] = {}
        for file in self.files:
            for entry in _read_header(file):
                if entry.name in self.entries:
                    raise ValueError(f"model: {entry.name} is in {file.name} and {self.entries[entry.name].file.name}")
                self.entries[entry.name] = entry

    def __repr__(self) -> str:
        return f"Checkpoint({str(self.folder)!r}: {len(self.entries)} tensors in {len(self.files)} files)"

    def tensor(self, name: str) -> Tensor:
        """A copy of the tensor, in the dtype and layout of the file.

        Raises:
            ValueError: a dtype that is not floating point.
        """
        entry = self.entries[name]
        if entry.code not in DTYPES:
            raise ValueError(
                f"model: {name} must be one of {sorted(DTYPES)}, got {entry.code}; needs unquantised weights"
            )
        with entry.file.open("rb") as stream:
            stream.seek(entry.start)
            data = bytearray(stream.read(entry.stop - entry.start))
        return torch.frombuffer(data, dtype=DTYPES[entry.code]).reshape(entry.shape)

    def digest(self, name: str) -> str:
        """SHA-256 of the tensor's bytes, in hexadecimal."""
        digest = hashlib.sha256()
        for chunk in _chunks(self.entries[name]):
            digest.update(chunk)
        return digest.hexdigest()

    def same_bytes(self, name: str, other: Checkpoint, other_name: str) -> bool:
        """Whether two tensors hold the same bytes in the same dtype and shape."""
        mine, theirs = self.entries[name], other.entries[other_name]
        if (mine.code, mine.shape) != (theirs.code, theirs.shape):
            return False
        if mine.start == theirs.start and mine.file.samefile(theirs.file):
            return True
        return all(a == b for a, b in zip(_chunks(mine), _chunks(theirs), strict=True))

    def has_copy(self, name: str) -> bool:
        """Whether another tensor of this folder holds the same bytes, as a tied weight that was saved twice does."""
        entry = self.entries[name]
        return any(
            other.name != name and other.shape == entry.shape and self.same_bytes(name, self, other.name)
            for other in self.entries.values()
        )


def _config(folder: Path) -> dict[str, Any]:
    file = folder / "config.json"
    if not file.is_file():
        if told := unfinished(folder):
            raise FileNotFoundError(told)
        raise FileNotFoundError(f"model: {folder} has no config.json; needs a folder that save_pretrained wrote")
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, UnicodeDecodeError) as error:
        raise ValueError(f"model: {file} is no JSON: {error}") from None
    if not isinstance(config, dict):
        raise ValueError(f"model: {file} must hold an object, got {type(config).__name__}")
    if config.get("quantization_config"):
        kind = config["quantization_config"].get("quant_method", "some way")
        raise ValueError(
            f"model: {folder} is quantised ({kind}); needs the unquantised model: edit and export that, then quantise"
        )
    return config


def _weight_files(folder: Path) -> tuple[Path, ...]:
    if (folder / _SINGLE).is_file():
        return (folder / _SINGLE,)
    index = folder / _INDEX
    if not index.is_file():
        if any(folder.glob("pytorch_model*.bin")):
            raise ValueError(
                f"model: {folder} holds pytorch_model.bin, needs safetensors: convert it once with "
                f"AutoModelForCausalLM.from_pretrained(folder, dtype='auto').save_pretrained(another)"
            )
        raise ValueError(f"model: {folder} has neither {_SINGLE} nor {_INDEX}")
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise ValueError(f"model: {index} is no index of safetensors: {type(error).__name__} {error}") from None
    for name in names:
        if not isinstance(name, str) or Path(name).name != name:
            raise ValueError(f"model: {index} must name files of its folder, got {name!r}")
        if not (folder / name).is_file():
            raise FileNotFoundError(f"model: {folder / name} is missing; {index.name} names it")
    return tuple(folder / name for name in names)


def _read_header(file: Path) -> list[Entry]:
    """The header of the format: eight bytes of length, JSON, then the data; offsets count from behind the JSON."""
    size = file.stat().st_size
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if not 2 <= length <= min(_HEADER, size - 8):
            raise ValueError(f"model: {file} is no safetensors file, or cut off")
        try:
            header = json.loads(stream.read(length))
            header.pop("__metadata__", None)
            entries = [
                Entry(
                    name, file, str(value["dtype"]), tuple(int(n) for n in value["shape"]),
                    8 + length + int(value["data_offsets"][0]), 8 + length + int(value["data_offsets"][1]),
                )
                for name, value in header.items()
            ]  # fmt: skip
        except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
            raise ValueError(f"model: {file} has a header that is no safetensors header: {error}") from None
    for entry in entries:
        if not 8 + length <= entry.start <= entry.stop <= size:
            raise ValueError(f"model: {file} is cut off: {entry.name} ends at byte {entry.stop} of {size}")
        if entry.code in DTYPES and entry.stop - entry.start != math.prod(entry.shape) * DTYPES[entry.code].itemsize:
            raise ValueError(f"model: {file}: the bytes of {entry.name} do not fit its shape {entry.shape}")
    return entries


def _chunks(entry: Entry) -> Iterator[bytes]:
    with entry.file.open("rb") as stream:
        stream.seek(entry.start)
        left = entry.stop - entry.start
        while left > 0:
            chunk = stream.read(min(left, _CHUNK))
            if not chunk:
                raise ValueError(f"model: {entry.file} ended while {entry.name} was read")
            left -= len(chunk)
            yield chunk
