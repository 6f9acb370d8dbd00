"""The edit as a LoRA adapter that PEFT and vLLM load, with what the truncation costs."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from ..facts import Fact
from ..metrics import EvalReport
from ..models.adapter import Adapter
from ..paths import atomic_directory, saving_tensors
from ..report.scores import finite
from .changes import changes_of_model
from .factors import Factors, factorise
from .folder import REPORT, check_target
from .scores import evaluate_both
from .versions import versions

__all__ = ["VLLM_RANKS", "LoraLayer", "LoraReport", "export_lora", "factorise", "vllm_rank", "write_lora"]

VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""What vLLM accepts for `max_lora_rank` (vllm/config/lora.py); an adapter's rank may be anything up to it."""


@dataclass(frozen=True)
class LoraLayer:
    """One module of an adapter.

    Attributes:
        module: its name in the model.
        rank: of the adapter.
        rank_of_change: singular values of the change above the rounding of the weights.
        frobenius: |D - B A|_F / |D|_F of the factors as they are stored.
        spectral: |D - B A|_2 / |D|_2 of the truncation.
        exact: whether what is left out is no more than rounding.
    """

    module: str
    rank: int
    rank_of_change: int
    frobenius: float
    spectral: float
    exact: bool


@dataclass(frozen=True)
class LoraReport:
    """What an adapter holds and what it lost.

    Attributes:
        folder: of the adapter.
        layers: one for each edited weight.
        scores: of the edited weights ("edited") and of the base with the adapter ("adapter"), None without facts.
    """

    folder: Path
    layers: tuple[LoraLayer, ...]
    scores: Mapping[str, EvalReport] | None = None

    @property
    def rank(self) -> int:
        """Largest rank."""
        return max(layer.rank for layer in self.layers)

    @property
    def exact(self) -> bool:
        """Whether no layer lost more than rounding."""
        return all(layer.exact for layer in self.layers)

    @property
    def efficacy_loss(self) -> float | None:
        """Efficacy (success) of the edited weights less that of the adapter, in [-1, 1].

        None without facts, and where none of them has an answer that was right before, to which success compares.
        """
        if self.scores is None:
            return None
        edited, adapter = (self.scores[name].summary["efficacy_success"].mean for name in ("edited", "adapter"))
        return None if math.isnan(edited - adapter) else edited - adapter


def vllm_rank(rank: int) -> int | None:
    """The smallest `max_lora_rank` of vLLM that takes an adapter of this rank, None where there is none."""
    return next((allowed for allowed in VLLM_RANKS if rank <= allowed), None)


def write_lora(
    factors: Factors,
    out: str | os.PathLike[str],
    *,
    base: str,
    scores: Mapping[str, EvalReport] | None = None,
    replace: bool = False,
    about: Mapping[str, Any] | None = None,
) -> LoraReport:
    """Write adapter_config.json and adapter_model.safetensors as PEFT does, and a report beside them.

    y = W_0 x + (alpha / r) B A x, with alpha = r. Where layers differ in rank, `rank_pattern` and `alpha_pattern` hold
    it for PEFT; vLLM reads neither, takes the ranks from the tensors and the scale from `lora_alpha / r`, which is 1.

    Args:
        factors: what `factorise` gives.
        out: folder to write; it appears whole or not at all.
        base: name or path of the base model, for PEFT to find it.
        scores: what `evaluate_both` gives.
        replace: replace `out` if it is there.
        about: more for the report, such as the method and the number of edits.

    Raises:
        ValueError: an `out` that holds something, or layers of both layouts.
        OSError: it cannot be written.
    """
    target = check_target(out, replace)
    layers = tuple(
        LoraLayer(change.module, part.rank, part.full, part.frobenius, part.spectral, part.exact)
        for change, part in factors
    )
    report = LoraReport(target, layers, scores)
    layouts = {change.layout for change, _ in factors}
    if len(layouts) != 1:
        raise ValueError("an adapter holds layers of one kind, nn.Linear or Conv1D; got both")
    tensors: dict[str, Tensor] = {}
    for change, part in factors:
        tensors[f"base_model.model.{change.module}.lora_A.weight"] = part.right.cpu()
        tensors[f"base_model.model.{change.module}.lora_B.weight"] = part.left.cpu()
    with atomic_directory(target, replace=replace) as work:
        with saving_tensors(target):
            save_file(tensors, work / "adapter_model.safetensors", {"format": "pt"})
        _write(work / "adapter_config.json", _config(report, base, layouts == {"in_out"}))
        _write(work / REPORT, _content(report, base, about or {}))
        (work / "adapter_model.safetensors").chmod((work / REPORT).stat().st_mode)
    return report


def export_lora(
    adapter: Adapter,
    tokenizer: Any,
    before: Mapping[int, Tensor],
    after: Mapping[int, Tensor],
    out: str | os.PathLike[str],
    *,
    rank: int | None = None,
    facts: Sequence[Fact] | None = None,
    about: Mapping[str, Any] | None = None,
    replace: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> LoraReport:
    """A LoRA adapter of the edits of a model in memory; `Editor.export_lora` calls this.

    Args:
        adapter, tokenizer: the model.
        before: W_0 of each edited layer, row form (d, v), in the dtype of the model; of a model that lies on many
            processes the part that is here.
        after: W of each likewise: the float32 master of a bf16 or fp16 model.
        out: folder to write.
        rank: largest rank of a layer; None for the smallest that is exact to rounding, at most the number of edits for
            methods that write with one key a fact.
        facts: where given, scores with the edited weights and with the adapter are in the report.
        about: more for the report.
        replace: replace `out` if it is there.
        progress: called with (prompts scored, all prompts).

    Raises:
        ValueError: nothing has been edited, a rank out of range, an `out` that holds something.
    """
    processes, what = adapter.processes, "Editor.export_lora"
    processes.of_first(what, lambda: check_target(out, replace))
    if processes.many:
        from ..parallel.lora import factors_of_parts

        factors = factors_of_parts(adapter, before, after, rank)
    else:
        factors = factorise(changes_of_model(adapter, before, after), rank)
    scores = evaluate_both(adapter, tokenizer, facts, factors, progress=progress) if facts else None
    base = str(getattr(adapter.model.config, "_name_or_path", "") or "")
    report: LoraReport = processes.of_first(
        what, lambda: write_lora(factors, out, base=base, scores=scores, replace=replace, about=about)
    )
    return report


def _config(report: LoraReport, base: str, transposed: bool) -> dict[str, Any]:
    ranks = {layer.module: layer.rank for layer in report.layers if layer.rank != report.rank}
    return {
        "alpha_pattern": ranks,
        "base_model_name_or_path": base,
        "bias": "none",
        "fan_in_fan_out": transposed,
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": report.rank,
        "lora_dropout": 0.0,
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": report.rank,
        "rank_pattern": ranks,
        "target_modules": [layer.module for layer in report.layers],
        "task_type": "CAUSAL_LM",
        "use_dora": False,
        "use_rslora": False,
    }


def _content(report: LoraReport, base: str, about: Mapping[str, Any]) -> dict[str, Any]:
    scores = None if report.scores is None else {n: finite(asdict(entry)) for n, entry in report.scores.items()}
    return {
        "kind": "lora",
        "base": {"name": base},
        **about,
        "rank": report.rank,
        "exact": report.exact,
        "vllm_max_lora_rank": vllm_rank(report.rank),
        "layers": [asdict(layer) for layer in report.layers],
        "efficacy_loss": report.efficacy_loss,
        "scores": scores,
        "versions": versions(),
    }


def _write(file: Path, content: Mapping[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")
