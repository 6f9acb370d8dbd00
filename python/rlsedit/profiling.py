"""What whole edits of a real model cost, stage by stage, method by method."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rlsedit_kernels.profile import Profile, Row, StageRow, Times, ceilings, machine

from .config import EditConfig
from .editor import Editor
from .facts import Fact
from .models.adapter import Adapter
from .reports import BatchReport, Progress

__all__ = ["profile_edit"]

STAGES = {
    "targets": "optimising z*",
    "keys": "keys and present outputs",
    "solve": "change of the weights and of the state",
    "report": "terms of the objective",
}


def profile_edit(
    model: Any,
    tokenizer: Any,
    facts: Sequence[Fact],
    methods: Mapping[str, EditConfig],
    moments: Mapping[int, Tensor],
    *,
    batch_size: int,
    adapter: Adapter | None = None,
    trace: Path | None = None,
    progress: Callable[[str, Progress], None] | None = None,
) -> Profile:
    """Write the same facts by each method, from the same weights, and put the seconds of its stages into rows.

    The methods run one after the other: they edit the same model, and its first weights are put back in between.
    Batches smaller than `batch_size` are written and not counted, unless there are no others.

    Args:
        model, tokenizer: as for `Editor`; the weights are what they were when this returns.
        facts: at least one.
        methods: configuration by name; the first is what ratios refer to.
        moments: as for `Editor`, of all layers that are edited.
        batch_size: facts of one batch, at least 1.
        adapter: of the model.
        trace: a folder; torch.profiler's trace of one batch of each method is written there, to be opened in Perfetto
            or chrome://tracing.
        progress: called with the method and the editor's events.

    Raises:
        ValueError: no facts or methods, or what `Editor` refuses.
    """
    if not facts or not methods:
        raise ValueError("profile_edit: facts and methods must hold at least one each")
    if batch_size < 1:
        raise ValueError(f"profile_edit: batch_size must be at least 1, got {batch_size}")
    adapter = adapter or Adapter.for_model(model)
    rows: list[Row] = []
    for name, config in methods.items():
        editor = Editor(model, tokenizer, name, config, moments=moments, adapter=adapter, record=False)
        try:
            done = _written(editor, facts, batch_size, trace, progress)
        finally:
            editor.reset()
        base = rows[0].times.median if rows and rows[0].times else None
        rows.append(_row(editor, done, len(facts), base))
    settings = {"facts": len(facts), "batch": batch_size, "baseline": rows[0].name}
    device = adapter.device
    return Profile("edit", machine(device), ceilings(device), settings, tuple(rows))


def _written(
    editor: Editor,
    facts: Sequence[Fact],
    batch_size: int,
    trace: Path | None,
    progress: Callable[[str, Progress], None] | None,
) -> list[BatchReport]:
    name = editor.method.name
    done: list[BatchReport] = []
    parts = [facts[i : i + batch_size] for i in range(0, len(facts), batch_size)]
    traced = None if trace is None else min(1, len(parts) - 1)  # the first batch makes what the others find
    for index, part in enumerate(parts):
        with _tracing(trace, name) if index == traced else contextlib.nullcontext(_Spans(None)) as spans:

            def show(event: Progress, spans: _Spans = spans) -> None:
                spans.enter(event.stage)
                if progress is not None:
                    progress(name, event)

            report = editor.edit(part, batch_size=len(part), progress=show, finish=index == len(parts) - 1)
        if index != traced or len(parts) == 1:  # a traced batch is slower
            done.extend(report.batches)
    return done


class _Spans:
    """Ranges of a trace that carry the names of the stages."""

    def __init__(self, profiler: Any) -> None:
        self._on = profiler is not None
        self._name: str | None = None
        self._range: Any = None

    def enter(self, name: str) -> None:
        if self._on and name != self._name:
            self.leave()
            self._name = name
            if name in STAGES:
                self._range = torch.profiler.record_function(f"rlsedit: {name}")
                self._range.__enter__()

    def leave(self) -> None:
        if self._range is not None:
            self._range.__exit__(None, None, None)
            self._range = None


@contextlib.contextmanager
def _tracing(folder: Path | None, name: str) -> Iterator[_Spans]:
    assert folder is not None
    folder.mkdir(parents=True, exist_ok=True)
    with torch.profiler.profile() as profiler:
        spans = _Spans(profiler)
        try:
            yield spans
        finally:
            spans.leave()
    profiler.export_chrome_trace(str(folder / f"{name}.json.gz"))


def _row(editor: Editor, done: list[BatchReport], facts: int, base: float | None) -> Row:
    size = max(len(report.ids) for report in done)
    counted = [report for report in done if len(report.ids) == size]
    times = Times.of([sum(report.seconds.values()) for report in counted])
    stages = tuple(
        StageRow(stage, Times.of([report.seconds.get(stage, 0.0) for report in counted]).median, 0.0, 0.0, None)
        for stage in STAGES
    )
    layers = editor.config.layers
    d, v = editor.adapter.rows(layers[0]).shape
    weight = editor.adapter.rows(layers[0])
    problem = {
        "d": d,
        "v": v,
        "u": size,
        "layers": len(layers),
        "dtype": str(weight.dtype).removeprefix("torch."),
        "device": str(weight.device),
        "history": 0,
        "model": type(editor.model).__name__,
        "facts": facts,
    }
    ratio = 1.0 if base is None else times.median / base
    return Row(editor.method.name, editor.method.summary, "measured", "", problem, times, ratio, stages)
