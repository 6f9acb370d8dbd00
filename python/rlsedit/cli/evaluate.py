"""`rlsedit evaluate`: how well a model knows facts, new or old; and whole evaluations of methods over streams."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path

from rlsedit.cli.comparing import method_list, run_compare
from rlsedit.cli.evaluate_streams import add_plan, run_streams
from rlsedit.cli.moments import add_text
from rlsedit.cli.options import (
    add_facts,
    add_model,
    add_settings,
    check_outputs,
    load_any,
    measurable,
    place,
    positive,
    read_facts,
    refuse_unused,
)  # fmt: skip

NAME = "evaluate"
HELP = "measure facts in a model, or methods over streams of edits"
DESCRIPTION = (
    "Measure the scores of the CounterFact benchmark for facts in a model, edited or not. With --plan or --methods: "
    "write streams of facts by several methods, measure them at checkpoints, and write a folder with tables, figures "
    "and one page."
)
EXAMPLES = (
    "rlsedit evaluate DIR --facts facts.jsonl --out scores.json",
    "rlsedit evaluate MODEL --facts facts.jsonl --compare rlsedit,memit --out table.md",
    "rlsedit evaluate --plan plan.toml --out DIR",
)


_PLAIN = ("model", "facts", "limit", "skip_bad", "device", "dtype", "out")
_COMPARE = (*_PLAIN, "compare", "batch", "text", "layers", "seed", "settings")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """MODEL, the facts and where the report goes."""
    add_model(parser, required=False)  # neither is needed with --plan or --from
    add_facts(parser, required=False)
    parser.add_argument(
        "--out", type=place, metavar="PATH", help="scores and one row for each fact as JSON; of a plan, its folder"
    )
    add_plan(parser.add_argument_group("streams of edits"))
    group = parser.add_argument_group("comparing methods")
    group.add_argument(
        "--compare", type=method_list, metavar="LIST", nargs="?", const="all",
        help="write the facts by each of these methods (all of them by default), from the same weights, and show "
        "scores and each solve as published beside the one here; --out FILE.md writes the table",
    )  # fmt: skip
    group = parser.add_argument_group("streams and comparisons")
    group.add_argument(
        "--batch", type=positive, metavar="N", help="facts of one batch (default 100, of comparisons 20)"
    )
    add_text(group)
    add_settings(group)


def run(args: argparse.Namespace) -> int:
    """Measures and prints."""
    streams = args.source is not None or args.plan is not None or args.methods is not None
    check_outputs(args, "out", file=not streams, spare=() if streams else (args.facts, args.text))
    if streams:
        return run_streams(args)
    if args.model is None or args.facts is None:
        raise ValueError("MODEL and --facts: give both, or --plan FILE, or --from DIR")
    if args.compare is None:
        refuse_unused(args, _PLAIN, "without --plan, --methods or --compare")
    else:
        refuse_unused(args, _COMPARE, "with --compare")
    if args.compare is not None:
        return run_compare(args)
    from rlsedit.metrics import evaluate
    from rlsedit.paths import atomic_write_text
    from rlsedit.report import Console
    from rlsedit.report.scores import finite, score_table

    console = Console()
    facts = read_facts(args)
    with console.bar(f"loading {args.model}", None):
        model, tokenizer = load_any(args)
    facts = measurable(facts, console)
    with console.bar(f"measuring {len(facts)} facts", 1) as bar:
        report = evaluate(model, tokenizer, facts, progress=lambda done, total: bar.update(done / total))
    console.line()
    console.line(score_table({Path(args.model).name or args.model: report}))
    if args.out is not None:
        content = {"model": Path(args.model).name, "facts": args.facts.name, **finite(asdict(report))}
        atomic_write_text(args.out, json.dumps(content, indent=1, ensure_ascii=False) + "\n")
        console.line(f"\nwritten to {args.out}")
    return 0
