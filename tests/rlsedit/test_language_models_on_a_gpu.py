"""Language models on a GPU: targets by the autograd engine, keys, writing, folders, evaluation and the commands.

`--device cuda`, with a GPU or a pretended one. The default device is the CPU, as in most programs: whatever is made
without a device meets the model on the GPU.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support import language_models as lm
from support.default_device import plain_torch_under
from support.editors import SETTINGS, facts
from support.tolerances import relative_error

import rlsedit_kernels as rk
from rlsedit import profiling
from rlsedit.cli import main
from rlsedit.editor import Editor
from rlsedit.evaluation import Folder, Plan, run_plan
from rlsedit.facts import save_facts
from rlsedit.methods import get_method, list_methods
from rlsedit.models import Adapter
from rlsedit.moments import second_moments
from rlsedit.targets.cache import TargetCache
from rlsedit_kernels.profile import Ceilings

if torch.get_default_device().type != "cuda":
    pytest.skip("needs --device cuda, with a GPU or --pretend-cuda", allow_module_level=True)

GPU = torch.device("cuda", 0)
DTYPES = {"gemma2": torch.float32}
"""Where float64 does not do: transformers' attention of Gemma 2 takes a mask of float64 for one of float32."""


@pytest.fixture(autouse=True)
def default_device() -> Iterator[None]:
    with plain_torch_under("cpu"):
        yield


def editor(device: str | torch.device, method: str = "rlsedit", family: str = "llama", **more: Any) -> Editor:
    config = replace(lm.CONFIG, **{"null_threshold": 1.0, **SETTINGS, "mom2_weight": 100.0})
    if get_method(method).single or family in lm.POST_NORM:
        config = replace(config, layers=(2,))
    model = lm.tiny(family, DTYPES.get(family, torch.float64))
    moments = lm.random_moments(model, config.layers)
    return Editor(model.to(device), lm.tokenizer(), method, config, moments=moments, **more)


def same_weights(one: Editor, other: Editor, bound: float = 1e-6) -> bool:
    """What both have changed agrees, and both have changed something."""
    first = Adapter.for_model(lm.tiny(one.model.config.model_type, one.model.dtype))
    changes = [[e.adapter.rows(n).cpu() - first.rows(n) for n in e.config.layers] for e in (one, other)]
    return all(float(b.norm()) > 0.0 and relative_error(a, b) < bound for a, b in zip(*changes, strict=True))


def numbers(tree: Any) -> list[float]:
    if isinstance(tree, dict):
        return numbers(list(tree.values()))
    if isinstance(tree, list | tuple):
        return [x for inner in tree for x in numbers(inner)]
    return [tree] if isinstance(tree, float) else []


@pytest.mark.parametrize("family", [*lm.FAMILIES, *lm.POST_NORM])
def test_every_family(family: str) -> None:
    there, here = editor(GPU, family=family), editor("cpu", family=family)
    for one in (there, here):
        one.edit(lm.FACTS, batch_size=2)
    assert there.adapter.rows(2).device == GPU
    exact = family not in DTYPES
    assert same_weights(there, here, 1e-6 if exact else 1e-2)
    for mine, theirs in zip(*(numbers(one.evaluate(lm.FACTS).rows) for one in (there, here)), strict=True):
        assert mine == pytest.approx(theirs, rel=1e-4 if exact else 1e-2, nan_ok=True)


@pytest.mark.parametrize("method", list_methods())
def test_every_method(method: str) -> None:
    there, here = editor(GPU, method), editor("cpu", method)
    for one in (there, here):
        one.edit(facts(4), batch_size=2)
    assert same_weights(there, here)
    assert there.health().keys() == here.health().keys()


def test_the_kernels_in_a_model() -> None:
    """float32, against plain torch in float64."""
    if (info := next(row for row in rk.backends() if row.name == "cuda")).reason:
        pytest.skip(f"back end 'cuda': {info.reason}")
    model = lm.tiny("llama", torch.float32)
    moments = lm.random_moments(model, (1, 2))
    config = replace(lm.CONFIG, **SETTINGS)
    there = Editor(model.to(GPU), lm.tokenizer(), "rlsedit", config, moments=moments)
    with rk.use_backend("cuda"):
        there.edit(facts(6), batch_size=3)
    here = Editor(lm.tiny("llama"), lm.tokenizer(), "rlsedit", config, moments=moments)
    here.edit(facts(6), batch_size=3)
    assert same_weights(there, here, 1e-2)  # eight steps of Adam in float32


def test_a_folder(tmp_path: Path) -> None:
    """Undone, removed and resumed on the GPU, and read by a model on the CPU."""
    there, here = editor(GPU), editor("cpu")
    there.save(tmp_path / "store")
    for one in (there, here):
        one.edit(facts(6), batch_size=2)
        one.undo()
        one.remove(["f1"])
    assert same_weights(there, here)
    report = there.export_lora(tmp_path / "lora")
    assert [layer.rank for layer in report.layers] == [3, 3]
    rows = {n: there.adapter.rows(n).clone() for n in there.config.layers}
    there.close()
    for device in (GPU, "cpu"):
        again = Editor.resume(tmp_path / "store", lm.tiny("llama").to(device), lm.tokenizer())
        assert all(relative_error(again.adapter.rows(n), rows[n]) < 1e-12 for n in rows)
        again.close()
    again = Editor.resume(tmp_path / "store", lm.tiny("llama").to(GPU), lm.tokenizer())
    again.edit(facts(2, first=10))
    here.edit(facts(2, first=10))
    assert same_weights(again, here)
    again.reset()
    assert torch.equal(again.adapter.rows(2).cpu(), Adapter.for_model(lm.tiny("llama")).rows(2))


def test_second_moments() -> None:
    found = [second_moments(lm.tiny("llama").to(there), lm.tokenizer(), (1, 2), lm.SENTENCES) for there in (GPU, "cpu")]
    assert all(relative_error(found[0][n], found[1][n]) < 1e-9 for n in (1, 2))


@pytest.mark.parametrize("kept", [False, True], ids=["memory", "files"])
def test_known_targets(kept: bool, tmp_path: Path) -> None:
    """Some are read back, some optimised anew."""
    folder = tmp_path if kept else None
    cache = TargetCache(folder)
    editor(GPU, targets=cache).edit(facts(2))
    again = TargetCache(folder) if kept else cache
    there, here = editor(GPU, targets=again), editor("cpu")
    for one in (there, here):
        one.edit(facts(4))
    assert (again.hits, again.misses) == (2, 2 if kept else 4)
    assert same_weights(there, here)


def test_a_plan(tmp_path: Path) -> None:
    """Scores at checkpoints, terms of the objective, and the model as it was behind every run."""
    save_facts(lm.FACTS, tmp_path / "facts.jsonl")
    settings = {"layers": (1, 2), "steps": 3, "contexts": 1, "context_length": 3, "mom2_weight": 20}
    plan = Plan(
        "tiny", tmp_path / "facts.jsonl", batch=2, first=1, methods=("rlsedit", "ft"), settings={"all": settings},
        checkpoints=(2,), metrics=("counterfact", "writing"), length=8,
    )  # fmt: skip
    records = []
    for device in (GPU, "cpu"):
        adapter, folder = Adapter.for_model(lm.tiny("llama").to(device)), Folder(tmp_path / str(device))
        folder.begin(plan, {})
        before = adapter.rows(1).clone()
        records.append(
            run_plan(plan, adapter, lm.tokenizer(), lm.FACTS, lm.random_moments(adapter.model, (1, 2)), folder)
        )
        assert torch.equal(adapter.rows(1), before)
    for there, here in zip(*records, strict=True):
        assert there.complete
        assert [entry["facts"] for entry in there.checkpoints] == [0, 2, 4]
        for mine, theirs in zip(there.batches, here.batches, strict=True):
            for name in ("fit", "parameter", "anchor"):
                assert mine[name] == pytest.approx(theirs[name], rel=1e-4, nan_ok=True)


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("RLSEDIT_CACHE", str(tmp_path / "cache"))
    save_facts(lm.FACTS, tmp_path / "facts.jsonl")
    (tmp_path / "text.txt").write_text("\n\n".join(lm.SENTENCES * 3), encoding="utf-8")
    records = [{"sentence": f"Oslo is a city {i}", "label": i % 2} for i in range(16)]
    (tmp_path / "sst.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    lm.tiny("llama", torch.float32, max_position_embeddings=512).save_pretrained(tmp_path / "model")
    lm.tokenizer().save_pretrained(tmp_path / "model")
    return tmp_path


SMALL = ["--layers", "1-2", "--set", "steps=3", "--set", "contexts=1", "--set", "context_length=3"]


def test_commands(files: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """An edit that is stopped and gone on with, removal, scores, export, second moments: all of it on the GPU."""
    model, out, there = str(files / "model"), str(files / "out"), ["--device", "cuda"]
    text = ["--text", str(files / "text.txt")]
    edit = ["edit", model, "--facts", str(files / "facts.jsonl"), "--out", out, "--batch", "2", *text, *SMALL, *there]
    monkeypatch.setattr(profiling, "ceilings", lambda device: Ceilings(1e12, {"float32": 1e13, "float64": 1e13}))
    for command in (
        ["stats", model, *text, "--layers", "1-2", *there],
        edit,
        ["evaluate", model, "--facts", str(files / "facts.jsonl"), *there],
        ["remove", out, "b", *there],
        ["remove", out, "--undo", *there],
        ["export", out, "--to", "lora", "--base", model, "--out", str(files / "lora"), "--rank", "2",
         "--facts", str(files / "facts.jsonl"), *there],
        ["ability", model, "--task", f"perplexity={files / 'text.txt'}", f"sst={files / 'sst.jsonl'}", "--limit", "3",
         "--shots", "1", "--window", "32", *there],
        ["profile", "--model", model, "--facts", str(files / "facts.jsonl"), "--batch", "2", *text, "--layers", "1-2",
         *SMALL[2:], *there],
    ):  # fmt: skip
        status = main(command)
        captured = capsys.readouterr()
        assert status == 0, f"{command}: {captured.err}"
