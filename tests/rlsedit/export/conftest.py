"""Tiny models on disk before and after a few edits; made once for each family, dtype and way of saving."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from support import language_models as lm
from transformers import AutoModelForCausalLM

from rlsedit import Editor
from rlsedit.export import LoraReport, export_lora


@dataclass(frozen=True)
class Pair:
    """Folders `base` and `edited`, and the editor that made the second out of the first."""

    base: Path
    edited: Path
    editor: Editor

    def load(self, folder: Path | None = None) -> torch.nn.Module:
        return AutoModelForCausalLM.from_pretrained(folder or self.base, dtype="auto")

    def masters(self) -> dict[int, torch.Tensor]:
        return {n: self.editor._weights.wide(n) for n in self.editor.config.layers}

    def lora(self, out: Path, **options: object) -> LoraReport:
        first = self.editor._first
        return export_lora(self.editor.adapter, lm.tokenizer(), first, self.masters(), out, **options)  # type: ignore[arg-type]


MakePair = Callable[..., Pair]


@pytest.fixture(scope="session")
def make_pair(tmp_path_factory: pytest.TempPathFactory) -> MakePair:
    made: dict[object, Pair] = {}

    def make(
        family: str = "llama", dtype: torch.dtype = torch.float32, shards: bool = True, tied: bool = False
    ) -> Pair:
        key = (family, dtype, shards, tied)
        if key not in made:
            root = tmp_path_factory.mktemp("pair")
            size = "20KB" if shards else "1GB"
            model = lm.tiny(family, dtype, **({"tie_word_embeddings": True} if tied else {}))
            for name in ("base", "edited"):
                if name == "edited":
                    model = AutoModelForCausalLM.from_pretrained(root / "base", dtype="auto")
                    moments = lm.random_moments(model, (1, 2))
                    editor = Editor(model, lm.tokenizer(), config=lm.CONFIG, moments=moments)
                    editor.edit(lm.FACTS, batch_size=2)
                model.save_pretrained(root / name, max_shard_size=size)
                lm.tokenizer().save_pretrained(root / name)
            (root / "base" / "LICENSE").write_text("terms")
            made[key] = Pair(root / "base", root / "edited", editor)
        return made[key]

    return make


@pytest.fixture
def pair(make_pair: MakePair) -> Pair:
    return make_pair()
