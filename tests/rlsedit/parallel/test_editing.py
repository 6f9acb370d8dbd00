"""Edits of models that lie on many processes equal those of one process, and all processes agree to the bit."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from support.editors import facts
from support.ranks import run
from support.spread_models import editor_of, stream, weights_of

from rlsedit.methods import list_methods
from rlsedit_kernels.distributed import Ranks
from rlsedit_kernels.errors import RankError

SLOW = 240.0
"""Seconds that a busy machine may need for the first imports of four processes."""

EXACT = 1e-9
"""Largest |difference| / |change of the weight| in float64: sums of a row-parallel layer are added in another order,
and z* takes two steps of Adam from gradients that differ by rounding. Measured: 3e-15."""

SINGLE = 2e-4
"""The same in float32. Measured: 4e-6."""

CASES: list[tuple[str, int, str, dict[str, Any]]] = [
    ("tp", 2, "rows", {}),
    ("tp", 3, "rows", {"width": 50, "method": "alphaedit", "states": "layers"}),
    ("tp", 3, "rows", {"family": "mistral", "method": "memit_seq", "dtype": torch.float32}),
    ("fsdp", 2, "columns", {"method": "alphaedit", "states": "layers"}),
    ("fsdp", 3, "columns", {"family": "phi", "method": "memit"}),
    ("fsdp", 3, "rows", {"family": "gpt2", "dtype": torch.float32}),
    ("tp", 2, "rows", {"family": "qwen3_5_text", "dtype": torch.float32}),
    ("fsdp", 2, "columns", {"family": "lfm2"}),
    ("fsdp root", 2, "columns", {"method": "encore", "dtype": torch.bfloat16}),
    ("copy", 2, "whole", {"states": "layers"}),
    ("tp", 2, "rows", {"states": "sharded", "dtype": torch.float32}),
    ("fsdp", 2, "columns", {"states": "sharded", "method": "alphaedit"}),
    ("fsdp", 3, "columns", {"states": "sharded", "method": "memit", "width": 50}),
    ("tp", 3, "rows", {"states": "sharded", "method": "evoedit"}),
]


@pytest.mark.parametrize(("kind", "size", "lies", "about"), CASES, ids=lambda value: str(value)[:40])
def test_edits_equal_those_of_one_process(kind: str, size: int, lies: str, about: dict[str, Any]) -> None:
    alone = {name: value for name, value in about.items() if name != "states"}
    one, before = stream(None, "one", alone), weights_of(editor_of("one", None, **alone))
    found = run(size, stream, kind, about, limit=SLOW)
    bound = {torch.float64: EXACT, torch.float32: SINGLE}.get(about.get("dtype", torch.float64), 2e-2)
    for mine in found:
        assert mine["kind"] == lies
        assert mine["contexts"] == one["contexts"]
        for n, weight in one["weights"].items():
            assert torch.equal(mine["weights"][n], found[0]["weights"][n])
            change = (weight - before[n]).double().norm()
            assert change > 0
            assert (mine["weights"][n] - weight).double().norm() <= bound * change
        for ours, theirs in zip(mine["figures"], one["figures"], strict=True):
            assert ours == pytest.approx(theirs, rel=max(10 * bound, 1e-9), abs=1e-12)
        for ours, theirs in zip(mine["rows"], found[0]["rows"], strict=True):
            for n, rows in ours.items():
                assert all(torch.equal(a, b) for a, b in zip(rows, theirs[n], strict=True))


def _refused(ranks: Ranks, method: str) -> str:
    with pytest.raises(ValueError, match=method) as caught:
        editor_of("tp", ranks, method)
    return str(caught.value)


def test_a_method_that_cannot_says_so_and_names_those_that_can() -> None:
    serving = ["rlsedit", "memit", "memit_seq", "encore", "alphaedit", "evoedit", "emmet"]
    for method in ("ft", "pmet", "rect", "ultraedit"):
        for message in run(2, _refused, method, limit=SLOW):
            assert message.endswith("these can: " + ", ".join(name for name in list_methods() if name in serving))


def _bits(ranks: Ranks, kind: str, spoil: str) -> dict[str, Any]:
    """What is left behind after a call that one rank spoils, and after a good one behind it."""
    editor = editor_of(kind, ranks)
    before = weights_of(editor)
    wanted = facts(3)
    if ranks.rank == 1 and spoil == "bad fact":
        wanted[1] = wanted[0]
    if ranks.rank == 1 and spoil == "another fact":
        wanted = facts(3, 1)
    if ranks.rank == 1 and spoil == "a late layer":
        second, add = editor.config.layers[1], editor._weights.add

        def failing(layer: int, update: torch.Tensor) -> None:
            add(layer, update * float("nan") if layer == second else update)

        editor._weights.add = failing  # type: ignore[method-assign]
    try:
        editor.edit(wanted)
        message, kind_of = "", ""
    except Exception as error:
        message, kind_of = str(error), type(error).__name__
    after = weights_of(editor)
    editor._weights.__dict__.pop("add", None)
    editor.edit(facts(3, 5))
    return {"message": message, "kind": kind_of, "before": before, "after": after, "records": len(list(editor.records))}


@pytest.mark.parametrize("kind", ["tp", "fsdp"])
@pytest.mark.parametrize(
    ("spoil", "own", "others"),
    [
        ("bad fact", ("ValueError", "distinct ids"), ("RankError", "rank 1 failed: ValueError: Editor.edit: facts")),
        ("another fact", ("ValueError", "must be the same"), ("ValueError", "of_the_arguments must be the same")),
        ("a late layer", ("ValueError", "must be finite"), ("RankError", "rank 1 failed: ValueError: Editor: the upd")),
    ],
)
def test_what_fails_on_one_rank_fails_on_all_and_nothing_is_half_applied(
    kind: str, spoil: str, own: tuple[str, str], others: tuple[str, str]
) -> None:
    found = run(2, _bits, kind, spoil, limit=SLOW)
    for rank, (name, text) in enumerate((others, own)):
        assert found[rank]["kind"] == name, found[rank]["message"]
        assert text in found[rank]["message"]
    for one in found:
        assert one["records"] == 1  # of the good call behind it: the ranks can go on
        for n, weight in one["before"].items():
            assert torch.equal(weight, one["after"][n])


def _undone(ranks: Ranks, kind: str) -> tuple[dict[int, torch.Tensor], ...]:
    editor = editor_of(kind, ranks)
    first = weights_of(editor)
    editor.edit(facts(2))
    second = weights_of(editor)
    editor.edit(facts(2, 5))
    editor.undo()
    third = weights_of(editor)
    editor.reset()
    return first, second, third, weights_of(editor)


@pytest.mark.parametrize("kind", ["tp", "fsdp"])
def test_undo_and_reset_go_back_to_the_bit(kind: str) -> None:
    for first, second, third, fourth in run(2, _undone, kind, limit=SLOW):
        for n, weight in first.items():
            assert torch.equal(fourth[n], weight)
            assert torch.equal(third[n], second[n])
            assert not torch.equal(second[n], weight)


def _dying(ranks: Ranks, results: str) -> str:
    """One process fails, and ends, while the others wait for it in a collective of the model."""
    editor = editor_of("tp", ranks)
    before = {n: editor.adapter.rows(n).clone() for n in editor.config.layers}
    if ranks.rank == 1:
        editor._find_targets = lambda *_args, **_more: 1 / 0  # type: ignore[assignment, return-value]
    try:
        editor.edit(facts(2))
        return "nothing"
    except (RankError, ZeroDivisionError) as error:
        same = all(torch.equal(editor.adapter.rows(n), before[n]) for n in before)
        Path(results, str(ranks.rank)).write_text(f"{type(error).__name__} {error} {same}")
        if ranks.rank == 1:
            os._exit(1)
        raise


def test_a_process_that_fails_while_others_wait_for_it_ends_the_edit_of_all(tmp_path: Path) -> None:
    run(3, _dying, str(tmp_path), check=False, limit=SLOW)
    found = [(tmp_path / str(rank)).read_text() for rank in range(3)]
    assert found[1] == "ZeroDivisionError division by zero True"
    for rank in (0, 2):
        assert found[rank].startswith("RankError")
        assert "rank 1 failed: ZeroDivisionError" in found[rank]
        assert found[rank].endswith("True")
