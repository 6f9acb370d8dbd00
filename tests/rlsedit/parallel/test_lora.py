"""A LoRA adapter of edits in a model that lies on many processes: that of one process, with the same scores."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support.editors import facts
from support.ranks import run
from support.spread_models import editor_of, weights_of

from rlsedit import Editor
from rlsedit.export import LoraReport
from rlsedit_kernels.distributed import Ranks

SLOW = 240.0
"""Seconds that a busy machine may need for the first imports of four processes."""

CASES: list[tuple[str, int, dict[str, Any]]] = [
    ("tp", 2, {"dtype": torch.float32}),
    ("tp", 3, {"family": "mistral", "width": 50, "states": "sharded"}),
    ("fsdp", 3, {"family": "gpt2", "dtype": torch.float32}),
    ("fsdp root", 2, {"dtype": torch.bfloat16}),
    ("copy", 2, {}),
]


def _changes(folder: Path) -> dict[str, torch.Tensor]:
    """B A (d, v) of each module, float64."""
    tensors = load_file(folder / "adapter_model.safetensors")
    names = {name.rpartition(".lora_")[0] for name in tensors}
    pairs = {n: (tensors[f"{n}.lora_B.weight"].double(), tensors[f"{n}.lora_A.weight"].double()) for n in names}
    return {name: (left @ right).T for name, (left, right) in pairs.items()}


def _exported(ranks: Ranks | None, kind: str, about: dict[str, Any], path: str) -> dict[str, Any]:
    editor = editor_of(kind, ranks, **about)
    first = weights_of(editor)
    editor.edit(facts(4), batch_size=2)
    editor.remove(["f2"])
    before = weights_of(editor)
    report = editor.export_lora(path, facts=facts(3))
    short = editor.export_lora(f"{path} short", rank=1)
    assert report.scores is not None
    scores = {name: [row["log_probability_new"] for row in found.rows] for name, found in report.scores.items()}
    return {
        "first": first, "before": before, "after": weights_of(editor), "report": report, "short": short,
        "scores": scores, "shifts": _shifts(editor),
    }  # fmt: skip


def _shifts(editor: Editor) -> list[torch.Tensor]:
    """W - W_0 of the masters, whole."""
    from rlsedit.parallel.processes import Processes
    from rlsedit.parallel.saving import whole_weight

    processes, found = editor.adapter.processes, []
    for n in editor.config.layers:
        shift = editor._weights.wide(n).double() - editor._first[n].double()
        if isinstance(processes, Processes):
            shift = whole_weight(processes, shift, editor.adapter.part(n))
        found.append(shift)
    return found


@pytest.mark.parametrize(("kind", "size", "about"), CASES, ids=lambda value: str(value)[:40])
def test_the_adapter_holds_the_edits_of_all_parts_with_its_scores(
    kind: str, size: int, about: dict[str, Any], tmp_path: Path
) -> None:
    found = run(size, _exported, kind, about, str(tmp_path / "many"), limit=SLOW)
    one = _exported(None, "one", {n: v for n, v in about.items() if n != "states"}, str(tmp_path / "one"))
    half = about.get("dtype") == torch.bfloat16
    changes = _changes(tmp_path / "many")
    for (name, got), wanted in zip(sorted(changes.items()), found[0]["shifts"], strict=True):
        assert (got - wanted).norm() <= 2e-6 * wanted.norm(), name  # float32 factors of the float32 master
    ours, theirs = (json.loads((tmp_path / n / "adapter_config.json").read_text()) for n in ("many", "one"))
    assert ours == theirs
    for mine in found:
        report: LoraReport = mine["report"]
        assert report.exact
        assert report.folder == tmp_path / "many"
        assert [layer.rank for layer in report.layers] == [layer.rank for layer in one["report"].layers]
        assert not mine["short"].exact
        assert [layer.frobenius for layer in mine["short"].layers] == pytest.approx(
            [layer.frobenius for layer in one["short"].layers], rel=0.1 if half else 1e-3
        )
        for n, weight in mine["before"].items():
            assert torch.equal(weight, mine["after"][n])
        for name, values in mine["scores"].items():
            assert values == found[0]["scores"][name]
            assert values == pytest.approx(one["scores"][name], abs=0.1 if half else 1e-3), name
        gap = max(abs(a - b) for a, b in zip(mine["scores"]["edited"], mine["scores"]["adapter"], strict=True))
        assert gap <= (0.1 if half else 1e-3)


def _refused(ranks: Ranks, path: str) -> dict[str, str]:
    editor = editor_of("tp", ranks)
    found = {}

    def tried(name: str, *args: Any, **more: Any) -> None:
        try:
            editor.export_lora(*args, **more)
            found[name] = "written"
        except Exception as error:
            found[name] = f"{type(error).__name__}: {error}"

    tried("nothing", path)
    editor.edit(facts(2))
    tried("rank", path, 1000)
    tried("unlike", path, 1 + ranks.rank)
    if ranks.rank == 0:
        Path(path).mkdir()
        (Path(path) / "mine").write_text("")
    ranks.barrier()
    tried("full", path)
    tried("good", path, replace=True)
    return found


def test_an_adapter_that_cannot_be_written_is_refused_by_all(tmp_path: Path) -> None:
    for rank, found in enumerate(run(2, _refused, str(tmp_path / "out"), limit=SLOW)):
        assert "nothing to export" in found["nothing"]
        assert "rank must be in [1, 36]" in found["rank"]
        assert "must be the same" in found["unlike"]
        assert found["full"].startswith("ValueError" if rank == 0 else "RankError")
        assert "is not empty" in found["full"]
        assert found["good"] == "written"
