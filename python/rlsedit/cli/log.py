"""`rlsedit log`: lists the edits of a folder, shows one with its present success, checks all files."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlsedit.cli.options import add_device, positive

if TYPE_CHECKING:
    from rlsedit.store.ledger import Edit

NAME = "log"
HELP = "list the edits of a folder, show one, check all files"
DESCRIPTION = (
    "List the edits that `rlsedit edit` has written into a folder, show one with its success in the model as it is, or "
    "check every file. Nothing is changed; it works while another process writes."
)
EXAMPLES = (
    "rlsedit log DIR --state applied --last 20",
    "rlsedit log DIR ID",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """DIR, an id, and filters."""
    parser.add_argument("folder", type=Path, metavar="DIR", help="folder that `rlsedit edit --out` has made")
    parser.add_argument("id", nargs="?", metavar="ID", help="show this edit, and measure it on the model in the folder")
    parser.add_argument("--state", choices=("planned", "applied", "removed", "failed"), help="only edits in this state")
    parser.add_argument("--step", type=positive, metavar="N", help="only edits of this step")
    parser.add_argument("--find", metavar="TEXT", help="only edits whose request holds this text")
    parser.add_argument("--last", type=positive, metavar="N", help="only the last N of them")
    parser.add_argument(
        "--json", action="store_true",
        help="requests with their states as JSON lines; with --state applied what --facts of a new folder should read",
    )  # fmt: skip
    parser.add_argument("--check", action="store_true", help="check hashes; exit status 1 if a file is damaged")
    parser.add_argument("--no-evaluate", action="store_true", help="of one edit, do not measure its success")
    add_device(parser, dtype=None)


def run(args: argparse.Namespace) -> int:
    """Lists, shows or checks."""
    from rlsedit.report import Console
    from rlsedit.store.check import reading
    from rlsedit.store.folder import STORE, store_of

    console = Console()
    filters = [name for name in ("id", "state", "step", "find", "last", "json") if getattr(args, name)]
    if args.check and filters:
        raise ValueError(f"--check: reads all files; leave out {_option(filters[0])}")
    if not store_of(args.folder).is_dir():
        raise ValueError(f"DIR: {args.folder} holds no edits (no folder {STORE} in it)")
    if args.check:
        return _check(console, args.folder)
    with reading(args.folder) as (ledger, note):
        if note:
            console.line(f"note: {note}")
        rows = ledger.edits(state=args.state, name=args.id, batch=args.step, text=args.find, limit=args.last)
        counts = ledger.counts()
    if args.id is not None and not rows:
        like = f" that fits {', '.join(map(_option, filters[1:]))}" if filters[1:] else ""
        raise ValueError(f"ID: {args.folder} has no edit {args.id!r}{like}")
    if args.id is not None and not args.json:
        _show(console, rows, args)
        return 0
    if args.json:
        for row in rows:
            console.line(json.dumps({**row.fact.to_dict(), "state": row.state}, ensure_ascii=not console.unicode))
        return 0
    _list(console, rows, counts)
    return 0


def _option(name: str) -> str:
    return "ID" if name == "id" else f"--{name}"


def _check(console: Any, folder: Path) -> int:
    from rlsedit.store.check import problems

    found = problems(folder)
    for problem in found:
        console.line(problem)
    console.line(f"{len(found)} {'problem' if len(found) == 1 else 'problems'}" if found else "all files are whole")
    return 1 if found else 0


def _list(console: Any, rows: list[Edit], counts: dict[str, int]) -> None:
    from rlsedit.report.tables import table

    cells = [
        (row.fact.id, row.state, "" if row.batch is None else str(row.batch), row.time.removesuffix("+00:00"),
         f"{row.fact.text} {row.fact.target_new}" + (f"  ({row.reason})" if row.reason else ""))
        for row in rows
    ]  # fmt: skip
    console.line(table(("id", "state", "step", "time (UTC)", "edit"), cells, align="llrll", limit=120))
    total = ", ".join(f"{count} {state}" for state, count in counts.items())
    console.line(f"\n{len(rows)} shown; in the folder {total or 'no edits'}")


def _show(console: Any, rows: list[Edit], args: argparse.Namespace) -> None:
    for row in rows:
        console.line(f"id       {row.fact.id}" + ("" if row.whole else "   (this row and its hash differ)"))
        for name, value in row.fact.to_dict().items():
            if name != "id":
                console.line(f"{name:<8} {json.dumps(value, ensure_ascii=not console.unicode)}")
        console.line(f"state    {row.state}" + (f" by step {row.batch}" if row.batch is not None else ""))
        if row.removed_by is not None:
            console.line(f"         taken out by step {row.removed_by}")
        if row.reason:
            console.line(f"reason   {row.reason}")
        console.line(f"time     {row.time}")
        console.line()
    if not args.no_evaluate:
        _measure(console, rows[-1], args)


def _measure(console: Any, row: Edit, args: argparse.Namespace) -> None:
    from rlsedit.cli.options import device_of, quiet_transformers
    from rlsedit.metrics import evaluate
    from rlsedit.models import smollm2
    from rlsedit.report.scores import score_table
    from rlsedit.store.folder import store_of
    from rlsedit.store.modelfiles import behind, unfinished

    step = behind(args.folder)
    if step is None:
        console.line(unfinished(args.folder) or f"{args.folder}: the model in the folder is not whole")
        return
    last = max((int(p.name[:6]) for p in (store_of(args.folder) / "records").glob("0*")), default=0)
    quiet_transformers()
    model, tokenizer = smollm2.load_model(args.folder, device=device_of(args.device))
    report = evaluate(model, tokenizer, [row.fact])
    console.line(f"success in the model in the folder (behind step {step} of {last}):")
    console.line(score_table({"now": report}))
