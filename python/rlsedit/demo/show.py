"""What the demonstration prints and writes; every figure comes from the measurement."""

from __future__ import annotations

import json
import os
import statistics
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlsedit.paths import atomic_write_text
from rlsedit.report import Console, seconds, table
from rlsedit.report.environment import environment
from rlsedit.report.scores import finite, score_table

if TYPE_CHECKING:
    from rlsedit.demo.result import DemoOptions, DemoResult, Run

__all__ = ["show_result", "show_start", "write_result"]

_NOTES = (
    "percent with standard error over {facts} facts, {prompts} prompts. success: the right answer is likelier than its",
    "rival (new against old for edited facts and paraphrases, the neighbour's own against the new one for neighbours);",
    "accuracy: every token of the right answer is the likeliest; tokens: the share of them that are. score: harmonic",
    "mean of the three successes.",
)
_STAGES = (("targets", "z*"), ("keys", "keys"), ("solve", "update"))


def show_start(options: DemoOptions, console: Console) -> None:
    """Says what is about to happen, and on what."""
    import torch

    import rlsedit_kernels as rk

    ends = [backend.name for backend in rk.backends() if backend.available]
    console.line("rlsedit demo: real facts into a real language model")
    place = f"{options.device} with {torch.get_num_threads()} threads, kernels {ends[0]}"
    console.line(f"{options.facts} facts in batches of {options.batch}, on {place}")
    console.line()


def show_result(result: DemoResult, console: Console) -> None:
    """Prints the tables: scores, completions, times."""
    facts = result.choice.facts
    console.heading("Before and after")
    columns = {"before": result.before, **{run.label: run.scores for run in result.runs}}
    console.line(score_table(columns))
    prompts = sum(1 + len(f.paraphrases) + len(f.neighbours) for f in facts)
    console.line()
    for line in _NOTES:
        console.line(line.format(facts=len(facts), prompts=prompts))

    console.heading("What the model writes")
    _completions(result, console)

    console.heading("Time per fact")
    header = ("", *(word for _, word in _STAGES), "all", "update of a batch")
    console.line(table(header, [_times(run) for run in result.runs]))
    console.line()
    console.line(_cost(result.runs))
    console.line(f"Layers {_span(result.config.layers)}; the whole demo took {result.seconds['total']:.0f} s")


def _completions(result: DemoResult, console: Console) -> None:
    new = {fact.text: fact for fact in result.choice.facts}
    for index, (kind, prompt) in enumerate(result.prompts):
        if kind == "edited":
            fact = new[prompt]
            console.line(("" if index == 0 else "\n") + f"{fact.subject}: {fact.target_true} → {fact.target_new}")
        rows = [("before", result.completions[index]), *((r.label, r.completions[index]) for r in result.runs)]
        width = max(len(label) for label, _ in rows)
        console.line(f"  {kind}: {prompt} ...")
        for label, text in rows:
            console.line(f"    {label:<{width}}  {text}")


def _times(run: Run) -> tuple[str, ...]:
    spent, facts = run.edit.seconds, run.edit.facts
    parts = [seconds(spent[stage] / facts) for stage, _ in _STAGES]
    return (run.label, *parts, seconds(sum(spent.values()) / facts), seconds(_update(run)))


def _update(run: Run) -> float:
    """Median over the batches of the seconds that the update of all layers took."""
    return statistics.median(batch.seconds["solve"] for batch in run.edit.batches)


def _cost(runs: list[Run]) -> str:
    ours, published = _update(runs[0]), _update(runs[1])
    share = runs[0].edit.seconds["targets"] / sum(runs[0].edit.seconds.values())
    return (
        f"The update of a batch, all layers, median over the batches: {seconds(ours)} by the recursion, "
        f"{seconds(published)} by the published solve ({published / ours:.1f} to 1).\n"
        f"z* takes {100 * share:.0f} % of the time of an edit."
    )


def _span(layers: tuple[int, ...]) -> str:
    whole = list(layers) == list(range(layers[0], layers[-1] + 1)) and len(layers) > 1
    return f"{layers[0]} to {layers[-1]}" if whole else ", ".join(map(str, layers))


def write_result(result: DemoResult, out: Path, console: Console) -> None:
    """Writes facts, plot, report and the printed text into `out`, which is created."""
    from rlsedit.facts import save_facts
    from rlsedit.report.plots import plot_objective

    out.mkdir(parents=True, exist_ok=True)
    save_facts(result.choice.facts, out / "facts.jsonl")
    title = f"SmolLM2-135M-Instruct, {len(result.choice.facts)} facts, layers {_span(result.config.layers)}"
    plot_objective({run.label: run.edit.batches for run in result.runs}, out / "objective.png", title)
    atomic_write_text(out / "report.json", json.dumps(_report(result), indent=1, ensure_ascii=False) + "\n")
    console.line()
    console.line(f"written to {out}{os.sep}: objective.png, report.json, report.txt, facts.jsonl")
    atomic_write_text(out / "report.txt", console.transcript())


def _report(result: DemoResult) -> dict[str, Any]:
    options = {name: str(v) if isinstance(v, Path) else v for name, v in asdict(result.options).items()}
    options.pop("out")
    return {
        "environment": environment(),
        "options": options,
        "config": asdict(result.config),
        "facts": {"available": result.available, "asked": result.choice.asked, "written": len(result.choice.facts)},
        "seconds": result.seconds,
        "before": finite(asdict(result.before)),
        "runs": [
            {
                "method": run.method,
                **finite(asdict(run.scores)),
                "batches": [asdict(batch) for batch in run.edit.batches],
                "health": {str(layer): entry for layer, entry in run.health.items()},
            }
            for run in result.runs
        ],
        "completions": [
            {
                "kind": kind,
                "prompt": prompt,
                "before": result.completions[index],
                **{run.method: run.completions[index] for run in result.runs},
            }
            for index, (kind, prompt) in enumerate(result.prompts)
        ],
    }
