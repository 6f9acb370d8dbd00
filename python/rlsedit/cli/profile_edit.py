"""`rlsedit profile --model`: the time of whole edits of a real model, by stage."""

from __future__ import annotations

import argparse
from typing import Any

from rlsedit.cli.options import check_layers, config_for, load_any, read_facts


def run_edit(console: Any, args: argparse.Namespace) -> int:
    """Edits the model in memory by each method and shows where the time went; nothing on disk is changed."""
    from rlsedit.methods import get_method
    from rlsedit.models import Adapter
    from rlsedit.moments import second_moments
    from rlsedit.paths import cache_dir
    from rlsedit.profiling import profile_edit
    from rlsedit.texts import installed_prose, read_text

    if args.model is None or args.facts is None:
        raise ValueError("--model and --facts: give both")
    if args.text is not None and not args.text.is_file():
        raise FileNotFoundError(f"--text: no file {args.text}")
    names = _methods(args.methods)
    args.limit, args.skip_bad = args.facts_limit, False
    facts = read_facts(args)
    with console.bar(f"loading {args.model}", None):
        model, tokenizer = load_any(args)
    adapter = Adapter.for_model(model)
    configs = {}
    for name in names:
        args.method = name
        configs[name] = config_for(model, args)
        check_layers(adapter, configs[name], get_method(name), name="--edited")
    layers = sorted({n for config in configs.values() for n in config.layers})
    with console.bar("second moments of the layer inputs", None):
        texts = read_text(args.text) if args.text else installed_prose()
        moments = second_moments(model, tokenizer, layers, texts, cache_dir=cache_dir("moments"), adapter=adapter)
    with console.bar(f"writing {len(facts)} facts by {', '.join(names)}", None) as bar:

        def show(name: str, event: Any) -> None:
            console.overwrite(f"{name}: batch {event.batch + 1}, {event.stage} {event.done} of {event.total}")

        result = profile_edit(
            model, tokenizer, facts, configs, moments, batch=args.batch, adapter=adapter, trace=args.trace,
            progress=show,
        )  # fmt: skip
        bar.finish(f"{bar.elapsed:.0f} s")
    return show_edit(console, result, args)


def show_edit(console: Any, result: Any, args: argparse.Namespace) -> int:
    """The stages of each method, and files where they are asked for."""
    from rlsedit.cli.profile import write
    from rlsedit.report.profile_tables import edit_table

    console.line()
    console.line(edit_table(result))
    write(console, result, args)
    if args.trace is not None:
        console.line(f"\ntraces in {args.trace}; open them in Perfetto or chrome://tracing")
    return 0


def _methods(text: str) -> list[str]:
    from rlsedit.methods import get_method

    names = [part.strip() for part in text.split(",")]
    if len(set(names)) < len(names):
        raise ValueError(f"--methods: needs each method once, got {text!r}")
    for name in names:
        get_method(name)
    return names
