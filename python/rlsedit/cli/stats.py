"""`rlsedit stats`: the second moments of the layer inputs, measured and cached."""

from __future__ import annotations

import argparse
from pathlib import Path

from rlsedit.cli.moments import read_given
from rlsedit.cli.options import add_layers, add_model, check_layers, load_any

NAME = "stats"
HELP = "measure and cache the second moments of the layer inputs on text"
DESCRIPTION = (
    "Measure E[k k'] of the inputs of the edited layers on text and keep it in the cache, where `edit` with the same "
    "model and text finds it."
)
EXAMPLES = ("rlsedit stats MODEL --text text.txt --layers 4-8",)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """MODEL, the text and the layers."""
    add_model(parser)
    parser.add_argument("--text", required=True, type=Path, metavar="FILE", help="UTF-8 text, plain or .gz")
    add_layers(parser)


def run(args: argparse.Namespace) -> int:
    """Measures, caches and prints what the matrices are like."""
    import torch

    from rlsedit.config import EditConfig
    from rlsedit.models import Adapter
    from rlsedit.moments import second_moments
    from rlsedit.paths import cache_dir
    from rlsedit.report import Console, table

    console = Console()
    texts = read_given(args.text)
    assert texts is not None
    with console.bar(f"loading {args.model}", None):
        model, tokenizer = load_any(args)
    adapter = Adapter.for_model(model)
    config = EditConfig.for_model(model, **({} if args.layers is None else {"layers": args.layers}))
    check_layers(adapter, config)
    folder = cache_dir("moments")
    with console.bar(f"measuring {len(config.layers)} layers on {args.text.name}", None):
        moments = second_moments(model, tokenizer, config.layers, texts, cache_dir=folder, adapter=adapter)
    rows = []
    for layer, moment in moments.items():
        values = torch.linalg.eigvalsh(moment.double().cpu()).clamp_min(0)
        largest, smallest, trace = float(values[-1]), float(values[0]), float(values.sum())
        rank = trace**2 / float((values**2).sum())
        condition = f"{largest / smallest:.3g}" if smallest > 1e-12 * largest else "singular"
        rows.append((str(layer), str(len(values)), f"{trace:.4g}", f"{largest:.3g}", condition, f"{rank:.0f}"))
    console.line()
    console.line(table(("layer", "d", "trace", "largest", "condition", "effective rank"), rows, align="rrrrrr"))
    console.line(f"\ncached in {folder}")
    return 0
