"""`rlsedit remove`: takes edits out of the model of a folder."""

from __future__ import annotations

import argparse
from collections import Counter
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

from rlsedit.cli.launch import add_parallel, load_spread, rank, started
from rlsedit.cli.options import add_device

if TYPE_CHECKING:
    from rlsedit_kernels.distributed import Ranks

NAME = "remove"
HELP = "take edits out of an edited model"
DESCRIPTION = (
    "Take edits out of a model: the weights become those of the stream without them, to rounding, without writing it "
    "again. --undo takes back the last step instead, to the bit. Model and ledger of the folder follow."
)
EXAMPLES = (
    "rlsedit remove DIR ID ID",
    "rlsedit remove DIR --undo",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """DIR and ids."""
    parser.add_argument("folder", type=Path, metavar="DIR", help="folder that `rlsedit edit --out` has made")
    parser.add_argument("ids", nargs="*", metavar="ID", help="ids of the edits, as `rlsedit log DIR` shows them")
    parser.add_argument(
        "--undo", action="store_true", help="take back the last step (a batch or a removal), to the bit"
    )
    parser.add_argument(
        "--base",
        metavar="BASE",
        help="folder of the model before the edits, or smollm2, for a DIR that has no model yet",
    )
    add_device(parser)
    add_parallel(parser)


def run(args: argparse.Namespace) -> int:
    """Removes and saves; in all processes that torchrun has started."""
    with started(args) as ranks:
        return _run(args, ranks)


def _run(args: argparse.Namespace, ranks: Ranks | None) -> int:
    from rlsedit.cli.edit import finish
    from rlsedit.cli.options import load_any
    from rlsedit.editor import Editor
    from rlsedit.report import Console
    from rlsedit.store.origin import origin_of

    console = Console()
    with ranks.together("remove") if ranks is not None else nullcontext():
        _check(args)
    given = args.base
    args.model = args.base or str(args.folder)
    with console.bar(f"loading {args.model}", None):
        model, tokenizer = load_any(args, "DIR" if given is None else "--base") if ranks is None else load_spread(args)
    with console.bar(f"edits of {args.folder}", None):
        editor = Editor.resume(args.folder, model, tokenizer, states=args.states)
    try:
        if args.undo:
            gone = editor.undo()
            console.line(f"taken back: {', '.join(gone) or 'the last step'}")
        else:
            editor.remove(args.ids)
            console.line(f"taken out: {', '.join(args.ids)}")
        finish(console, editor, args.model, args.folder, origin_of(args.folder, given), {}, [])
    finally:
        editor.close()
    return 0


def _check(args: argparse.Namespace) -> None:
    """Refuse what cannot be done before anything is loaded; rank 0 mends the model in the folder."""
    from rlsedit.paths import check_writable
    from rlsedit.store.folder import store_of
    from rlsedit.store.modelfiles import behind, mend, unfinished

    if bool(args.ids) == args.undo:
        raise ValueError("ID: name at least one edit, or give --undo alone")
    if not store_of(args.folder).is_dir():
        raise ValueError(f"DIR: {args.folder} holds no edits")
    check_writable("DIR", store_of(args.folder))
    if rank() == 0:
        _check_ids(args.folder, args.ids)
    if args.base is None and rank() == 0:
        mend(args.folder)
        if behind(args.folder) is None:
            told = unfinished(args.folder) or f"{args.folder}: the model in the folder is not whole"
            raise ValueError(f"{told}; or name the one before the edits with --base")


def _check_ids(folder: Path, ids: list[str]) -> None:
    """Refuse ids that the model does not hold, before it is loaded."""
    from rlsedit.store.check import reading

    if not ids:
        return
    if twice := [name for name, count in Counter(ids).items() if count > 1]:
        raise ValueError(f"ID: needs each edit once, got {twice[0]!r} again")
    with reading(folder) as (ledger, _):
        rows = ledger.edits()
    inside, states = {row.fact.id for row in rows if row.state == "applied"}, {row.fact.id: row.state for row in rows}
    if unknown := [name for name in ids if name not in inside]:
        told = f"which is {states[unknown[0]]}" if unknown[0] in states else "of which the folder knows nothing"
        raise ValueError(f"ID: must be an edit that is in the model, got {unknown[0]!r}, {told}")
