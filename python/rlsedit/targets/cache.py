"""z* of facts that have been asked for before, for the same weights and settings, in memory and on disk."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from ..config import EditConfig
from ..facts import Fact
from ..models.adapter import Adapter
from ..paths import atomic_save_tensors, check_cache, naming_cache
from ..prompts import Context
from .descend import Stopping, Targets
from .optimise import optimise_targets
from .rows import fact_rows

_SETTINGS = ("steps", "lr", "clamp", "kl", "decay", "relative_to", "stop_loss")
_NAMES = ("z", "start", "losses", "steps")


class TargetCache:
    """Stands in the place of `optimise_targets`: `Editor(..., targets=TargetCache(folder))`.

    A result is found again only for a model all of whose weights are equal to the bit: z* of a model that has been
    edited since is another one. The key is a hash of every parameter and buffer, of the tokens of the fact in all
    contexts and the settings of the optimisation; taking it costs one pass over the weights for each batch.

    Args:
        folder: where results are kept as safetensors; None keeps them in the host's memory only.

    Attributes:
        hits, misses: facts found, and facts optimised.
    """

    def __init__(self, folder: str | os.PathLike[str] | None = None) -> None:
        self._folder = None if folder is None else Path(folder)
        self._known: dict[str, dict[str, Tensor]] = {}
        self.hits = self.misses = 0

    def __call__(
        self,
        adapter: Adapter,
        tokenizer: Any,
        facts: Sequence[Fact],
        contexts: Sequence[Context],
        config: EditConfig,
        progress: Callable[[int, int], None] | None = None,
        *,
        stopping: Stopping | None = None,
    ) -> Targets:
        """As `optimise_targets`; only facts that are not known are optimised, together.

        Raises:
            ValueError: also for a model that lies on many processes.
            OSError: the folder cannot be written.
        """
        if adapter.processes.many:
            raise ValueError("TargetCache: cannot serve a model that lies on many processes yet; leave it out")
        base = self._base(adapter, config, stopping)
        tokens: list[list[object]] = [[] for _ in facts]
        for part in fact_rows(tokenizer, facts, contexts):
            tokens[part.fact].append([part.kind, part.encoding.ids, part.encoding.prompt_len, part.encoding.pivot])
        keys = [_digest(base, json.dumps(each)) for each in tokens]
        unknown = [i for i, key in enumerate(keys) if not self._load(key)]
        if unknown:
            if self._folder is not None:
                check_cache(self._folder)
            found = optimise_targets(
                adapter, tokenizer, [facts[i] for i in unknown], contexts, config, progress, stopping=stopping
            )
            for row, i in enumerate(unknown):
                self._store(keys[i], {name: getattr(found, name)[row].to("cpu", copy=True) for name in _NAMES})
        elif progress is not None:
            progress(len(facts), len(facts))
        self.hits, self.misses = self.hits + len(facts) - len(unknown), self.misses + len(unknown)
        rows = [self._known[key] for key in keys]
        return Targets(*(torch.stack([row[name] for row in rows]).to(adapter.device) for name in _NAMES))

    def _base(self, adapter: Adapter, config: EditConfig, stopping: Stopping | None) -> str:
        settings = {name: getattr(config, name) for name in _SETTINGS}
        return _digest(
            weights_hash(adapter.model),
            json.dumps([settings, config.layers[-1], adapter.module, adapter.post], sort_keys=True),
            json.dumps(None if stopping is None else asdict(stopping)),
        )

    def _load(self, key: str) -> bool:
        if key not in self._known and self._folder is not None:
            path = self._folder / f"target-{key}.safetensors"
            if path.exists():
                self._known[key] = load_file(path)
        return key in self._known

    def _store(self, key: str, values: dict[str, Tensor]) -> None:
        self._known[key] = values
        if self._folder is not None:
            with naming_cache(self._folder):
                atomic_save_tensors(self._folder / f"target-{key}.safetensors", values)


def weights_hash(model: nn.Module) -> str:
    """Hash of the architecture and of every bit of all parameters and buffers."""
    digest = hashlib.blake2b(digest_size=16)
    config = getattr(model, "config", None)
    digest.update(type(model).__name__.encode())
    if config is not None:
        known = {k: v for k, v in config.to_dict().items() if k not in ("_name_or_path", "transformers_version")}
        digest.update(json.dumps(known, sort_keys=True, default=str).encode())
    for name, value in model.state_dict().items():
        digest.update(f"{name}{tuple(value.shape)}{value.dtype}".encode())
        digest.update(value.detach().contiguous().reshape(-1).view(torch.uint8).cpu().numpy().data)
    return digest.hexdigest()


def _digest(*parts: str) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for part in parts:
        raw = part.encode()
        digest.update(len(raw).to_bytes(8, "little") + raw)
    return digest.hexdigest()
