"""Runs the demonstration from the model's file to the report."""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING

from rlsedit.demo.completions import complete, showcase
from rlsedit.demo.known import Choice, choose_known
from rlsedit.demo.result import DemoOptions, DemoResult, Run
from rlsedit.demo.show import show_result, show_start, write_result
from rlsedit.report import Console
from rlsedit.report.stream import edit_stream

if TYPE_CHECKING:
    from rlsedit.editor import Editor

__all__ = ["run_demo"]

logger = logging.getLogger(__name__)

BASELINE = "alphaedit_dense"
PROMPTS_SHOWN = 4  # relations in the table of completions


def run_demo(options: DemoOptions, console: Console) -> DemoResult:
    """Edits SmolLM2-135M-Instruct with facts about the world and measures what became of it.

    Both methods start from the same weights and write the same stream; the first weights are put back in between.

    Args:
        options: what to do.
        console: where progress and tables are shown.

    Returns:
        The measurements; files are in ``options.out``.

    Raises:
        FileNotFoundError, ImportError: if a package is missing; the message names the pip command.
        ValueError: for options that do not fit.
    """
    from rlsedit.config import EditConfig
    from rlsedit.editor import Editor
    from rlsedit.facts.world import world_facts
    from rlsedit.metrics import evaluate
    from rlsedit.models import Adapter, smollm2
    from rlsedit.moments import second_moments
    from rlsedit.paths import cache_dir
    from rlsedit.texts import installed_prose, read_text

    begin = time.perf_counter()
    took: dict[str, float] = {}
    _check(options)
    texts = read_text(options.text) if options.text else installed_prose(options.tokens)
    stream = world_facts(options.seed)
    if options.facts > len(stream):
        raise ValueError(f"demo: facts must be at most {len(stream)}, got {options.facts}")
    show_start(options, console)

    first = not smollm2.is_cached()
    with console.bar("loading SmolLM2-135M-Instruct" + (", converting it once" if first else ""), None) as bar:
        model, tokenizer = smollm2.load(device=options.device)
    took["load"] = bar.elapsed
    adapter = Adapter.for_model(model)
    config = EditConfig.for_model(model, options.method, **{"seed": options.seed, **dict(options.config)})

    with console.bar("measuring the second moments of the layer inputs", None) as bar:
        moments = second_moments(
            model, tokenizer, config.layers, texts, cache_dir=cache_dir("moments"), adapter=adapter
        )
        where = str(options.text.name) if options.text else "prose of Python's own documentation"
        bar.finish(f"{bar.elapsed:.1f} s, {len(texts)} paragraphs of {where}")
    took["moments"] = bar.elapsed

    with console.bar("choosing facts the model knows", options.facts) as bar:
        choice = choose_known(adapter, tokenizer, stream, options.facts, bar)
        bar.finish(f"{bar.elapsed:.1f} s, asked for {choice.asked} of {len(stream)}, took the first {options.facts}")
    took["choose"] = bar.elapsed
    prompts = showcase(choice.facts, PROMPTS_SHOWN)
    texts_of = [prompt for _, prompt in prompts]
    with console.bar("measuring the model before", 1) as bar:
        before = evaluate(model, tokenizer, choice.facts, adapter=adapter, progress=lambda d, n: bar.update(d / n))
        completions = complete(model, tokenizer, texts_of)
    took["before"] = bar.elapsed

    runs = []
    for method, label, solve in _methods(options.method):
        editor = Editor(model, tokenizer, method, config, moments=moments, adapter=adapter)
        runs.append(_run(editor, label, solve, choice, texts_of, options.batch, console))
        editor.reset()
        took[method] = runs[-1].seconds
    took["total"] = time.perf_counter() - begin
    result = DemoResult(options, config, choice, len(stream), prompts, before, completions, runs, took)
    show_result(result, console)
    if options.out is not None:
        write_result(result, options.out, console)
    return result


def _run(
    editor: Editor, label: str, solve: str, choice: Choice, prompts: list[str], batch: int, console: Console
) -> Run:
    console.heading(f"{label}: writing {len(choice.facts)} facts in batches of {batch}")
    begin = time.perf_counter()
    edit = edit_stream(editor, choice.facts, batch, console, solve=solve)
    with console.bar("  measuring", 1) as bar:
        scores = editor.evaluate(choice.facts, progress=lambda d, n: bar.update(d / n))
        texts = complete(editor.model, editor.tokenizer, prompts)
    spent = time.perf_counter() - begin
    return Run(editor.method.name, label, edit, scores, texts, editor.health(), spent)


def _methods(method: str) -> list[tuple[str, str, str]]:
    """(name, label, what its step is called) of the method asked for and of the baseline."""
    label = "RLSEdit" if method == "rlsedit" else method
    return [(method, label, "recursion"), (BASELINE, "AlphaEdit as published", "solve")]


def _check(options: DemoOptions) -> None:
    from rlsedit.methods import list_methods

    for name in ("facts", "batch", "tokens"):
        if getattr(options, name) < 1:
            raise ValueError(f"demo: {name} must be at least 1, got {getattr(options, name)}")
    if options.method not in list_methods():
        raise ValueError(f"demo: method must be one of {', '.join(list_methods())}, got {options.method!r}")
