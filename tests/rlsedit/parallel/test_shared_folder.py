"""A folder of edits that many processes keep together: written by rank 0, resumed by any number of processes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.editors import facts
from support.language_models import tokenizer
from support.ranks import run
from support.spread_models import editor_of, model_of, weights_of

from rlsedit import Editor
from rlsedit.store.check import problems
from rlsedit.store.errors import StoreError
from rlsedit_kernels.distributed import Ranks
from rlsedit_kernels.errors import RankError

SLOW = 240.0
"""Seconds that a busy machine may need for the first imports of four processes."""

SAME = 1e-10
"""Relative to the change of the weight, float64: the same rows solved with sums in another order."""


def _write(ranks: Ranks | None, kind: str, path: str, states: str = "auto") -> dict[str, Any]:
    editor = editor_of(kind, ranks, states=states)
    first = weights_of(editor)
    editor.edit(facts(2))
    editor.save(path)
    editor.edit(facts(3, 2), batch_size=2)
    found = {
        "first": first,
        "weights": weights_of(editor),
        "ids": [row.fact.id for row in editor.folder.ledger.edits()],
    }  # type: ignore[union-attr]
    editor.close()
    return found


def _go_on(ranks: Ranks | None, kind: str, path: str, states: str = "auto") -> dict[str, Any]:
    model = model_of(kind, ranks, "llama", torch.float64, seed=0)
    with torch.no_grad():  # whatever they hold, they are set
        editor_weights = [p for name, p in model.named_parameters() if "layers.1.mlp.down_proj" in name]
        editor_weights[0].zero_()
    editor = Editor.resume(path, model, tokenizer(), states=states)
    found = {"weights": weights_of(editor), "live": list(editor._journal.index.live)}  # type: ignore[union-attr]
    editor.edit(facts(2, 5))
    editor.undo()
    found["undone"] = weights_of(editor)
    editor.close()
    return found


@pytest.mark.parametrize(
    ("written", "by", "resumed", "at"),
    [("tp", 2, "tp", 2), ("tp", 2, "tp", 3), ("fsdp", 3, "tp", 2), ("tp", 3, "one", 1), ("one", 1, "fsdp", 2)],
)
def test_a_folder_is_resumed_by_another_number_of_processes(
    tmp_path: Path, written: str, by: int, resumed: str, at: int
) -> None:
    path = str(tmp_path / "out")
    first = [_write(None, "one", path)] if by == 1 else run(by, _write, written, path, limit=SLOW)
    assert list(problems(Path(path))) == []
    again = [_go_on(None, "one", path)] if at == 1 else run(at, _go_on, resumed, path, limit=SLOW)
    assert first[0]["ids"] == [f"f{i}" for i in range(5)]
    for one in again:
        assert one["live"] == first[0]["ids"]
        for n, weight in first[0]["weights"].items():
            change = (weight - first[0]["first"][n]).norm()
            assert change > 0
            if (written, by) == (resumed, at):
                assert torch.equal(one["weights"][n], weight)
            assert (one["weights"][n] - weight).norm() <= SAME * change
            assert torch.equal(one["undone"][n], again[0]["undone"][n])
            assert (one["undone"][n] - weight).norm() <= SAME * change


def _full_disk(ranks: Ranks, path: str) -> tuple[str, bool, int]:
    editor = editor_of("fsdp", ranks)
    editor.save(path)
    editor.edit(facts(2))
    before = weights_of(editor)
    if ranks.rank == 0:

        def fails(_record: object) -> None:
            raise OSError(28, "No space left on device", path)

        editor.folder._folder.append = fails  # type: ignore[union-attr, method-assign, assignment]
    try:
        editor.edit(facts(2, 3))
        message = ""
    except (OSError, RankError) as error:
        message = f"{type(error).__name__} {error}"
    same = all(torch.equal(weight, before[n]) for n, weight in weights_of(editor).items())
    editor.close()
    return message, same, len(editor.health())


def test_a_record_that_rank_0_cannot_write_is_taken_back_on_all(tmp_path: Path) -> None:
    first, second = run(2, _full_disk, str(tmp_path / "out"), limit=SLOW)
    assert first[0].startswith("OSError")
    assert second[0].startswith("RankError")
    assert "No space left" in second[0]
    assert first[1]
    assert second[1]


def _fails(*_args: object, **_more: object) -> None:
    raise StoreError("cannot be read")


def _unreadable(ranks: Ranks, path: str) -> list[str]:
    editor = editor_of("fsdp", ranks)
    editor.save(path)
    editor.edit(facts(2))
    folder = editor.folder
    assert folder is not None
    said = []
    asked: list[tuple[str, str, Callable[[], object]]] = [
        ("ledger", "edits", lambda: editor.planned),
        ("journal", "header", lambda: folder.journal.header(1)),
    ]
    for part, name, ask in asked:
        with pytest.MonkeyPatch.context() as patch:
            if ranks.rank == 0:
                patch.setattr(getattr(folder._folder, part), name, _fails)  # type: ignore[union-attr]
            with pytest.raises((StoreError, RankError)) as caught:
                ask()
        said.append(f"{type(caught.value).__name__} {caught.value}")
    editor.edit(facts(1, 3))
    editor.close()
    return said


def test_what_rank_0_cannot_read_fails_on_all_at_once(tmp_path: Path) -> None:
    """The others waited for it until the time limit, and the group had ended."""
    first, second = run(2, _unreadable, str(tmp_path / "out"), limit=SLOW)
    assert first == ["StoreError cannot be read"] * 2
    assert [text.split()[0] for text in second] == ["RankError"] * 2
    assert all("rank 0 failed: StoreError: cannot be read" in text for text in second)


def _missing(ranks: Ranks, path: str) -> str:
    with pytest.raises((OSError, ValueError, RankError)) as caught:
        Editor.resume(path, model_of("tp", ranks, "llama", torch.float64), tokenizer())
    return str(caught.value)


def test_a_folder_that_is_not_there_is_refused_by_all(tmp_path: Path) -> None:
    for message in run(2, _missing, str(tmp_path / "nothing"), limit=SLOW):
        assert "holds no edits" in message
