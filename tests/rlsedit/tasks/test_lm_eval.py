"""The bridge to lm-eval: with a stand-in that checks what it is handed, and with the package where it is installed."""

from __future__ import annotations

import json
import math
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from support.language_models import tiny, tokenizer

from rlsedit.tasks import TASKS
from rlsedit.tasks.lm_eval import NAMES, lm_eval_available, run_lm_eval

RESULTS = {
    "results": {
        "sst2": {"alias": "sst2", "acc,none": 0.75, "acc_stderr,none": 0.1, "f1,none": 0.5, "f1_stderr,none": "N/A",
                 "sample_len": 4},
    },
    "n-samples": {"sst2": {"original": 872, "effective": 4}},
    "n-shot": {"sst2": 2},
    "samples": {"sst2": [{"doc_id": 3, "target": "1", "metrics": ["acc"], "acc": 1.0, "doc": {}}]},
}  # fmt: skip


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A stand-in for lm-eval."""
    seen: dict[str, Any] = {"results": RESULTS}

    class HFLM:
        def __init__(self, **arguments: Any) -> None:
            seen.update(arguments)
            arguments["pretrained"].eval()

    def simple_evaluate(model: object, **arguments: Any) -> Any:
        assert isinstance(model, HFLM)
        seen.update(arguments)
        if isinstance(seen["results"], Exception):
            raise seen["results"]
        return seen["results"]

    package, models, wrapper = (types.ModuleType(f"lm_eval{tail}") for tail in ("", ".models", ".models.huggingface"))
    package.simple_evaluate, wrapper.HFLM = simple_evaluate, HFLM  # type: ignore[attr-defined]
    for module in (package, models, wrapper):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    return seen


def test_the_model_in_memory_is_handed_on_and_results_come_back(calls: dict[str, Any]) -> None:
    model = tiny("llama").train()
    assert lm_eval_available()
    reports = run_lm_eval(["sst", "hellaswag"], model, tokenizer(), limit=4, shots=2)
    assert calls["pretrained"] is model
    assert calls["tokenizer"] is tokenizer()
    assert (calls["tasks"], calls["limit"], calls["num_fewshot"]) == (["sst2", "hellaswag"], 4, 2)
    assert model.training
    summary = reports["sst2"].summary
    assert list(summary) == ["acc,none", "f1,none"]
    assert (summary["acc,none"].mean, summary["acc,none"].stderr, summary["acc,none"].count) == (0.75, 0.1, 4)
    assert math.isnan(summary["f1,none"].stderr)
    assert reports["sst2"].rows == [{"id": 3, "target": "1", "acc": 1.0}]
    assert reports["sst2"].settings["shots"] == 2


def test_what_goes_wrong_inside_is_one_message(calls: dict[str, Any]) -> None:
    calls["results"] = ConnectionError("cannot reach\n  the hub")
    with pytest.raises(ValueError, match=r"could not run rte: cannot reach the hub \(pip install"):
        run_lm_eval(["rte"], tiny("llama"), tokenizer())
    calls["results"] = None
    with pytest.raises(ValueError, match="no results"):
        run_lm_eval(["rte"], tiny("llama"), tokenizer())
    with pytest.raises(ValueError, match="at least one"):
        run_lm_eval([], tiny("llama"), tokenizer())


def test_without_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    assert not lm_eval_available()
    with pytest.raises(ImportError, match="local files only"):
        run_lm_eval(["sst"], tiny("llama"), tokenizer())


def test_names_are_tasks_of_ours() -> None:
    assert set(NAMES) < set(TASKS)
    assert not {"humaneval", "mbpp"} & set(NAMES), "their code would run without a sandbox"


def test_with_the_package(tmp_path: Path) -> None:
    pytest.importorskip("lm_eval")
    records = [{"q": f"Oslo is {i}", "a": i % 2} for i in range(12)]
    file = tmp_path / "mine.jsonl"
    file.write_text("\n".join(map(json.dumps, records)))
    task = {
        "task": "mine", "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(file)}},
        "test_split": "test", "output_type": "multiple_choice", "doc_to_text": "{{q}} is it",
        "doc_to_choice": ["no", "yes"], "doc_to_target": "a", "metric_list": [{"metric": "acc"}],
    }  # fmt: skip
    model = tiny("llama", torch.float32, max_position_embeddings=512)
    report = run_lm_eval([task], model, tokenizer(), limit=7)["mine"]
    assert report.summary["acc,none"].count == 7
    assert report.summary["acc,none"].mean == pytest.approx(sum(row["acc"] for row in report.rows) / 7)
