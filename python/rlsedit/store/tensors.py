"""safetensors files written as a stream of blocks, and read into memory of one's own; strides come back as they were.

A product of the same numbers in another memory layout may round otherwise, so the layout is part of the bits: a
matrix whose transpose is contiguous is stored transposed, and named in the metadata.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from .errors import StoreError

__all__ = ["blocks", "checksum", "plain", "read", "read_metadata"]

_NAMES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
    torch.int32: "I32", torch.bool: "BOOL",
}  # fmt: skip
_ELEMENTS = 1 << 21  # of one block


def blocks(tensors: Mapping[str, Tensor], metadata: object) -> Iterator[bytes]:
    """A safetensors file of `tensors` (any device) with JSON-ready `metadata`, at most 16 MiB at a time."""
    flat = {name: value.mT if _transposed(value) else value for name, value in tensors.items()}
    turned = sorted(name for name, value in tensors.items() if _transposed(value))
    header: dict[str, object] = {"__metadata__": {"content": json.dumps(metadata), "transposed": json.dumps(turned)}}
    end = 0
    for name, value in flat.items():
        begin, end = end, end + value.numel() * value.element_size()
        header[name] = {"dtype": _NAMES[value.dtype], "shape": list(value.shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    yield len(text).to_bytes(8, "little") + text
    for value in flat.values():
        line = value.detach().reshape(-1)
        for i in range(0, line.numel(), _ELEMENTS):
            part = line[i : i + _ELEMENTS].to("cpu").contiguous()
            yield part.view(torch.uint8).numpy().tobytes()


def read(path: Path, device: torch.device | str = "cpu") -> dict[str, Tensor]:
    """All tensors of a file, each in fresh memory with the strides it was written with.

    Raises:
        StoreError: the file is not there or not whole.
    """
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            turned = set(json.loads((file.metadata() or {}).get("transposed", "[]")))
            found = {name: _fresh(file.get_tensor(name), device) for name in file.keys()}  # noqa: SIM118
    except Exception as error:  # the library raises its own class for a broken header
        raise StoreError(f"{path}: cannot be read: {error}") from None
    return {name: value.mT if name in turned else value for name, value in found.items()}


def read_metadata(path: Path) -> object:
    """What `blocks` was given as metadata.

    Raises:
        StoreError: the file is not there or not whole.
    """
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            return json.loads((file.metadata() or {})["content"])
    except Exception as error:
        raise StoreError(f"{path}: cannot be read: {error}") from None


def plain(value: Tensor) -> Tensor:
    """The same numbers, row-major in memory of their own, strides of single rows included."""
    return torch.empty(value.shape, dtype=value.dtype, device=value.device).copy_(value)


def checksum(value: Tensor) -> str:
    """Hash (BLAKE2b, 32 hex digits) of the bits of (n, m) row by row, whatever its strides."""
    digest = hashlib.blake2b(digest_size=16)
    step = max(1, _ELEMENTS // max(1, value.shape[1]))
    for i in range(0, len(value), step):
        part = value[i : i + step].detach().to("cpu").contiguous().reshape(-1)
        digest.update(part.view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _transposed(value: Tensor) -> bool:
    return value.ndim == 2 and not value.is_contiguous() and value.mT.is_contiguous()


def _fresh(value: Tensor, device: torch.device | str) -> Tensor:
    return torch.empty(value.shape, dtype=value.dtype, device=device).copy_(value)
