"""A folder gives the editor back to the bit: all methods, from snapshots and from the records alone, and undo."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support import language_models as lm
from support.editors import SETTINGS, differing, editor, everything, facts, resumed

from rlsedit.facts import save_facts
from rlsedit.methods import list_methods
from rlsedit.store.errors import StoreError

BATCH = dict(batch_size=2, finish=False)


@pytest.mark.parametrize("every", [1, 100])
@pytest.mark.parametrize("method", list_methods())
def test_a_resumed_stream_has_the_bits_of_one_that_was_never_interrupted(
    method: str, every: int, tmp_path: Path
) -> None:
    whole = editor(method)
    whole.edit(facts(6), **BATCH)
    part = editor(method)
    part.save(tmp_path, every=every)
    part.edit(facts(4), **BATCH)
    expected = everything(part)
    part.close()
    again = resumed(tmp_path, every=every)
    assert differing(everything(again), expected) == []
    again.edit(facts(2, 4), **BATCH)
    assert differing(everything(again), everything(whole)) == []
    again.finish()
    whole.finish()
    assert differing(everything(again), everything(whole)) == []
    again.close()


@pytest.mark.parametrize(("family", "dtype"), [("gptj", torch.bfloat16), ("gpt2", torch.float32),
                                               ("gemma3_text", torch.float16), ("qwen2", torch.float64)])  # fmt: skip
def test_families_and_dtypes(family: str, dtype: torch.dtype, tmp_path: Path) -> None:
    settings = dict(layers=(2,)) if family == "gemma3_text" else {}
    whole, part = editor("rlsedit", dtype, family, **settings), editor("rlsedit", dtype, family, **settings)
    whole.edit(facts(6), **BATCH)
    part.edit(facts(2), **BATCH)
    part.save(tmp_path, every=2)  # the batch before is taken along
    part.edit(facts(2, 2), **BATCH)
    part.close()
    again = resumed(tmp_path, dtype, family)
    again.edit(facts(2, 4), **BATCH)
    assert differing(everything(again), everything(whole)) == []
    again.reset()
    fresh = editor("rlsedit", dtype, family, **settings)
    assert all(torch.equal(a, b) for a, b in zip(again.model.parameters(), fresh.model.parameters(), strict=True))
    again.edit(facts(6), **BATCH)
    assert differing(everything(again), everything(whole)) == []


@pytest.mark.parametrize(
    ("method", "kept"), [(name, True) for name in list_methods()] + [(n, False) for n in ("rlsedit", "simie", "ft")]
)
def test_undo_is_exact_to_the_bit(method: str, kept: bool, tmp_path: Path) -> None:
    one = editor(method)
    if kept:
        one.save(tmp_path, every=2)
    elif method == "ft":
        with pytest.raises(ValueError, match="nothing was recorded"):
            one.undo()
        return
    states = [everything(one)]
    for i in range(3):
        one.edit(facts(2, 2 * i), **BATCH)
        states.append(everything(one))
    single = one.method.single
    for i in (2, 1):
        for _ in range(2 if single else 1):
            ids = one.undo()
        assert ids == (f"f{2 * i}",) if single else (f"f{2 * i}", f"f{2 * i + 1}")
        assert differing(everything(one), states[i]) == []
    one.edit(facts(2, 2), **BATCH)
    assert differing(everything(one), states[2]) == []
    if kept:
        one.close()
        again = resumed(tmp_path)
        assert differing(everything(again), states[2]) == []
        rows = again.folder.ledger.edits()  # type: ignore[union-attr]
        assert [(row.fact.id, row.state) for row in rows if row.state == "applied"] == [
            (f"f{i}", "applied") for i in range(4)
        ]
        again.undo()
        again.edit(facts(2, 6), **BATCH)  # another step in the place of one that a snapshot knows
        other = everything(again)
        again.close()
        assert differing(everything(resumed(tmp_path)), other) == []


def test_another_model_is_refused(tmp_path: Path) -> None:
    from support.language_models import tiny, tokenizer

    from rlsedit.editor import Editor

    one = editor()
    one.save(tmp_path)
    one.edit(facts(2))
    one.close()
    for other, words in ((tiny("llama", torch.float32, seed=1), "another"), (tiny("gpt2", torch.float32), "module"),
                         (tiny("llama", torch.float64), "dtype")):  # fmt: skip
        before = [value.clone() for value in other.parameters()]
        with pytest.raises(StoreError, match=words):
            Editor.resume(tmp_path, other, tokenizer())
        assert all(torch.equal(a, b) for a, b in zip(before, other.parameters(), strict=True))
    with pytest.raises(StoreError, match="holds no edits"):
        resumed(tmp_path / "records")
    again = resumed(tmp_path)
    with pytest.raises(StoreError, match="holds edits already"):
        editor().save(tmp_path)
    with pytest.raises(ValueError, match="where this editor is kept"):
        again.save(tmp_path / "other")


def test_what_an_export_reads(tmp_path: Path) -> None:
    """First weights, and the batches that count with their rows."""
    one = editor()
    one.save(tmp_path)
    one.edit(facts(4), batch_size=2)
    one.undo()
    (record,) = one.records
    assert record.ids == ("f0", "f1")
    rows = record.layers[2]
    assert rows.keys is not None
    assert rows.residual is not None
    assert rows.target is not None
    assert (rows.keys.shape, rows.residual.shape, rows.target.shape) == ((2, 48), (2, 32), (2, 32))
    torch.testing.assert_close(rows.target, rows.residual)  # the first batch: V = K W_0 + E
    fresh = editor()
    for n, weight in one.first_weights.items():
        assert torch.equal(weight, fresh.adapter.rows(n))
    one.close()


def test_snapshots_of_another_version_are_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    one = editor()
    one.save(tmp_path, every=1)
    one.edit(facts(4), batch_size=2)
    expected = everything(one)
    one.close()
    with monkeypatch.context() as patch:
        patch.setattr("rlsedit_kernels.states.saving.VERSION", 999)
        again = resumed(tmp_path)
        again.close()
    assert "version must be 999" in caplog.text
    again = resumed(tmp_path)
    assert differing(everything(again), expected) == []


def test_the_example_of_the_documentation_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = (Path(__file__).resolve().parents[3] / "docs" / "ledger.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    Path("text.txt").write_text("\n\n".join(lm.SENTENCES), encoding="utf-8")
    save_facts([replace(fact, id=f"fact-{16 + i}") for i, fact in enumerate(facts(3))], "facts.jsonl")
    save_facts(facts(2, first=5), "more.jsonl")
    settings = ", ".join(f"{name}={value}" for name, value in SETTINGS.items())
    names: dict[str, Any] = {"model": lm.tiny("llama"), "tokenizer": lm.tokenizer()}
    exec(code.replace("lam=3.0", f"lam=3.0, layers={lm.CONFIG.layers}, {settings}"), names)
    editor = names["editor"]
    assert editor.config.lam == 3.0
    assert [record.ids for record in editor.records] == [("fact-16", "fact-17", "fact-18"), ("f5", "f6")]


def test_a_step_does_not_read_all_steps_before_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a hundred thousand edits in the folder an index of them takes seconds."""
    one = editor()
    one.save(tmp_path / "out")
    one.edit(facts(1))
    with monkeypatch.context() as patch:
        patch.setattr("rlsedit.store.journal.Index", lambda *_: pytest.fail("an index was made anew"))
        one.edit(facts(1, 1))
        one.remove(["f0"])
    one.undo()
    assert one.folder is not None
    assert one.folder.ledger.counts() == {"applied": 2}
    one.close()


@pytest.mark.parametrize("error", [StoreError("cannot be read"), OSError(5, "Input/output error")])
def test_a_durable_step_that_cannot_be_read_back_is_kept(
    error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The record is there: weights, index and a resumed run have it, and the ledger follows with the next step."""
    one = editor()
    one.save(tmp_path / "out")
    one.edit(facts(1))
    assert one.folder is not None

    def unreadable(_number: int) -> Any:
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(one.folder.journal, "header", unreadable)
        one.edit(facts(1, 1))
    assert one.folder.ledger.counts() == {"applied": 1, "planned": 1}
    expected = everything(one)
    one.close()
    again = resumed(tmp_path / "out")
    assert differing(everything(again), expected) == []
    again.edit(facts(1, 2))
    assert again.folder is not None
    assert again.folder.ledger.counts() == {"applied": 3}
