"""`rlsedit export`: an edited model as a folder, as a delta, or as a LoRA adapter."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlsedit.cli.options import (
    blamed,
    check_outputs,
    device_of,
    measurable,
    place,
    positive,
    quiet_transformers,
    read_facts,
)  # fmt: skip

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rlsedit.export import Change, Checkpoint

NAME = "export"
HELP = "hand an edited model on: as a folder, a delta or a LoRA adapter"
DESCRIPTION = (
    "Compare an edited model with its base and write the difference: as a Hugging Face folder (hf), as one file that "
    "needs the base (delta), or as an adapter for PEFT and vLLM (lora). In the place of the edited model a delta may "
    "be given, which is then applied to the base; any other base is refused."
)
EXAMPLES = (
    "rlsedit export DIR --to lora --out ADAPTER",
    "rlsedit export DIR --to delta --out edits.safetensors",
)
_REPORTS = ("rlsedit-report.json", "rlsedit-export.json")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """EDITED, its base, and what is to be written."""
    parser.add_argument("edited", metavar="EDITED", type=Path, help="folder of the edited model, or a delta file")
    parser.add_argument("--to", required=True, choices=("hf", "delta", "lora"), help="what is written")
    parser.add_argument("--out", required=True, type=place, metavar="PATH", help="folder, or file for a delta")
    parser.add_argument(
        "--base", metavar="BASE", help="folder of the model before the edits, or smollm2 (default: what EDITED names)"
    )
    parser.add_argument("--force", action="store_true", help="replace --out if it is there")
    group = parser.add_argument_group("--to hf")
    group.add_argument(
        "--link", action="store_true",
        help="hard links in the place of copies of weight files that stay as they are; then change neither in place",
    )  # fmt: skip
    group = parser.add_argument_group("--to delta")
    group.add_argument(
        "--form", choices=("auto", "bits", "factors"), default="auto",
        help="bits come back exactly; factors are exact to rounding; auto takes what is smaller (default auto)",
    )  # fmt: skip
    group = parser.add_argument_group("--to lora")
    group.add_argument("--rank", type=positive, metavar="R", help="largest rank (default: what is exact to rounding)")
    group.add_argument("--facts", type=Path, metavar="FILE", help="facts whose scores are compared, as for `edit`")
    group.add_argument("--limit", type=positive, metavar="N", help="only the first N facts (default: all)")
    group.add_argument("--skip-bad", action="store_true", help="leave bad records out, with a warning for each")
    group.add_argument("--device", default="auto", metavar="NAME", help="where facts are scored (default auto)")


def run(args: argparse.Namespace) -> int:
    """Compares and writes."""
    from rlsedit.export import Checkpoint
    from rlsedit.report import Console

    _check(args)
    console = Console()
    quiet_transformers()
    with blamed("--base", "model: "):
        base = Checkpoint(args.base)
    with console.bar(f"comparing {args.edited} with {base.folder}", None):
        changes, about = _changes(args, base)
    names = [change.module for change in changes]
    console.line(
        f"edited   {len(names)} weights: " + ", ".join(names if len(names) < 4 else [names[0], "...", names[-1]])
    )
    {"hf": _folder, "delta": _delta, "lora": _lora}[args.to](console, args, base, changes, about)
    return 0


def _check(args: argparse.Namespace) -> None:
    from rlsedit.cli.saving import check_out

    for name, kind in (("link", "hf"), ("rank", "lora"), ("facts", "lora"), ("limit", "lora"), ("skip_bad", "lora")):
        if getattr(args, name) and args.to != kind:
            raise ValueError(f"--{name.replace('_', '-')} goes with --to {kind}, got --to {args.to}")
    if args.form != "auto" and args.to != "delta":
        raise ValueError(f"--form goes with --to delta, got --to {args.to}")
    for name in ("limit", "skip_bad"):
        if getattr(args, name) and args.facts is None:
            raise ValueError(f"--{name.replace('_', '-')} goes with --facts")
    if args.device != "auto" and args.facts is None:
        raise ValueError("--device goes with --facts")
    if not args.edited.exists():
        raise FileNotFoundError(f"EDITED: no folder or delta {args.edited}")
    args.base = _base(args)
    if args.to == "delta":
        if args.edited.is_file():
            raise ValueError(f"EDITED: {args.edited} is a delta already; copy the file")
        if args.out.is_dir():
            raise ValueError(f"--out: {args.out} is a folder, needs a file such as {args.out}/edits.safetensors")
        if args.out.exists() and not args.force:
            raise ValueError(f"--out: {args.out} is there; needs another file, or --force to replace it")
    else:
        if args.out.exists() and args.out.resolve() == args.edited.resolve():
            raise ValueError(f"--out: {args.out} is the edited model itself; needs another folder")
        check_out(args.out, args.force, str(args.base), None)
    check_outputs(args, "out", beside=True, spare=_reads(args))


def _reads(args: argparse.Namespace) -> list[Path]:
    """What --out must not replace: both models, the facts, and of the models' files all but deltas put beside them."""
    from rlsedit.export import load_delta

    found: list[Path] = [args.edited, args.base] + ([] if args.facts is None else [args.facts])
    for folder in (args.edited, args.base):
        if args.out.is_file() and folder.is_dir() and args.out.resolve().parent == folder.resolve():
            try:
                load_delta(args.out)
            except ValueError:
                found.append(args.out)
    return found


def _base(args: argparse.Namespace) -> Path:
    """--base, or the folder that the edited model says it was made from."""
    from rlsedit.models import smollm2
    from rlsedit.store.modelfiles import unfinished
    from rlsedit.store.origin import origin_of

    name = args.base
    if name is None:
        if told := unfinished(args.edited):
            raise FileNotFoundError(told)
        name = origin_of(args.edited).base
        if name is None:
            raise ValueError(f"--base: needed, since {args.edited} does not say which folder it was made from")
        if name != "smollm2" and not Path(name).is_dir():
            raise FileNotFoundError(f"--base: needed, since {args.edited} was made from {name}, which is not there")
    return smollm2.cached_copy() if name == "smollm2" else Path(name)


def _changes(args: argparse.Namespace, base: Checkpoint) -> tuple[list[Change], dict[str, Any]]:
    """The changes, and the method and number of edits where they are known."""
    from rlsedit.export import Checkpoint, Delta, between, delta_changes, load_delta

    with blamed("EDITED", "model: "):
        edited = load_delta(args.edited) if args.edited.is_file() else Checkpoint(args.edited)
    if isinstance(edited, Delta):
        return delta_changes(base, edited), {"method": edited.method, "edits": edited.edits}
    return between(base, edited), _about(args.edited)


def _about(folder: Path) -> dict[str, Any]:
    """Method and number of edits as the folder's report has them, None where it does not say."""
    report = _report(folder)
    facts = report.get("facts")
    written = facts.get("written") if isinstance(facts, dict) else None
    return {"method": report.get("method"), "edits": report.get("edits", written)}


def _report(folder: Path) -> dict[str, Any]:
    """What `rlsedit edit` or `rlsedit export` left in a folder; empty without it."""
    for name in _REPORTS:
        try:
            report = json.loads((folder / name).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        if isinstance(report, dict):
            return report
    return {}


def _folder(
    console: Any, args: argparse.Namespace, base: Checkpoint, changes: Sequence[Change], about: dict[str, Any]
) -> None:
    from rlsedit.export import write_folder

    with console.bar("writing the folder", None):
        write_folder(base, changes, args.out, link=args.link, replace=args.force, facts=about)
    touched = len({base.entries[change.tensor].file for change in changes})
    console.line(f"\nwritten to {args.out}: {touched} of {len(base.files)} weight files differ from the base's")


def _delta(
    console: Any, args: argparse.Namespace, base: Checkpoint, changes: Sequence[Change], about: dict[str, Any]
) -> None:
    from rlsedit.export import save_delta
    from rlsedit.report import table

    with console.bar("writing the delta", None):
        delta = save_delta(base, changes, args.out, form=args.form, **about)
    rows = [(e.name, e.form, "" if e.rank is None else str(e.rank), f"{e.error:.1e}") for e in delta.entries]
    console.line(table(("weight", "form", "rank", "error"), rows, align="llrr"))
    size = args.out.stat().st_size / 2**20
    console.line(f"\nwritten to {args.out}: {size:.1f} MiB, for base {delta.base} only ({delta.fingerprint[:12]})")


def _lora(
    console: Any, args: argparse.Namespace, base: Checkpoint, changes: Sequence[Change], about: dict[str, Any]
) -> None:
    from rlsedit.export import factorise, vllm_rank, write_lora
    from rlsedit.report import table
    from rlsedit.report.scores import score_table

    facts = measurable(read_facts(args), console) if args.facts else []
    with console.bar("factors", None):
        factors = factorise(changes, args.rank)
    scores = _scores(console, args, base, facts, factors) if facts else None
    report = write_lora(factors, args.out, base=str(base.folder), scores=scores, replace=args.force, about=about)
    rows = [
        (layer.module, str(layer.rank), str(layer.rank_of_change), f"{layer.frobenius:.1e}", f"{layer.spectral:.1e}")
        for layer in report.layers
    ]
    console.line(table(("module", "rank", "of", "error, Frobenius", "spectral"), rows))
    if report.exact and changes[0].dtype.itemsize == 2:
        name = str(changes[0].dtype).removeprefix("torch.")
        console.line(f"the error is the rounding of {name} weights, which the factors leave out")
    if scores is not None:
        console.line("\n" + score_table(scores))
        if report.efficacy_loss is not None:
            console.line(f"\nefficacy lost to the rank: {100 * report.efficacy_loss:.1f} points")
    most = vllm_rank(report.rank)
    serve = "too large for vLLM (at most 512)" if most is None else f"vLLM needs max_lora_rank {most}"
    kept = "exact to rounding" if report.exact else "truncated"
    console.line(f"\nwritten to {args.out}: rank {report.rank}, {kept}; {serve}")


def _scores(console: Any, args: argparse.Namespace, base: Checkpoint, facts: list[Any], factors: Any) -> Any:
    from rlsedit.export import evaluate_both
    from rlsedit.models import Adapter, smollm2

    with console.bar(f"loading {base.folder}", None):
        model, tokenizer = smollm2.load_model(base.folder, device=device_of(args.device))
    adapter = Adapter.for_model(model, edit=False)
    with console.bar(f"scoring {len(facts)} facts twice", 1) as bar:
        return evaluate_both(adapter, tokenizer, facts, factors, progress=lambda done, total: bar.update(done / total))
