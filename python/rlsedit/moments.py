"""Uncentred second moments E[k k'] of the inputs of edited modules, measured on text and cached on disk."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from .models.adapter import Adapter
from .models.replay import capture
from .parallel import OneProcess, digest
from .paths import atomic_save_tensors, check_cache, naming_cache
from .prompts import align

logger = logging.getLogger(__name__)

_NOT_THE_MODEL = ("_name_or_path", "transformers_version", "distributed_config")


def second_moments(
    model: nn.Module,
    tokenizer: Any,
    layers: Sequence[int],
    texts: Iterable[str],
    cache_dir: str | os.PathLike[str] | None = None,
    *,
    max_length: int = 256,
    max_tokens: int = 2048,
    adapter: Adapter | None = None,
) -> dict[int, Tensor]:
    """E[k k'] over the tokens of `texts` for the edited module of each layer.

        E[k k'] = 1/N sum_n k_n k_n'          (Meng et al. 2022, ROME, sec. 3.1)

    Args:
        model: a causal LM; its weights should be the unedited ones.
        tokenizer: its tokenizer.
        layers: layers wanted, at least one.
        texts: texts, each tokenised by itself; should hold several times d tokens (d: inputs of the module).
        cache_dir: where results are kept as safetensors; None for no cache. The key is a fingerprint of the model
            with the hash of the texts, of what the tokenizer makes of a sample of them, the layer, the module and
            `max_length`.
        max_length: longer texts are cut into pieces of this many tokens, and of no more than the model reads.
        max_tokens: token budget of one forward pass.
        adapter: for architectures that `Adapter.for_model` does not know.

    Returns:
        {layer: (d, d) float64, symmetric}.

    Raises:
        TypeError: texts that are one string.
        ValueError: no layers or such that the model does not have, no tokens, limits below 1, or activations that are
            not finite.
        OSError: the cache cannot be written; told before anything is measured where that can be seen.

    Numerics:
        Products and sums in float64.
    """
    adapter = adapter or Adapter.for_model(model)
    layers = sorted(set(layers))
    if not layers:
        raise ValueError("second_moments: layers must name at least one layer, got none")
    for n in layers:
        adapter.edited(n)  # refused here, before there are hooks
    if isinstance(texts, str):
        raise TypeError("second_moments: texts must be texts, got one string, whose letters would be taken for them")
    for name, limit in (("max_length", max_length), ("max_tokens", max_tokens)):
        if limit < 1:
            raise ValueError(f"second_moments: {name} must be at least 1, got {limit}")
    texts = list(texts)
    max_length = min(max_length, adapter.positions or max_length)
    files: dict[int, Path] = {}
    if cache_dir is not None:
        read = _text_hash([*texts, *_sample_ids(tokenizer, texts)])
        base = f"{fingerprint(model, adapter.processes)}|{read}|{adapter.module}|{max_length}"
        files = {
            n: Path(cache_dir)
            / f"moment-{n}-{hashlib.blake2b(f'{base}|{n}'.encode(), digest_size=16).hexdigest()}.safetensors"
            for n in layers
        }
    found = {n: load_file(path)["moment"] for n, path in files.items() if path.exists()}
    found = shared_finds(adapter.processes, found, layers)
    missing = [n for n in layers if n not in found]
    if missing:
        with adapter.processes.together("second_moments"):
            if cache_dir is not None and adapter.processes.writes:
                check_cache(cache_dir)
        measured = _measure(adapter, tokenizer, missing, texts, max_length, max_tokens)
        with adapter.processes.together("second_moments"):
            for n, moment in measured.items():
                if n in files and (adapter.processes.writes or not files[n].exists()):
                    with naming_cache(files[n].parent):
                        atomic_save_tensors(files[n], {"moment": moment})
        found |= measured
    return {n: found[n] for n in layers}


@torch.no_grad()
def _measure(
    adapter: Adapter, tokenizer: Any, layers: Sequence[int], texts: Sequence[str], max_length: int, max_tokens: int
) -> dict[int, Tensor]:
    pieces: list[list[int]] = []
    for text in texts:
        ids = tokenizer(text, truncation=False, verbose=False)["input_ids"] if text.strip() else []
        pieces += [ids[i : i + max_length] for i in range(0, len(ids), max_length)]
    count = sum(map(len, pieces))
    if count == 0:
        raise ValueError(f"second_moments: texts must hold at least one token, got {len(texts)} texts without any")
    sums: dict[int, Tensor] = {}
    with adapter.frozen():
        for group in _groups(sorted(pieces, key=len, reverse=True), max_tokens):
            _add(adapter, layers, group, sums)
    width = next(iter(sums.values())).shape[0]
    if count < 2 * width:
        logger.warning("second moments from %d tokens for %d inputs: E[k k'] is singular or nearly so", count, width)
    for n, total in sums.items():
        if not bool(total.isfinite().all()):
            raise ValueError(f"second_moments: activations must be finite, got NaN or Inf in layer {n}")
    return {n: (total + total.T) / (2 * count) for n, total in sums.items()}


def _add(adapter: Adapter, layers: Sequence[int], group: Sequence[Sequence[int]], sums: dict[int, Tensor]) -> None:
    batch = align(group, [0] * len(group), adapter.device)
    real = batch.mask.bool()

    def look(n: int) -> Any:
        def hook(_module: Any, args: tuple[Tensor, ...]) -> None:
            keys = adapter.processes.inputs(args[0][real.to(args[0].device)], adapter.part(n).d).double()
            sums[n] = torch.addmm(sums[n], keys.T, keys) if n in sums else keys.T @ keys

        return hook

    handles = [adapter.edited(n).register_forward_pre_hook(look(n)) for n in layers]
    try:
        calls = capture(adapter, batch.ids, batch.mask, batch.positions)
        calls.run(adapter, calls.hidden, 0, layers[-1] + 1)
    finally:
        for handle in handles:
            handle.remove()


def _groups(pieces: Sequence[Sequence[int]], max_tokens: int) -> list[list[Sequence[int]]]:
    groups: list[list[Sequence[int]]] = []
    for piece in pieces:
        if groups and (len(groups[-1]) + 1) * len(groups[-1][0]) <= max_tokens:
            groups[-1].append(piece)
        else:
            groups.append([piece])
    return groups


def shared_finds(processes: OneProcess, found: dict[int, Tensor], layers: Sequence[int]) -> dict[int, Tensor]:
    """What all processes have found, and have found equal to the bit."""
    if not processes.many:
        return found
    marks = torch.tensor([digest(found[n]) if n in found else -1.0 for n in layers], dtype=torch.float64)
    (first,) = processes.same(marks)
    (lost,) = processes.total((first != marks).double())
    return {n: found[n] for n, gone, mark in zip(layers, lost, first, strict=True) if gone == 0 and mark >= 0}


def fingerprint(model: nn.Module, processes: OneProcess | None = None) -> str:
    """Hash of architecture and weights (name, shape, dtype and up to 1,024 evenly spaced values of each parameter)."""
    found = hashlib.blake2b(digest_size=16)
    config = getattr(model, "config", None)
    if config is not None:
        known = {k: v for k, v in config.to_dict().items() if k not in _NOT_THE_MODEL}
        found.update(json.dumps(known, sort_keys=True, default=str).encode())
    named = list(model.named_parameters())
    samples = (processes or OneProcess()).samples([parameter for _, parameter in named], 1024)
    for (name, parameter), sample in zip(named, samples, strict=True):
        found.update(f"{name}{tuple(parameter.shape)}{parameter.dtype}".encode())
        found.update(sample.numpy().tobytes())
    return found.hexdigest()


def _sample_ids(tokenizer: Any, texts: Sequence[str]) -> list[str]:
    """What the tokenizer makes of some texts: the same words may be other tokens, with a token in front or not."""
    some = [text[:1000] for text in texts[:: max(1, len(texts) // 64)] if text.strip()]
    return [str(list(tokenizer(text, truncation=False, verbose=False)["input_ids"])) for text in some]


def _text_hash(texts: Iterable[str]) -> str:
    found = hashlib.blake2b(digest_size=16)
    for text in texts:
        raw = text.encode()
        found.update(len(raw).to_bytes(8, "little") + raw)
    return found.hexdigest()
