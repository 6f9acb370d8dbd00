"""`rlsedit evaluate --plan`: methods over streams of edits, as a folder of tables, figures and one page."""

from __future__ import annotations

import argparse
import textwrap
import time
from pathlib import Path
from typing import Any

from rlsedit.cli.moments import measured, read_given
from rlsedit.cli.options import blamed, check_layers, load_any, read_facts, refuse_unused


def add_plan(group: argparse._ArgumentGroup) -> None:
    """--plan, --from, and what a plan says as flags."""
    group.add_argument("--plan", type=Path, metavar="FILE", help="a plan as TOML; flags change it (docs/evaluation.md)")
    group.add_argument("--from", dest="source", type=Path, metavar="DIR", help="draw a folder again, run nothing")
    group.add_argument(
        "--methods",
        type=_names,
        metavar="LIST",
        help="methods to run, such as rlsedit,alphaedit,memit (default rlsedit)",
    )
    group.add_argument(
        "--only", type=_names, metavar="LIST", default=(),
        help="run these methods of the plan now; another process may run others into the same folder (default: all)",
    )  # fmt: skip
    group.add_argument(
        "--checkpoints", type=_numbers, metavar="LIST",
        help="numbers of facts written at which is measured, such as 100,500; the end always is (default: it alone)",
    )  # fmt: skip
    group.add_argument("--first", type=_number, metavar="N", help="facts whose retention is measured (default 100)")
    group.add_argument(
        "--sample", type=_number, metavar="N", help="facts of a group to measure, 0 for all (default 200)"
    )
    group.add_argument("--seeds", type=_numbers, metavar="LIST", help="of the contexts, one run each (default 0)")
    group.add_argument(
        "--orders", type=_numbers, metavar="LIST", help="0 for that of the file, others shuffle (default 0)"
    )
    group.add_argument(
        "--conflicts", type=_number, metavar="N", help="how often each fact is written again (default 0)"
    )
    group.add_argument("--metrics", type=_names, metavar="LIST", help="counterfact (default), writing")
    group.add_argument(
        "--ability", action="append", default=[], type=_task, metavar="TASK=FILE",
        help="a task of `rlsedit ability`, measured before and behind each stream; may be repeated",
    )  # fmt: skip


def run_streams(args: argparse.Namespace) -> int:
    """Runs what has not been run, and writes the folder."""
    from rlsedit.evaluation import Folder
    from rlsedit.paths import check_writable
    from rlsedit.report import Console

    console = Console()
    if args.source is not None:
        if not args.source.is_dir():
            raise FileNotFoundError(f"--from: no folder {args.source}")
        refuse_unused(args, ("source",), "with --from")
        check_writable("--from", args.source)
        with blamed("--from"):
            return _report(console, Folder(args.source))
    for name in ("compare", "seed"):
        if getattr(args, name) is not None:
            instead = {"compare": "--methods takes the list", "seed": "--seeds takes them"}[name]
            raise ValueError(f"--{name}: has no effect with --plan or --methods; {instead}")
    plan = _plan(args)
    if args.out is None:
        raise ValueError("--out: needs a folder for the results")
    if unknown := set(args.only) - set(plan.methods):
        raise ValueError(f"--only: methods must be of the plan, {', '.join(plan.methods)}; got {sorted(unknown)[0]!r}")
    with blamed("--out"):
        folder = Folder(args.out)
    _run(console, plan, folder, args)
    return _report(console, folder)


def _plan(args: argparse.Namespace) -> Any:
    from dataclasses import fields

    from rlsedit.evaluation import Plan, load_plan, plan_from

    changes = {
        name: getattr(args, name)
        for name in ("methods", "checkpoints", "first", "sample", "seeds", "orders", "conflicts", "metrics", "batch",
                     "limit", "text")
        if getattr(args, name) is not None
    }  # fmt: skip
    if args.skip_bad:
        changes["skip_bad"] = True
    if args.ability:
        changes["ability"] = dict(args.ability)
    for name in ("device", "dtype"):
        if getattr(args, name) != "auto":
            changes[name] = getattr(args, name)
    if args.plan is None:
        if args.model is None or args.facts is None:
            raise ValueError("MODEL and --facts: give both, or --plan FILE")
        own = {**dict(args.settings), **({} if args.layers is None else {"layers": args.layers})}
        return plan_from({"model": args.model, "facts": args.facts, "settings": {"all": own} if own else {}, **changes})
    if args.settings or args.layers is not None:
        raise ValueError("--set and --layers: with --plan they belong into its settings")
    with blamed("--plan"):
        plan = load_plan(args.plan)
    known = {f.name: getattr(plan, f.name) for f in fields(Plan)}
    for name in ("model", "facts"):
        if getattr(args, name) is not None:
            known[name] = getattr(args, name)
    return Plan(**{**known, **changes})


def _run(console: Any, plan: Any, folder: Any, args: argparse.Namespace) -> None:
    from rlsedit.evaluation import run_plan
    from rlsedit.models import Adapter
    from rlsedit.report.environment import environment

    texts = read_given(plan.text, "text" if args.text is None else "--text")
    args.model, args.facts, args.limit, args.skip_bad = plan.model, plan.facts, plan.limit, plan.skip_bad
    args.device, args.dtype = plan.device, plan.dtype
    facts = read_facts(args, "--facts" if args.plan is None else "facts")
    ability = _ability(plan, "--ability" if args.ability else "ability")
    with blamed("--out"):
        folder.check(plan)
    with console.bar(f"loading {plan.model}", None):
        model, tokenizer = load_any(args)
    adapter = Adapter.for_model(model)
    layers = {n for method in plan.methods for n in _layers(adapter, plan, method)}
    folder.begin(plan, environment())  # not before all is known to fit: another plan could not take the folder
    moments = measured(console, adapter, tokenizer, layers, texts)
    runs = sum(not args.only or spec.method in args.only for spec in plan.runs)
    with console.bar(f"{runs} {'run' if runs == 1 else 'runs'} over {len(facts)} facts", 1) as bar:
        begin = time.perf_counter()

        def tell(text: str, share: float) -> None:
            spent = time.perf_counter() - begin
            left = f", about {spent * (1 - share) / share / 60:.0f} min left" if share > 0.01 else ""
            bar.update(share, f"{text}{left}")

        run_plan(
            plan,
            adapter,
            tokenizer,
            facts,
            moments,
            folder,
            ability=ability(adapter, tokenizer),
            tell=tell,
            only=args.only,
        )


def _layers(adapter: Any, plan: Any, method: str) -> tuple[int, ...]:
    from rlsedit.config import EditConfig
    from rlsedit.methods import get_method

    config = EditConfig.for_model(adapter.model, method, **plan.config(method, plan.seeds[0]))
    check_layers(adapter, config, get_method(method), name=f"settings: layers of {method!r}")
    return config.layers


def _ability(plan: Any, name: str) -> Any:
    """What makes the measuring of tasks for a model; every task and file is checked before anything is run."""
    if not plan.ability:
        return lambda adapter, tokenizer: None
    from rlsedit.tasks import list_tasks, run_task

    for task, file in plan.ability.items():
        if task not in list_tasks():
            raise ValueError(f"{name}: task must be one of {', '.join(list_tasks())}, got {task!r}")
        if not file.is_file():
            raise FileNotFoundError(f"{name}: no file {file} for {task}")
    limit = plan.ability_limit or None

    def make(adapter: Any, tokenizer: Any) -> Any:
        from dataclasses import asdict

        def measure(task: str, file: Path) -> dict[str, Any]:
            report = run_task(task, adapter.model, tokenizer, file, limit=limit)
            return {name: asdict(value) for name, value in report.summary.items()}

        return measure

    return make


def _report(console: Any, folder: Any) -> int:
    from rlsedit.evaluation.page import write_report
    from rlsedit.evaluation.tables import tables
    from rlsedit.report import table

    files = write_report(folder)
    records = folder.runs()
    for entry in tables(records):
        console.heading(entry.title)
        console.line(textwrap.fill(entry.about, 100))
        console.line(table(entry.header, entry.rows))
    for record in records:
        if record.error:
            console.line(f"\n{record.spec.name} stopped: {record.error}")
    console.line(f"\nwritten to {folder.path}: {', '.join(files)}")
    return 1 if any(record.error for record in records) else 0


def _number(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"needs a whole number of at least 0, got {text!r}")
    return int(text)


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(_number(part) for part in text.split(","))


def _names(text: str) -> tuple[str, ...]:
    found = tuple(part.strip() for part in text.split(","))
    if not all(found):
        raise argparse.ArgumentTypeError(f"needs names with commas between them, got {text!r}")
    return found


def _task(text: str) -> tuple[str, Path]:
    name, sign, file = text.partition("=")
    if not sign or not name or not file:
        raise argparse.ArgumentTypeError(f"needs TASK=FILE, got {text!r}")
    return name, Path(file)
