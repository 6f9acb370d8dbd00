"""Single edits out of models that lie on many processes: the weights of one process, all of it or nothing, and back."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support.editors import facts
from support.language_models import tokenizer
from support.ranks import run
from support.spread_models import editor_of, model_of, weights_of
from torch import Tensor

from rlsedit import Editor
from rlsedit.store.check import problems
from rlsedit_kernels.distributed import Ranks

SLOW = 240.0
"""Seconds that a busy machine may need for the first imports of four processes."""

EXACT = 1e-9
"""Largest |difference| / |change of the weight| in float64: the same arithmetic with sums in another order."""

SINGLE = 5e-4
"""The same in float32. Measured: 2e-5."""

GONE = ["f1", "f4", "f5"]  # one of three in a batch, and two of three

CASES: list[tuple[str, int, dict[str, Any]]] = [
    ("tp", 2, {}),
    ("fsdp", 3, {"method": "alphaedit", "states": "layers", "width": 50}),
    ("copy", 2, {"method": "memit_seq", "states": "layers"}),
    ("tp", 3, {"states": "sharded", "method": "encore", "settings": {"noise": 0.2}}),
    ("fsdp", 2, {"states": "sharded", "dtype": torch.float32}),
    ("fsdp", 3, {"method": "memit", "family": "phi"}),
    ("fsdp", 2, {"method": "emmet", "family": "gpt2", "states": "sharded"}),
    ("fsdp root", 2, {"dtype": torch.bfloat16}),
]


def _figures(editor: Editor) -> list[float]:
    assert editor._layers is not None
    every = [state.deviations for state in editor._layers.values()]
    return [getattr(figures, name) for figures in every for name in ("cost", "parameter", "anchor", "innovation")]


def _worse(facts_: Any) -> list[Any]:
    return [replace(fact, id=f"new {fact.id}", target_new="Quito") for fact in facts_]


def _stream(ranks: Ranks | None, kind: str, about: dict[str, Any]) -> dict[str, Any]:
    """Weights and figures behind edits, a removal, its undo, a second removal and a batch that replaces."""
    editor = editor_of(kind, ranks, **about)
    found: dict[str, Any] = {"first": weights_of(editor)}
    editor.edit(facts(9), batch_size=3)
    found["written"], found["figures written"] = weights_of(editor), _figures(editor)
    editor.remove(GONE)
    found["removed"], found["figures removed"] = weights_of(editor), _figures(editor)
    editor.undo()
    found["undone"], found["figures undone"] = weights_of(editor), _figures(editor)
    editor.remove(["f0"])
    report = editor.edit([*_worse(facts(2, 1)), *facts(2, 9)], on_conflict="replace")
    found["replaced"], found["figures replaced"] = weights_of(editor), _figures(editor)
    found["conflicts"] = [(c.new, c.old) for c in report.conflicts]
    assert editor._journal is not None
    found["live"] = list(editor._journal.index.live)
    editor.edit(facts(1, 11))  # the states are good for more
    found["more"] = weights_of(editor)
    return found


def _off(got: Tensor, wanted: Tensor, start: Tensor) -> float:
    return float((got.double() - wanted.double()).norm() / (wanted.double() - start.double()).norm())


@pytest.mark.parametrize(("kind", "size", "about"), CASES, ids=lambda value: str(value)[:40])
def test_removing_and_replacing_give_the_weights_of_one_process(kind: str, size: int, about: dict[str, Any]) -> None:
    one = _stream(None, "one", {name: value for name, value in about.items() if name != "states"})
    bound = {torch.float64: EXACT, torch.float32: SINGLE}.get(about.get("dtype", torch.float64), 2e-2)
    for n, weight in one["removed"].items():
        assert _off(one["written"][n], weight, one["first"][n]) > 1e-2  # that they were in shows
    for mine in run(size, _stream, kind, about, limit=SLOW):
        assert mine["conflicts"] == one["conflicts"] == [("new f1", "f1"), ("new f2", "f2")]
        assert mine["live"] == one["live"]
        for n in one["first"]:
            assert torch.equal(mine["undone"][n], mine["written"][n])
            for what in ("removed", "replaced", "more"):
                assert _off(mine[what][n], one[what][n], one["first"][n]) <= bound, what
        for what in ("removed", "replaced"):
            assert mine[f"figures {what}"] == pytest.approx(one[f"figures {what}"], rel=max(10 * bound, 1e-7)), what
        assert mine["figures undone"] == mine["figures written"]


def _dense(editor: Editor, layer: int, gone: list[str]) -> Tensor:
    """W - W_0 (d, v) that minimises the objective over all recorded rows but those of `gone`, by one float64 solve."""
    information = editor._starts[layer].prior().information()  # type: ignore[attr-defined]
    right = torch.zeros(len(information), editor.adapter.part(layer).v, dtype=torch.float64)
    for record in editor.records:
        kept = [i for i, name in enumerate(record.ids) if name not in gone]
        rows = record.layers[layer]
        assert rows.keys is not None
        assert rows.target is not None
        K, V = rows.keys[kept].double(), rows.target[kept].double()
        information += K.T @ K / record.noise
        right += K.T @ V / record.noise
    return torch.linalg.solve(information, right)


def _by_leverage(ranks: Ranks, kind: str, states: str) -> dict[str, Any]:
    """A weak ridge knows the direction of a key by its batch alone: float32 cannot downdate."""
    weak = {"mu": 1e-6, "lam": 1e-3}
    editor = editor_of(kind, ranks, dtype=torch.float32, states=states, settings=weak)
    first = weights_of(editor)
    editor.edit(facts(6), batch_size=2)
    wanted = {n: _dense(editor, n, ["f4"]) for n in first}
    editor.remove(["f4"])
    found: dict[str, Any] = {"off": {}, "left": {}, "rebuilt": []}
    for n, weight in weights_of(editor).items():
        shift = (weight - first[n]).double()
        found["off"][n] = float((shift - wanted[n]).norm() / wanted[n].norm())
        figures = editor._layers[n].deviations  # type: ignore[index]
        assert figures.parameter == pytest.approx(float(shift.square().sum()), rel=1e-3)
        gram = editor.config.mom2_weight * editor._moments[n]  # type: ignore[index]
        assert figures.anchor == pytest.approx(float((shift * (gram @ shift)).sum()), rel=1e-3)
    found["rebuilt"] = [health["steps"] for health in editor.health().values() if "steps" in health]
    editor.remove(["f0", "f1", "f2", "f3", "f5"])
    found["left"] = {n: float((weight - first[n]).abs().max()) for n, weight in weights_of(editor).items()}
    editor.edit(facts(2, 6))
    return found


@pytest.mark.parametrize(
    ("kind", "size", "states"),
    [("tp", 2, "replicated"), ("fsdp", 3, "layers"), ("copy", 2, "sharded"), ("fsdp", 2, "sharded")],
)
def test_what_a_downdate_cannot_take_out_is_left_out_by_rebuilding(kind: str, size: int, states: str) -> None:
    for found in run(size, _by_leverage, kind, states, limit=SLOW):
        assert max(found["off"].values()) < 2e-3
        assert set(found["rebuilt"]) <= {3}  # one for each batch that was read again
        assert max(found["left"].values()) < 1e-6  # nothing is left


def _spoilt(ranks: Ranks, kind: str, states: str, spoil: str) -> dict[str, Any]:
    """What is left behind after a removal that one rank spoils, and a good one behind it."""
    editor = editor_of(kind, ranks, states=states)
    editor.edit(facts(4), batch_size=2)
    before, figures = weights_of(editor), _figures(editor)
    names = ["f1", "f2"]
    if ranks.rank == 1 and spoil == "an unknown id":
        names = ["f1", "nobody"]
    if ranks.rank == 1 and spoil == "another id":
        names = ["f1", "f3"]
    if ranks.rank == 1 and spoil == "a late layer":
        second, add = editor.config.layers[1], editor._weights.add

        def failing(layer: int, update: Tensor) -> None:
            add(layer, update * float("nan") if layer == second else update)

        editor._weights.add = failing  # type: ignore[method-assign]
    try:
        if spoil == "a late layer of what replaces":  # the old edit is out of both layers, the new one in the first
            second, count, add = editor.config.layers[1], [0], editor._weights.add

            def last(layer: int, update: Tensor) -> None:
                count[0] += 1
                add(layer, update * float("nan") if ranks.rank == 1 and (layer, count[0]) == (second, 4) else update)

            editor._weights.add = last  # type: ignore[method-assign]
            editor.edit(_worse(facts(1, 1)), on_conflict="replace")
        else:
            editor.remove(names)
        message, name = "", ""
    except Exception as error:
        message, name = str(error), type(error).__name__
    found = {"message": message, "kind": name, "before": before, "after": weights_of(editor)}
    found["figures"] = _figures(editor) == figures
    editor._weights.__dict__.pop("add", None)
    editor.remove(["f1", "f2"])
    assert editor._journal is not None
    return {**found, "live": list(editor._journal.index.live)}


@pytest.mark.parametrize(
    ("kind", "states", "spoil", "own", "others"),
    [
        ("tp", "layers", "an unknown id", ("ValueError", "['nobody']"), ("RankError", "rank 1 failed: ValueError")),
        ("fsdp", "sharded", "another id", ("ValueError", "must be the same"), ("ValueError", "must be the same")),
        ("tp", "sharded", "a late layer", ("ValueError", "must be finite"), ("RankError", "rank 1 failed: ValueError")),
        ("fsdp", "layers", "a late layer", ("ValueError", "must be finite"), ("RankError", "rank 1 failed: ValueErr")),
        (
            "fsdp",
            "sharded",
            "a late layer of what replaces",
            ("ValueError", "must be finite"),
            ("RankError", "rank 1 failed: ValueErr"),
        ),
    ],
)
def test_a_removal_that_fails_on_one_rank_changes_nothing_on_any(
    kind: str, states: str, spoil: str, own: tuple[str, str], others: tuple[str, str]
) -> None:
    found = run(2, _spoilt, kind, states, spoil, limit=SLOW)
    for rank, (name, text) in enumerate((others, own)):
        assert found[rank]["kind"] == name, found[rank]["message"]
        assert text in found[rank]["message"]
    for one in found:
        assert one["figures"]
        assert one["live"] == ["f0", "f3"]
        for n, weight in one["before"].items():
            assert torch.equal(weight, one["after"][n])


def _kept(ranks: Ranks | None, kind: str, path: str, states: str = "auto") -> dict[str, Any]:
    editor = editor_of(kind, ranks, states=states)
    first = weights_of(editor)
    editor.save(path)
    editor.edit(facts(5), batch_size=2)
    editor.remove(["f1", "f4"])
    editor.edit(_worse(facts(1)), on_conflict="replace")
    editor.remove(["f2"])
    weights = weights_of(editor)
    rows = {row.fact.id: (row.state, row.reason) for row in editor.folder.ledger.edits()}  # type: ignore[union-attr]
    editor.close()
    return {"first": first, "weights": weights, "rows": rows}


def _resumed(ranks: Ranks | None, kind: str, path: str) -> dict[str, Any]:
    editor = Editor.resume(path, model_of(kind, ranks, "llama", torch.float64), tokenizer())
    found: dict[str, Any] = {"weights": weights_of(editor)}
    editor.undo()
    editor.undo()
    found["states"] = {row.fact.id: row.state for row in editor.folder.ledger.edits()}  # type: ignore[union-attr]
    editor.remove(["f0"])
    editor.close()
    return found


@pytest.mark.parametrize(
    ("written", "by", "resumed", "at"), [("tp", 2, "tp", 2), ("fsdp", 2, "one", 1), ("one", 1, "fsdp", 3)]
)
def test_the_ledger_has_removals_and_any_number_of_processes_repeats_them(
    tmp_path: Path, written: str, by: int, resumed: str, at: int
) -> None:
    path = str(tmp_path / "out")
    first = [_kept(None, "one", path)] if by == 1 else run(by, _kept, written, path, limit=SLOW)
    assert first[0]["rows"] == {
        "f0": ("removed", "replaced"), "f1": ("removed", "taken out"), "f2": ("removed", "taken out"),
        "f3": ("applied", ""), "f4": ("removed", "taken out"), "new f0": ("applied", ""),
    }  # fmt: skip
    assert all(one["rows"] == first[0]["rows"] for one in first)
    again = [_resumed(None, "one", path)] if at == 1 else run(at, _resumed, resumed, path, limit=SLOW)
    assert list(problems(Path(path))) == []
    for one in again:
        assert {name for name, state in one["states"].items() if state == "applied"} == {"f0", "f2", "f3"}
        for n, weight in first[0]["weights"].items():
            assert _off(one["weights"][n], weight, first[0]["first"][n]) <= EXACT
            if (written, by) == (resumed, at):
                assert torch.equal(one["weights"][n], weight)
