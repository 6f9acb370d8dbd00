"""`rlsedit remove`: takes edits out of the model of a folder."""

from __future__ import annotations

import argparse
from pathlib import Path

NAME = "remove"
HELP = "take edits out of an edited model"
DESCRIPTION = (
    "Take edits out of a model: the weights become those of the stream without them, to rounding, without writing it "
    "again. --undo takes back the last steps instead, to the bit. Model and ledger of the folder follow."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """DIR and ids."""
    parser.add_argument("folder", type=Path, metavar="DIR", help="folder that `rlsedit edit --out` has made")
    parser.add_argument("ids", nargs="*", metavar="ID", help="ids of the edits, as `rlsedit log DIR` shows them")
    parser.add_argument(
        "--undo", action="store_true", help="take back the last step (a batch or a removal), to the bit"
    )
    parser.add_argument(
        "--model", metavar="MODEL", help="folder of the model that was edited, where DIR has no model yet"
    )
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, ...; auto takes a GPU if there is one")


def run(args: argparse.Namespace) -> int:
    """Removes and saves."""
    from rlsedit.cli.edit import finish
    from rlsedit.cli.options import device_of, quiet_transformers
    from rlsedit.editor import Editor
    from rlsedit.models import smollm2
    from rlsedit.paths import check_writable
    from rlsedit.report import Console
    from rlsedit.store.folder import store_of
    from rlsedit.store.modelfiles import behind, mend, unfinished
    from rlsedit.store.origin import origin_of

    console = Console()
    if bool(args.ids) == args.undo:
        raise ValueError("ID: name at least one edit, or give --undo alone")
    if not store_of(args.folder).is_dir():
        raise ValueError(f"{args.folder}: holds no edits")
    check_writable("DIR", store_of(args.folder))
    quiet_transformers()
    if args.model is None:
        mend(args.folder)
        if behind(args.folder) is None:
            told = unfinished(args.folder) or f"{args.folder}: the model in the folder is not whole"
            raise ValueError(f"{told}; or name the one that was edited with --model")
    source = args.model or str(args.folder)
    folder = smollm2.cached_copy() if source == "smollm2" else Path(source)
    with console.bar(f"loading {source}", None):
        model, tokenizer = smollm2.load_model(folder, device=device_of(args.device))
    with console.bar(f"edits of {args.folder}", None):
        editor = Editor.resume(args.folder, model, tokenizer)
    try:
        if args.undo:
            gone = editor.undo()
            console.line(f"taken back: {', '.join(gone) or 'the last step'}")
        else:
            editor.remove(args.ids)
            console.line(f"taken out: {', '.join(args.ids)}")
        finish(console, editor, source, args.folder, origin_of(args.folder, args.model), {}, [])
    finally:
        editor.close()
    return 0
