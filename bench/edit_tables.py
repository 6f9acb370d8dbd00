"""Tables of whole edits for README.md and docs/: the demo, streams of edits, and methods side by side."""

from __future__ import annotations

import statistics
from typing import Any

Result = dict[str, Any]


def demo(result: Result) -> str:
    """Scores before and after, and seconds per fact, of the report that `make demo` writes."""
    where, runs = result["environment"], result["runs"]
    columns = [("before", result["before"]["summary"]), *((NAMES[run["method"]], run["summary"]) for run in runs)]
    lines = [
        f"SmolLM2-135M-Instruct, {result['facts']['written']} real facts in batches of {result['options']['batch']}, "
        f"layers {result['config']['layers'][0]} to {result['config']['layers'][-1]}, {where['threads']} CPU threads, "
        f"torch {where['packages']['torch']}; the whole demo took {result['seconds']['total']:.0f} s. Percent, with "
        "standard errors over facts.",
        "",
        "| | " + " | ".join(name for name, _ in columns) + " |",
        "|---" * (len(columns) + 1) + "|",
    ]
    for key in ("efficacy_success", "paraphrase_success", "neighbourhood_success", "score"):
        cells = [f"{100 * s[key]['mean']:.1f} ± {100 * s[key]['stderr']:.1f}" for _, s in columns]
        lines.append(f"| {key.replace('_', ', ')} | " + " | ".join(cells) + " |")
    for stage, label in (("targets", "z*, s per fact"), ("keys", "keys, s per fact"), ("solve", "update, s per fact")):
        cells = ["", *(f"{_per_fact(run, stage):.3f}" for run in runs)]
        lines.append(f"| {label} | " + " | ".join(cells) + " |")
    updates = [statistics.median(batch["seconds"]["solve"] for batch in run["batches"]) for run in runs]
    lines.append("| update of a batch, all layers, median s | | " + " | ".join(f"{t:.3f}" for t in updates) + " |")
    return "\n".join(lines)


NAMES = {"rlsedit": "RLSEdit", "alphaedit_dense": "AlphaEdit as published"}


def _per_fact(run: Result, stage: str) -> float:
    facts = sum(len(batch["ids"]) for batch in run["batches"])
    return float(sum(batch["seconds"][stage] for batch in run["batches"])) / facts


METHODS = {
    "rlsedit": "RLSEdit", "alphaedit": "AlphaEdit", "memit_seq": "MEMIT, sequential", "memit": "MEMIT",
    "ft": "FT", "rome": "ROME",
}  # fmt: skip


def edited_stream(*results: Result) -> str:
    """Scores behind a stream of edits by method, those of its first facts, and the perplexity of other text."""
    runs = [result["run"] for result in results]
    ends = [run["checkpoints"][-1] for run in runs]
    first, oldest = runs[0]["checkpoints"][0], ends[0]["groups"]["first"]["count"]
    lines = [
        "Percent, with standard errors over facts, of the perplexity over windows of its text.",
        "",
        f"| behind {ends[0]['facts']:,} edits | efficacy | generalisation | specificity | score "
        f"| first {oldest}: score | first {oldest}: accuracy | perplexity |",
        "|---" * 8 + "|",
        _stream_row("before", first["groups"]["all"], None, runs[0]["ability"]["before"]),
    ]
    for run, end in zip(runs, ends, strict=True):
        name, groups = METHODS[run["spec"]["method"]], end["groups"]
        lines.append(_stream_row(name, groups["all"], groups["first"], run["ability"]["after"]))
    return "\n".join(lines)


def _stream_row(name: str, scores: Result, first: Result | None, ability: Result) -> str:
    def percent(value: Result) -> str:
        return f"{100 * value['mean']:.1f} ± {100 * value['stderr']:.1f}"

    kinds = ("efficacy_success", "paraphrase_success", "neighbourhood_success", "score")
    cells = [percent(scores["counterfact"][kind]) for kind in kinds]
    cells += ["" if first is None else percent(first["counterfact"][kind]) for kind in ("score", "efficacy_accuracy")]
    text = ability["perplexity"]["perplexity"]
    form = ".1f" if text["mean"] < 1000 else ",.0f"
    cells.append(f"{text['mean']:{form}} ± {text['stderr']:{form}}")
    return f"| {name} | " + " | ".join(cells) + " |"


def compared(*results: Result) -> str:
    """Every method on the same facts: scores, each solve as published beside the one here, and their difference."""
    from rlsedit.methods import list_methods

    about = ("model", "facts", "batch", "text", "before")
    if any(result[name] != results[0][name] for result in results for name in about):
        raise ValueError("the comparisons are of other facts or another model")
    first = results[0]
    count = first["before"]["efficacy_success"]["count"]
    lines = [
        f"{first['model']}, the first {count} facts of `{first['facts']}` in batches of {first['batch']} (batches of "
        "one for ROME and r-ROME), presets; second moments from "
        f"`{first['text']}`. Percent, with standard errors over facts; seconds of all solves on all layers; "
        "difference: |change of W - that of the published solve|, relative, the largest of the layers. Of `rlsedit`, "
        "whose released code is a recursion too, the dense solve of its objective.",
        "",
        "| method | efficacy | paraphrase | neighbourhood | solve as published, s | here, s | ratio | difference |",
        "|---" * 8 + "|",
        _compared_row("before", first["before"]),
    ]
    rows = {row["method"]: row for result in results for row in result["methods"]}
    lines += [_compared_row(f"`{name}`", rows[name]["scores"], rows[name]) for name in list_methods()]
    return "\n".join(lines)


def _compared_row(name: str, scores: Result, row: Result | None = None) -> str:
    kinds = ("efficacy_success", "paraphrase_success", "neighbourhood_success")
    cells = [f"{100 * scores[kind]['mean']:.1f} ± {100 * scores[kind]['stderr']:.1f}" for kind in kinds]
    if row is None or row["published"] is None:
        cells += [""] * 4
    else:
        published, here = row["published"], row["here"]
        cells += [f"{published:.2f}", f"{here:.2f}", f"{published / here:.1f}", f"{row['difference']:.0e}"]
    return f"| {name} | " + " | ".join(cells) + " |"
