"""`rlsedit profile`: what a batch of edits costs, beside AlphaEdit and MEMIT."""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import Any

from rlsedit.cli.moments import add_text
from rlsedit.cli.options import (
    add_device,
    add_facts,
    add_settings,
    amount,
    blamed,
    check_outputs,
    device_of,
    natural,
    place,
    positive,
    refuse_unused,
    whole,
)  # fmt: skip
from rlsedit.cli.profile_output import show

NAME = "profile"
HELP = "measure what a batch of edits costs, beside AlphaEdit and MEMIT"
DESCRIPTION = (
    "Measure the cost of one batch of edits by every form and back end of this package and by the published sequences: "
    "time by stage, bytes, flops, memory, and the error against float64 in the same row. Contenders take turns. "
    "With --model, profile whole edits of a real model."
)
EXAMPLES = (
    "rlsedit profile --shape llama3-8b --batch 100 --out DIR",
    "rlsedit profile --model MODEL --facts facts.jsonl --methods rlsedit,memit",
)

_KEYS = 100
_BOTH = ("batch", "device", "dtype", "out")
_LAYER = (*_BOTH, "shape", "dk", "dv", "layer_count", "only", "history", "sweep", "repeat", "seconds", "longest",
          "memory", "check", "warm", "extrapolate")  # fmt: skip
_EDIT = (*_BOTH, "model", "facts", "limit", "skip_bad", "methods", "text", "trace", "layers", "seed", "settings")
_SWEPT = {"d": "dk", "u": "batch", "layers": "layer_count"}
"""Axes of --sweep, and the options in whose place they stand."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The layer, the contenders, the way of measuring, and what is written."""
    group = parser.add_argument_group("the layer")
    group.add_argument(
        "--shape", metavar="NAME", help="of a model's edited layer; --list shows them (default smollm2-135m)"
    )
    group.add_argument("--dk", type=whole(8), metavar="D", help="dimension of a key, in the place of --shape")
    group.add_argument("--dv", type=positive, metavar="V", help="dimension of a value, in the place of --shape")
    group.add_argument(
        "--batch", type=positive, metavar="N", help=f"keys, or facts of a --model, of one batch (default {_KEYS})"
    )
    group.add_argument("--layer-count", type=positive, metavar="N", help="layers that a batch writes to (default 1)")
    add_device(group, "of the state, float32 (auto) or float64; of a --model as for `rlsedit edit`")
    group = parser.add_argument_group("the contenders")
    group.add_argument(
        "--only", action="append", default=[], type=_part, metavar="NAME",
        help="those with NAME in their names; may be repeated (default: all of them)",
    )  # fmt: skip
    group.add_argument("--list", action="store_true", help="show shapes and contenders, and stop")
    group = parser.add_argument_group("how cost grows")
    group.add_argument(
        "--history", type=_numbers, metavar="LIST", help="batches written before, such as 0,100,1000 (default 0)"
    )
    group.add_argument("--sweep", type=_axis, metavar="AXIS=LIST", help="d=1024,2048,4096 or u=.. or layers=..")
    group = parser.add_argument_group("measuring")
    group.add_argument("--repeat", type=positive, default=11, metavar="N", help="timed calls of each (default 11)")
    group.add_argument(
        "--seconds", type=amount, default=20.0, metavar="S", help="at most so long for the calls of one (default 20)"
    )
    group.add_argument(
        "--longest",
        type=amount,
        metavar="S",
        help="leave out what would take longer for one batch, or for those before it (default 600)",
    )
    group.add_argument(
        "--memory",
        type=amount,
        metavar="GB",
        help="that may be used, also where there is not as much (default: nine tenths of what is free)",
    )
    group.add_argument(
        "--check", type=positive, default=2, metavar="N", help="batches before errors are taken (default 2)"
    )
    group.add_argument("--warm", action="store_true", help="do not flush caches before a timed call")
    group.add_argument("--extrapolate", action="store_true", help="estimate what is left out, from smaller sizes")
    group = parser.add_argument_group("output")
    group.add_argument(
        "--out", type=place, metavar="PATH",
        help="FILE.json for the result, or a folder for profile.json, tables and figures",
    )  # fmt: skip
    group.add_argument("--from", dest="source", type=Path, metavar="FILE", help="show a result written before")
    group.add_argument("--compare", type=Path, nargs=2, metavar=("A", "B"), help="two results side by side")
    group = parser.add_argument_group("a real edit, end to end")
    group.add_argument("--model", metavar="MODEL", help="folder of a Hugging Face causal LM, or smollm2")
    add_facts(group, required=False)
    group.add_argument(
        "--methods", default="rlsedit,alphaedit_dense", metavar="LIST",
        help="methods to compare; alphaedit_dense is AlphaEdit's published solve (default %(default)s)",
    )  # fmt: skip
    add_text(group)
    group.add_argument("--trace", type=place, metavar="DIR", help="torch.profiler's trace of one batch by each method")
    add_settings(group)


def run(args: argparse.Namespace) -> int:
    """Measures, shows and writes."""
    from rlsedit.report import Console

    console = Console()
    if args.list:
        return _list(console, args)
    if args.compare:
        refuse_unused(args, ("compare",), "with --compare")
        return _compare(console, *args.compare)
    file = args.out is not None and args.out.suffix == ".json"
    check_outputs(args, "out", file=file, spare=(args.facts, args.text) if file else ())
    if args.out is not None and args.out.is_file() and not file:
        raise ValueError(f"--out: {args.out} is a file, needs a folder or FILE.json")
    if args.source is not None:
        from rlsedit_kernels.profile import load

        refuse_unused(args, ("source", "out"), "with --from")
        with blamed("--from"):
            result = load(args.source)
        return show(console, result, args.out)
    check_outputs(args, "trace")
    if args.model is not None or args.facts is not None:
        from rlsedit.cli.profile_edit import run_edit

        refuse_unused(args, _EDIT, "with --model")
        args.batch = args.batch or _KEYS
        return run_edit(console, args)
    refuse_unused(args, _LAYER, "without --model")
    return _measure(console, args)


def _measure(console: Any, args: argparse.Namespace) -> int:
    from rlsedit_kernels import profile as rp

    base, settings = _base(args), _settings(args)
    if args.sweep and args.history:
        raise ValueError("--sweep and --history: one at a time")
    if args.sweep and args.extrapolate:
        raise ValueError("--extrapolate: has no effect with --sweep; leave it out")

    only = _only(args.only, rp.catalogue(base["device"], 2))

    def contenders(layers: int) -> list[Any]:
        return [one for one in rp.catalogue(base["device"], layers) if only is None or one.name in only]

    rp.require_room(
        [{**base, args.sweep[0]: value} for value in args.sweep[1]] if args.sweep else [base], settings.memory,
        "--memory",
    )  # fmt: skip
    with console.bar(_title(base, args), None) as bar:

        def tell(text: str) -> None:
            console.overwrite(f"{_title(base, args)}: {text}")

        if args.sweep:
            axis, values = args.sweep
            result = rp.sweep(axis, values, contenders, base, settings, progress=tell)
        else:
            chosen = contenders(base["layers"])
            problem = rp.Problem(**base)
            result = rp.measure(chosen, problem, settings, history=args.history or (0,), progress=tell)
            if args.extrapolate:
                del problem
                result = rp.extrapolated(result, chosen, base, settings, progress=tell)
        bar.finish(f"{bar.elapsed:.0f} s")
    return show(console, result, args.out)


def _base(args: argparse.Namespace) -> dict[str, Any]:
    import torch

    from rlsedit_kernels.profile import SHAPES

    if args.dtype not in ("auto", "float32", "float64"):
        raise ValueError(f"--dtype: a state is kept in float32 or float64, got {args.dtype}")
    if args.shape is not None and (args.dk is not None or args.dv is not None):
        raise ValueError("--shape: give a shape, or --dk and --dv")
    swept = _SWEPT[args.sweep[0]] if args.sweep else None
    if swept is not None and getattr(args, swept) is not None:
        name = f"--{swept.replace('_', '-')}"
        raise ValueError(f"{name}: has no effect with --sweep {args.sweep[0]}=; leave it out")
    if (args.dk is None) != (args.dv is None) and swept != "dk":
        raise ValueError("--dk and --dv: give both")
    if args.dv is not None:
        d, v = args.dk or args.dv, args.dv  # with --sweep d= each of its values takes the place of d
    else:
        name = args.shape or "smollm2-135m"
        if name not in SHAPES:
            raise ValueError(f"--shape: must be one of {', '.join(SHAPES)}, got {name!r}")
        d, v = SHAPES[name].d, SHAPES[name].v
    dtype = torch.float64 if args.dtype == "float64" else torch.float32
    return {
        "d": d,
        "v": v,
        "u": args.batch or _KEYS,
        "layers": args.layer_count or 1,
        "dtype": dtype,
        "device": device_of(args.device),
    }


def _settings(args: argparse.Namespace) -> Any:
    from rlsedit_kernels.profile import Settings

    return Settings(
        repetitions=args.repeat,
        seconds=args.seconds,
        limit=600.0 if args.longest is None else args.longest,
        check=args.check,
        cold=not args.warm,
        memory=None if args.memory is None else 1e9 * args.memory,
    )


def _only(names: list[str], available: Any) -> set[str] | None:
    """Names of the contenders asked for, and of the one they are compared with; None for all."""
    from rlsedit_kernels.profile import BASELINE, named

    return {BASELINE, *(one.name for one in named(names, available))} if names else None


def _title(base: dict[str, Any], args: argparse.Namespace) -> str:
    if args.sweep:
        return f"sweep over {args.sweep[0]}"
    return f"d = {base['d']}, v = {base['v']}, {base['u']} keys" + (f", {base['layers']} layers" * (base["layers"] > 1))


def _list(console: Any, args: argparse.Namespace) -> int:
    from rlsedit.report import table
    from rlsedit_kernels.profile import SHAPES, catalogue

    console.line(table(("shape", "d", "v", "edited layers"),
                       [(s.name, str(s.d), str(s.v), str(s.layers)) for s in SHAPES.values()]))  # fmt: skip
    console.line()
    device = device_of(args.device)
    console.line(table(("contender", ""), [(one.name, one.summary) for one in catalogue(device, 2)], align="ll"))
    return 0


def _compare(console: Any, first: Path, second: Path) -> int:
    from rlsedit.report.profile_tables import comparison_table
    from rlsedit_kernels.profile import compare, load

    with blamed("--compare"):
        results = load(first), load(second)
    rows, notes = compare(*results)
    if not rows:
        raise ValueError(f"--compare: {first.name} and {second.name} have no measured row in common")
    console.line(comparison_table(rows))
    console.line()
    for note in notes:
        console.line(note)
    return 0


def _part(text: str) -> str:
    """A part of a name; an empty one, as of a variable that is not set, would be in all of them."""
    if not text.strip():
        raise argparse.ArgumentTypeError(f"needs a part of a name, got {text!r}")
    return text


def _numbers(text: str) -> tuple[int, ...]:
    if not re.fullmatch(r"\d+(,\d+)*", text):
        raise argparse.ArgumentTypeError(f"needs whole numbers such as 0,100,1000, got {text[:40]!r}")
    found = tuple(natural(part) for part in text.split(","))
    if len(set(found)) != len(found):
        raise argparse.ArgumentTypeError(f"needs each number once, got {text!r}")
    return tuple(sorted(found))


def _axis(text: str) -> tuple[str, tuple[int, ...]]:
    name, sign, values = text.partition("=")
    if not sign or name not in ("d", "u", "layers"):
        raise argparse.ArgumentTypeError(f"needs d=.., u=.. or layers=.. with whole numbers, got {text!r}")
    found = _numbers(values)
    if 0 in found:
        raise argparse.ArgumentTypeError(f"needs whole numbers of at least 1, got {text!r}")
    return name, found
