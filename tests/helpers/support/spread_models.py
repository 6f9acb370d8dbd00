"""Tiny models spread over the ranks of the pool, and edits of them, run by every rank."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from transformers.distributed.tensor_parallel import apply_tensor_parallelism

from rlsedit import Editor
from rlsedit.config import EditConfig
from rlsedit_kernels.distributed import Ranks

from .editors import SETTINGS, facts
from .language_models import CONFIG, random_moments, tiny, tokenizer

DIVISIBLE = dict(hidden_size=36, num_attention_heads=6, num_key_value_heads=6, head_dim=6)
"""Heads of a Llama that 2 and 3 ranks share evenly."""


def config(**changes: Any) -> EditConfig:
    """Cheap targets."""
    return replace(CONFIG, **{"null_threshold": 1.0, **SETTINGS, **changes})


def model_of(kind: str, ranks: Ranks | None, family: str, dtype: torch.dtype, **changes: Any) -> nn.Module:
    """A tiny model as its user would have it: "one", "tp", "fsdp", "fsdp root" (one unit) or "copy"."""
    if family in ("llama", "mistral"):
        changes = {**DIVISIBLE, **changes}
    model: Any = tiny(family, dtype, **changes)
    if kind == "tp":
        assert ranks is not None
        apply_tensor_parallelism(model, ranks.mesh, model._expand_parallel_plan(model.tp_plan))
    if kind.startswith("fsdp"):
        assert ranks is not None
        if kind == "fsdp":
            for layer in model.transformer.h if family == "gpt2" else model.model.layers:
                fully_shard(layer, mesh=ranks.mesh)
        fully_shard(model, mesh=ranks.mesh)
    return model


def editor_of(
    kind: str, ranks: Ranks | None, method: str = "rlsedit", family: str = "llama",
    dtype: torch.dtype = torch.float64, states: str = "auto", width: int = 48, settings: dict[str, Any] | None = None,
) -> Editor:  # fmt: skip
    """An editor on such a model, with fixed second moments."""
    size = {"n_inner": width} if family == "gpt2" else {"intermediate_size": width}
    model = model_of(kind, ranks, family, dtype, **size)
    wanted = config(**(settings or {}))
    return Editor(
        model, tokenizer(), method, wanted, moments=random_moments(model, wanted.layers, width), states=states,
        ranks=ranks if kind == "copy" else None,
    )  # fmt: skip


def weights_of(editor: Editor) -> dict[int, torch.Tensor]:
    """The whole edited weights in row form."""
    found = {}
    for n in editor.config.layers:
        editor.adapter.rows(n)  # FSDP2 has it sharded afterwards
        weight: Any = editor.adapter.edited(n).weight
        whole = (weight.full_tensor() if isinstance(weight, DTensor) else weight).detach().clone()
        found[n] = whole if editor.adapter.layout == "in_out" else whole.T
    return found


def stream(ranks: Ranks | None, kind: str, about: dict[str, Any], count: int = 5, batch: int = 3) -> dict[str, Any]:
    """Weights, figures, records and prefixes behind a stream of facts."""
    editor = editor_of(kind, ranks, **about)
    report = editor.edit(facts(count), batch_size=batch)
    return {
        "weights": weights_of(editor),
        "figures": [
            (b.fit, b.parameter_deviation, b.anchor_deviation, b.target_loss, b.parameter_bound or 0.0, b.steps)
            for b in report.batches
        ],
        "rows": [{n: (r.keys, r.residual, r.target) for n, r in record.layers.items()} for record in editor.records],
        "contexts": [context.prefix for context in editor._contexts or []],
        "health": editor.health(),
        "kind": editor.adapter.part(editor.config.layers[0]).kind,
    }
