"""`rlsedit edit`: writes facts into a model on disk."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from rlsedit.cli.options import (
    add_facts,
    add_model,
    add_settings,
    check_layers,
    config_for,
    load_any,
    positive,
    read_facts,
)  # fmt: skip

NAME = "edit"
HELP = "write facts into a model and save it"
DESCRIPTION = (
    "Write facts into a causal LM and save it as a folder that from_pretrained loads. The folder appears whole or not "
    "at all; the dtype of the weights stays and the tokenizer comes along."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """MODEL, the facts, where the result goes and how it is made."""
    add_model(parser)
    add_facts(parser)
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="folder of the edited model")
    parser.add_argument("--force", action="store_true", help="replace --out if it is there")
    parser.add_argument("--method", default="rlsedit", help="see `rlsedit methods` (default rlsedit)")
    parser.add_argument("--batch", type=positive, metavar="N", help="facts of one batch (default: that of the preset)")
    parser.add_argument(
        "--text", type=Path, metavar="FILE",
        help="text on which the second moments are measured (default: the prose of Python's documentation)",
    )  # fmt: skip
    add_settings(parser)
    parser.add_argument("--no-evaluate", action="store_true", help="do not measure the scores before and after")
    parser.add_argument("--dry-run", action="store_true", help="show what would be done, and do nothing")


def run(args: argparse.Namespace) -> int:
    """Edits and saves."""
    from rlsedit.cli.saving import check_out
    from rlsedit.methods import get_method
    from rlsedit.models import Adapter
    from rlsedit.report import Console

    console = Console()
    method = get_method(args.method)
    check_out(args.out, args.force, args.model)
    if args.text is not None and not args.text.is_file():
        raise FileNotFoundError(f"--text: no file {args.text}")
    facts = read_facts(args)
    with console.bar(f"loading {args.model}", None):
        model, tokenizer = load_any(args)
    adapter = Adapter.for_model(model)
    config = config_for(model, args)
    check_layers(adapter, config)
    batch = args.batch or config.batch_size
    _plan(console, adapter, config, method, len(facts), batch, args)
    if args.dry_run:
        return 0
    _edit(console, adapter, tokenizer, config, facts, batch, args)
    return 0


def _plan(console: Any, adapter: Any, config: Any, method: Any, facts: int, batch: int, args: Any) -> None:
    weight = adapter.rows(config.layers[0])
    d, v = weight.shape
    state = 8 if str(weight.dtype).endswith("float64") else 4
    console.line(f"model    {type(adapter.model).__name__}, {adapter.num_layers} layers, on {weight.device}")
    console.line(f"edits    {adapter.module} of layers {', '.join(map(str, config.layers))}: {d} x {v}, {weight.dtype}")
    console.line(f"method   {method.name}: {method.summary}")
    batches = -(-facts // batch)
    console.line(f"facts    {facts} in {batches} {'batch' if batches == 1 else 'batches'} of at most {batch}")
    size = len(config.layers) * d * d * state / 2**20
    console.line(f"state    at most {size:.0f} MiB for {len(config.layers)} layers")
    console.line(f"output   {args.out}" + (" (not written: --dry-run)" if args.dry_run else ""))


def _edit(
    console: Any, adapter: Any, tokenizer: Any, config: Any, facts: list[Any], batch: int, args: argparse.Namespace
) -> None:
    from rlsedit.cli.saving import save_model
    from rlsedit.editor import Editor
    from rlsedit.moments import second_moments
    from rlsedit.paths import cache_dir
    from rlsedit.report.scores import score_table
    from rlsedit.report.stream import edit_stream
    from rlsedit.texts import installed_prose, read_text

    model = adapter.model
    with console.bar("second moments of the layer inputs", None):
        texts = read_text(args.text) if args.text else installed_prose()
        moments = second_moments(
            model, tokenizer, config.layers, texts, cache_dir=cache_dir("moments"), adapter=adapter
        )
    editor = Editor(model, tokenizer, args.method, config, moments=moments, adapter=adapter)
    scores = {}
    if not args.no_evaluate:
        scores["before"] = _measure(console, editor, facts, "measuring the model before")
    console.heading(f"Writing {len(facts)} facts")
    report = edit_stream(editor, facts, batch, console)
    if not args.no_evaluate:
        scores["after"] = _measure(console, editor, facts, "measuring the model after")
        console.line()
        console.line(score_table(scores))
    with console.bar("saving", None):
        content = _report(args, config, report, scores, editor)
        save_model(model, tokenizer, args, json.dumps(content, indent=1, ensure_ascii=False) + "\n")
    console.line(f"\nwritten to {args.out}; its report is rlsedit-report.json")


def _measure(console: Any, editor: Any, facts: list[Any], label: str) -> Any:
    with console.bar(label, 1) as bar:
        return editor.evaluate(facts, progress=lambda done, total: bar.update(done / total))


def _report(args: argparse.Namespace, config: Any, report: Any, scores: dict[str, Any], editor: Any) -> dict[str, Any]:
    from dataclasses import asdict

    from rlsedit.report.environment import environment
    from rlsedit.report.scores import finite

    return {
        "environment": environment(),
        "model": Path(args.model).name,
        "facts": {"file": args.facts.name, "written": report.facts},
        "text": args.text.name if args.text else None,
        "method": report.method,
        "config": asdict(config),
        "seconds": report.seconds,
        **{name: finite(asdict(entry)) for name, entry in scores.items()},
        "batches": [asdict(entry) for entry in report.batches],
        "health": {str(layer): entry for layer, entry in editor.health().items()},
    }
