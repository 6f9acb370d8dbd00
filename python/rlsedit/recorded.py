"""Streams in a file: keys, targets, noise and prior of each layer of a real run, as safetensors."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from rlsedit_kernels.diagnostics.streams import Batch, Stream
from rlsedit_kernels.priors import Prior

SCHEMA = "rlsedit-stream/1"

_SCALARS = ("lam", "mu", "l2")


def save_streams(path: Path, layers: Mapping[int, tuple[Prior, Sequence[Batch]]], note: str = "") -> None:
    """Write the batches of each layer, and the prior they start from.

    Args:
        path: the file, `.safetensors`.
        layers: by layer; targets are those of W - W_0, so that a stream starts from a zero weight.
        note: a line on where they come from.

    Raises:
        ValueError: no layer, or a layer without batches.
        ImportError: safetensors is not installed.
    """
    save_file = _safetensors().save_file
    if not layers or not all(batches for _, batches in layers.values()):
        raise ValueError("save_streams: layers must hold at least one layer with at least one batch each, got none")
    tensors: dict[str, torch.Tensor] = {}
    described: dict[str, Any] = {}
    for layer, (prior, batches) in layers.items():
        tensors[f"{layer}.K"] = torch.cat([batch.K.to("cpu", torch.float32) for batch in batches])
        tensors[f"{layer}.V"] = torch.cat([batch.V.to("cpu", torch.float32) for batch in batches])
        tensors |= {f"{layer}.prior.{name}": array.to("cpu").contiguous() for name, array in prior.arrays.items()}
        described[str(layer)] = {
            "prior": {"kind": prior.kind, "d": prior.d, "arrays": sorted(prior.arrays)}
            | {name: value for name in _SCALARS if (value := getattr(prior, name)) is not None},
            "sizes": [len(batch.K) for batch in batches],
            "noise": [batch.noise for batch in batches],
            "forget": [batch.forget for batch in batches],
        }
    header = {"schema": SCHEMA, "note": note, "layers": json.dumps(described)}
    save_file(tensors, str(path), metadata=header)


def load_streams(path: Path) -> dict[int, Stream]:
    """The streams of a file that `save_streams` wrote, by layer.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file is not of the schema `SCHEMA`, or is damaged.
        ImportError: safetensors is not installed.
    """
    package = _safetensors()
    if not path.is_file():
        raise FileNotFoundError(f"load_streams: no file {path}")
    try:
        with package.safe_open(str(path), framework="pt") as file:
            header = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except Exception as error:
        raise ValueError(f"load_streams: {path.name} must be a safetensors file: {error}") from None
    if header.get("schema") != SCHEMA:
        raise ValueError(f"load_streams: {path.name} must have the schema {SCHEMA!r}, got {header.get('schema')!r}")
    try:
        described = json.loads(header["layers"])
        return {int(layer): _stream(path, layer, entry, tensors, header) for layer, entry in described.items()}
    except (KeyError, TypeError, RuntimeError) as error:
        raise ValueError(f"load_streams: {path.name} is damaged: {error}") from None


def _stream(
    path: Path, layer: str, entry: Mapping[str, Any], tensors: Mapping[str, torch.Tensor], header: Mapping[str, str]
) -> Stream:
    given = entry["prior"]
    arrays = {name: tensors[f"{layer}.prior.{name}"].to(torch.float64) for name in given["arrays"]}
    scalars = {name: float(given[name]) for name in _SCALARS if name in given}
    eps = float(torch.finfo(torch.float32).eps) if given["kind"] == "anchor" else 0.0
    prior = Prior(given["kind"], int(given["d"]), arrays, given_eps=eps, **scalars)
    K, V = tensors[f"{layer}.K"], tensors[f"{layer}.V"]
    sizes, noise, forget = entry["sizes"], entry["noise"], entry["forget"]
    if K.shape != (sum(sizes), prior.d) or len(V) != len(K) or not len(sizes) == len(noise) == len(forget):
        raise ValueError(
            f"load_streams: {path.name} is damaged: layer {layer} has keys {tuple(K.shape)} for {sum(sizes)}"
        )

    def batches() -> Iterator[Batch]:
        for keys, targets, nu, beta in zip(K.split(sizes), V.split(sizes), noise, forget, strict=True):
            yield Batch(keys, targets, float(nu), float(beta))

    summary = f"layer {layer}, {len(sizes)} batches" + (f": {header['note']}" if header.get("note") else "")
    return Stream(
        f"{path.stem}, layer {layer}", summary, prior, torch.zeros(prior.d, V.shape[1], device="cpu"), batches
    )


def _safetensors() -> Any:
    try:
        import safetensors
        import safetensors.torch
    except ImportError:
        raise ImportError("recorded streams need safetensors: pip install safetensors") from None

    class _Package:
        safe_open = staticmethod(safetensors.safe_open)
        save_file = staticmethod(safetensors.torch.save_file)

    return _Package
