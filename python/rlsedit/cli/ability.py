"""`rlsedit ability`: what a model can do beside the facts that are written into it."""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlsedit.cli.options import add_model, blamed, check_outputs, load_any, natural, place, positive

if TYPE_CHECKING:
    from rlsedit.metrics.estimate import Estimate
    from rlsedit.tasks import TaskReport

NAME = "ability"
HELP = "measure perplexity, GLUE, MMLU, GSM8K, HumanEval, MBPP and known facts from local files"
DESCRIPTION = "Measure what a model, edited or not, can do beside the facts that are written into it, from local files."
EXAMPLES = ("rlsedit ability DIR --task perplexity=valid.txt sst=sst2.jsonl --limit 200 --out ability.json",)
NAMES = ("perplexity", "sst", "mrpc", "cola", "rte", "nli", "mmlu", "gsm8k", "humaneval", "mbpp", "known")

_PLAIN = ("perplexity", "nll", "bits_per_byte")


def named_file(text: str) -> tuple[str, Path]:
    """NAME=PATH."""
    name, sign, path = text.partition("=")
    if not sign or not path or name not in NAMES:
        raise argparse.ArgumentTypeError(f"needs NAME=PATH with a name among {', '.join(NAMES)}, got {text!r}")
    return name, Path(path)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """MODEL, the tasks and how they are run."""
    add_model(parser)
    parser.add_argument(
        "--task", action="extend", nargs="+", default=[], type=named_file, metavar="NAME=PATH",
        help=f"a task and the file of its records, in the data set's own fields, .gz or not; tasks: {', '.join(NAMES)}",
    )  # fmt: skip
    parser.add_argument(
        "--limit", type=positive, metavar="N", help="scored records of each task at most (default: all)"
    )
    parser.add_argument(
        "--shots",
        type=natural,
        metavar="N",
        help="solved examples in front of each question (default: that of the task)",
    )
    parser.add_argument("--held-out", type=natural, metavar="N", help="records that are examples only (default 10)")
    parser.add_argument(
        "--new-tokens",
        type=positive,
        metavar="N",
        help="tokens of a written answer at most (default: that of the task)",
    )
    parser.add_argument(
        "--samples", type=positive, metavar="N", help="programs for each problem, for pass@k (default 1)"
    )
    parser.add_argument("--temperature", type=float, metavar="T", help="of several samples (default 0.8)")
    parser.add_argument("--seed", type=natural, metavar="N", help="of the sampling (default 0)")
    parser.add_argument("--window", type=positive, metavar="N", help="of perplexity, in tokens (default 512)")
    parser.add_argument("--stride", type=positive, metavar="N", help="of its windows (default half a window)")
    parser.add_argument("--trust-code", action="store_true", help="run generated code though it is not fully shut in")
    parser.add_argument("--skip-bad", action="store_true", help="leave bad records out, with a warning for each")
    parser.add_argument("--lm-eval", nargs="+", default=[], metavar="TASK", help="tasks that lm-eval runs instead")
    parser.add_argument("--out", type=place, metavar="FILE", help="write scores and one row for each record as JSON")


def run(args: argparse.Namespace) -> int:
    """Measures and prints; every file is read before the model is, and `--out` is written after each task."""
    from rlsedit.models import Adapter
    from rlsedit.report import Console, table
    from rlsedit.tasks import TASKS, run_task

    if not args.task and not args.lm_eval:
        raise ValueError("--task: needs at least one NAME=PATH (or --lm-eval TASK)")
    names = [name for name, _ in args.task]
    if len(set(names)) < len(names):
        raise ValueError(f"--task: each task once, got {', '.join(names)}")
    check_outputs(args, "out", file=True, spare=[path for _, path in args.task])
    console, options = Console(), _options(args)
    with blamed("--task"):
        records = {name: TASKS[name].load(path, "skip" if args.skip_bad else "raise") for name, path in args.task}
    if args.lm_eval:
        from rlsedit.tasks.lm_eval import lm_eval_available, run_lm_eval

        if not lm_eval_available():
            raise ImportError("--lm-eval: the package lm-eval is not installed; --task needs local files only")
    with console.bar(f"loading {args.model}", None):
        model, tokenizer = load_any(args)
    adapter = Adapter.for_model(model, edit=False)
    found: dict[str, tuple[TaskReport, float]] = {}
    for name, path in args.task:
        begin = time.perf_counter()
        with console.bar(f"{name} on {path.name}", 1) as bar:
            report = run_task(
                name, model, tokenizer, records=records[name], options=options, adapter=adapter,
                progress=lambda done, total: bar.update(done / total),
            )  # fmt: skip
        found[name] = report, time.perf_counter() - begin
        _save(args, found)
    for name in args.lm_eval:
        begin = time.perf_counter()
        with console.bar(f"{name} by lm-eval", None):
            reports = run_lm_eval([name], model, tokenizer, limit=args.limit, shots=args.shots)
        found |= {f"{own} (lm-eval)": (report, time.perf_counter() - begin) for own, report in reports.items()}
        _save(args, found)
    console.line()
    rows = [row for name, (report, _) in found.items() for row in _rows(name, report)]
    console.line(table(("task", "score", "value", "95 %", "n"), rows, align="llrrr"))
    for name, (report, _) in found.items():
        if cut := report.settings.get("fewer_shots"):
            console.line(f"{name}: {cut} questions had room for fewer examples than {report.settings['shots']}")
    if args.out is not None:
        console.line(f"\nwritten to {args.out}")
    return 0


def _options(args: argparse.Namespace) -> Any:
    from rlsedit.tasks import TaskOptions

    names = ("limit", "shots", "held_out", "new_tokens", "samples", "temperature", "seed", "window", "stride")
    given = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    if "window" in given and "stride" not in given:
        given["stride"] = max(1, given["window"] // 2)
    return TaskOptions(trust_code=args.trust_code, **given)


def _rows(name: str, report: TaskReport) -> list[tuple[str, ...]]:
    return [
        (name if first else "", score, _value(score, value), _interval(score, value), str(value.count))
        for first, (score, value) in ((i == 0, item) for i, item in enumerate(report.summary.items()))
    ]


def _value(score: str, value: Estimate) -> str:
    from rlsedit.report.tables import estimate

    if score not in _PLAIN:
        return estimate(value.mean, value.stderr)
    return f"{value.mean:.4g}" + ("" if math.isnan(value.stderr) else f" ± {value.stderr:.2g}")


def _interval(score: str, value: Estimate) -> str:
    if math.isnan(value.low) or math.isnan(value.high):
        return "n/a"
    if score in _PLAIN:
        return f"{value.low:.4g} to {value.high:.4g}"
    return f"{100 * value.low:.1f} to {100 * value.high:.1f}"


def _save(args: argparse.Namespace, found: dict[str, tuple[TaskReport, float]]) -> None:
    if args.out is None:
        return
    from dataclasses import asdict

    from rlsedit.paths import atomic_write_text
    from rlsedit.report.environment import environment
    from rlsedit.report.scores import finite

    files = {name: path.name for name, path in args.task}
    tasks = {
        name: {"file": files.get(name), "seconds": seconds, **asdict(report)}
        for name, (report, seconds) in found.items()
    }
    content = {
        "schema": "rlsedit-ability/1",
        "model": Path(args.model).name or args.model,
        "environment": environment(),
        "options": asdict(_options(args)),
        "tasks": tasks,
    }
    atomic_write_text(args.out, json.dumps(finite(content), indent=1, ensure_ascii=False) + "\n")
