"""`rlsedit profile --model`: the time of whole edits of a real model, by stage."""

from __future__ import annotations

import argparse
from typing import Any

from rlsedit.cli.moments import measured, read_given
from rlsedit.cli.options import blamed, check_layers, config_for, load_any, read_facts
from rlsedit.cli.profile_output import show


def run_edit(console: Any, args: argparse.Namespace) -> int:
    """Edits the model in memory by each method and shows where the time went; nothing on disk is changed."""
    from rlsedit.methods import get_method
    from rlsedit.models import Adapter
    from rlsedit.profiling import profile_edit

    if args.model is None or args.facts is None:
        raise ValueError("--model and --facts: give both")
    names = _methods(args.methods)
    facts, texts = read_facts(args), read_given(args.text)
    with console.bar(f"loading {args.model}", None):
        model, tokenizer = load_any(args, "--model")
    adapter = Adapter.for_model(model)
    configs = {}
    for name in names:
        args.method = name
        configs[name] = config_for(model, args)
        check_layers(adapter, configs[name], get_method(name))
    layers = {n for config in configs.values() for n in config.layers}
    moments = measured(console, adapter, tokenizer, layers, texts)
    with console.bar(f"writing {len(facts)} facts by {', '.join(names)}", None) as bar:

        def tell(name: str, event: Any) -> None:
            console.overwrite(f"{name}: batch {event.batch + 1}, {event.stage} {event.done} of {event.total}")

        result = profile_edit(
            model, tokenizer, facts, configs, moments, batch_size=args.batch, adapter=adapter, trace=args.trace,
            progress=tell,
        )  # fmt: skip
        bar.finish(f"{bar.elapsed:.0f} s")
    status = show(console, result, args.out)
    if args.trace is not None:
        console.line(f"\ntraces in {args.trace}; open them in Perfetto or chrome://tracing")
    return status


def _methods(text: str) -> list[str]:
    from rlsedit.methods import get_method

    names = [part.strip() for part in text.split(",")]
    if len(set(names)) < len(names):
        raise ValueError(f"--methods: needs each method once, got {text!r}")
    with blamed("--methods", "Editor: "):
        for name in names:
            get_method(name)
    return names
