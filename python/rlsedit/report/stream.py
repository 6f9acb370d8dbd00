"""Writes a stream of facts batch by batch, with a progress bar for each."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rlsedit.report.console import Console
from rlsedit.report.tables import seconds

if TYPE_CHECKING:
    from rlsedit.editor import Editor
    from rlsedit.facts import Fact
    from rlsedit.reports import EditReport, Progress
    from rlsedit.store.conflicts import OnConflict

__all__ = ["edit_stream"]

_TARGETS = 0.9  # share of the bar that stands for z*, which takes most of the time
_WORDS = {"targets": "z*", "keys": "keys", "solve": "recursion", "batch": "written"}


def edit_stream(
    editor: Editor,
    facts: Sequence[Fact],
    batch: int,
    console: Console,
    *,
    solve: str = "recursion",
    on_conflict: OnConflict = "keep-both",
) -> EditReport:
    """Calls `editor.edit` for one batch after the other and leaves a line with the figures of each.

    Args:
        editor: holds the state from batch to batch.
        facts: what is written, at least one.
        batch: facts of one batch, at least 1.
        console: where bars and lines are shown.
        solve: what the step that computes the update is called.
        on_conflict: as for `Editor.edit`.

    Returns:
        The reports of all batches in one.
    """
    from rlsedit.reports import EditReport

    whole = EditReport(editor.method.name)
    count = -(-len(facts) // batch)
    width = len(str(count))
    for index in range(count):
        part = facts[index * batch : (index + 1) * batch]
        with console.bar(f"  batch {index + 1:>{width}} of {count}", 1) as bar:

            def show(event: Progress) -> None:
                share = event.done / max(1, event.total)
                at = _TARGETS * share if event.stage == "targets" else _TARGETS + (1 - _TARGETS) * share
                bar.update(at, _WORDS.get(event.stage, event.stage))

            last = index == count - 1
            report = editor.edit(part, batch_size=len(part), progress=show, finish=last, on_conflict=on_conflict)
            for done in report.batches:
                spent = done.seconds
                bar.finish(
                    f"{len(done.ids):>3} facts, {sum(spent.values()):5.1f} s"
                    f" (z* {seconds(spent['targets'])} in {done.steps:.1f} steps, keys {seconds(spent['keys'])},"
                    f" {solve} {seconds(spent['solve'])}), loss of z* {done.target_loss:.3f}"
                )
        whole.batches += report.batches
    return whole
