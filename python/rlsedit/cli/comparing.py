"""`rlsedit evaluate --compare`: every method on the same facts, its solve as published and here."""

from __future__ import annotations

import argparse
import copy
import json
from typing import Any

from rlsedit.cli.moments import measured, read_given
from rlsedit.cli.options import check_layers, config_for, load_any, measurable, read_facts


def method_list(text: str) -> tuple[str, ...]:
    """Methods as in "memit,alphaedit", or "all"."""
    from rlsedit.methods import list_methods

    known = list_methods()
    if text == "all":
        return tuple(known)
    names = tuple(part.strip() for part in text.split(","))
    if unknown := [name for name in names if name not in known]:
        raise argparse.ArgumentTypeError(f"needs methods among {', '.join(known)}, got {', '.join(unknown)}")
    if len(set(names)) < len(names):
        raise argparse.ArgumentTypeError(f"needs each method once, got {text!r}")
    return names


def run_compare(args: argparse.Namespace) -> int:
    """Edits, measures and prints; the model on disk is not changed."""
    from rlsedit.compare import HEADER, compare, content, markdown, rows
    from rlsedit.methods import get_method
    from rlsedit.metrics import evaluate
    from rlsedit.models import Adapter
    from rlsedit.paths import atomic_write_text, cache_dir
    from rlsedit.report import Console, table
    from rlsedit.report.environment import environment
    from rlsedit.report.scores import finite
    from rlsedit.targets import TargetCache

    console = Console()
    facts, texts = read_facts(args), read_given(args.text)
    with console.bar(f"loading {args.model}", None):
        model, tokenizer = load_any(args)
    adapter = Adapter.for_model(model)
    configs = {name: _config(model, args, name) for name in args.compare}
    for name, config in configs.items():
        check_layers(adapter, config, get_method(name))
    layers = {n for config in configs.values() for n in config.layers}
    moments = measured(console, adapter, tokenizer, layers, texts)
    scored = measurable(facts, console)
    with console.bar("measuring the model before", None):
        before = evaluate(model, tokenizer, scored, adapter=adapter)
    cache, found, batch = TargetCache(cache_dir("targets")), [], args.batch or 20
    caption = f"{type(model).__name__} `{_name(args)}`, {len(facts)} facts in batches of {batch}; percent."
    about = {"environment": environment(), "model": _name(args), "facts": args.facts.name, "batch": batch}
    about["text"] = args.text.name if args.text else "installed prose"
    for name, config in configs.items():
        with console.bar(f"  {name}", len(facts)) as bar:

            def show(_: str, done: int, _total: int) -> None:
                bar.update(done)

            options: dict[str, Any] = dict(batch_size=batch, targets=cache, scored=scored, progress=show)
            found += compare(adapter, tokenizer, facts, {name: config}, moments, **options)
        if args.out is not None:  # after each method, since all of them take hours
            whole = {**about, **finite(content(found, before))}
            text = markdown(found, before, caption) if args.out.suffix == ".md" else json.dumps(whole, indent=1) + "\n"
            atomic_write_text(args.out, text)
    console.line()
    console.line(table(HEADER, rows(found, before)))
    if args.out is not None:
        console.line(f"\nwritten to {args.out}")
    return 0


def _config(model: Any, args: argparse.Namespace, method: str) -> Any:
    """The preset of the method with what the command line changes; methods of one layer take the last of --layers."""
    from rlsedit.methods import get_method

    own = copy.copy(args)
    own.method = method
    if args.layers is not None and get_method(method).single:
        own.layers = args.layers[-1:]
    return config_for(model, own)


def _name(args: argparse.Namespace) -> str:
    return str(args.model).rstrip("/").rpartition("/")[2]
