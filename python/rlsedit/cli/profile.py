"""`rlsedit profile`: what a batch of edits costs, beside AlphaEdit and MEMIT."""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import Any

from rlsedit.cli.options import add_settings, check_outputs, device_of, layer_list, positive, refuse_unused

NAME = "profile"
HELP = "measure what a batch of edits costs, beside AlphaEdit and MEMIT"
DESCRIPTION = (
    "Measure the cost of one batch of edits by every form and back end of this package and by the published sequences: "
    "time by stage, bytes, flops, memory, and the error against float64 in the same row. Contenders take turns. "
    "With --model, profile whole edits of a real model."
)

_DTYPES = ("auto", "float32", "float64", "bfloat16", "float16")
_OUTPUT = ("out", "json")
_BOTH = ("batch", "device", "dtype", *_OUTPUT)
_LAYER = (*_BOTH, "shape", "dk", "dv", "count", "only", "history", "sweep", "repeat", "seconds", "limit", "memory",
          "check", "warm", "extrapolate")  # fmt: skip
_EDIT = (*_BOTH, "model", "facts", "methods", "facts_limit", "text", "trace", "layers", "seed", "settings")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The layer, the contenders, the way of measuring, and what is written."""
    group = parser.add_argument_group("the layer")
    group.add_argument("--shape", metavar="NAME", help="of a model's edited layer; --list shows them (smollm2-135m)")
    group.add_argument("--dk", type=positive, metavar="D", help="dimension of a key, in the place of --shape")
    group.add_argument("--dv", type=positive, metavar="V", help="dimension of a value")
    group.add_argument("--batch", type=positive, default=100, metavar="U", help="keys of a batch (default 100)")
    group.add_argument("--layers", dest="count", type=positive, default=1, metavar="N", help="layers a batch writes to")
    group.add_argument("--device", default="auto", help="cpu, cuda, ...; auto takes a GPU if there is one")
    group.add_argument(
        "--dtype", default="auto", choices=_DTYPES, help="float32 (default) or float64; of a --model, any"
    )
    group = parser.add_argument_group("the contenders")
    group.add_argument("--only", action="append", default=[], metavar="NAME", help="those with NAME in their names")
    group.add_argument("--list", action="store_true", help="show shapes and contenders, and stop")
    group = parser.add_argument_group("how cost grows")
    group.add_argument("--history", type=_numbers, metavar="LIST", help="batches written before, such as 0,100,1000")
    group.add_argument("--sweep", type=_axis, metavar="AXIS=LIST", help="d=1024,2048,4096 or u=.. or layers=..")
    group = parser.add_argument_group("measuring")
    group.add_argument("--repeat", type=positive, default=11, metavar="N", help="timed calls of each (default 11)")
    group.add_argument("--seconds", type=float, default=20.0, help="at most so long for the calls of one (default 20)")
    group.add_argument("--limit", type=float, metavar="S",
                       help="leave out what would take longer for one batch (default 600 s)")  # fmt: skip
    group.add_argument("--memory", type=float, metavar="GB", help="that may be used (default: nine tenths of the free)")
    group.add_argument("--check", type=positive, default=2, metavar="N", help="batches before errors are taken (2)")
    group.add_argument("--warm", action="store_true", help="do not flush caches before a timed call")
    group.add_argument("--extrapolate", action="store_true", help="estimate what is left out, from smaller sizes")
    group = parser.add_argument_group("output")
    group.add_argument("--out", type=Path, metavar="DIR", help="write profile.json, tables and figures there")
    group.add_argument("--json", type=Path, metavar="FILE", help="write the result alone")
    group.add_argument("--from", dest="source", type=Path, metavar="FILE", help="show a result written before")
    group.add_argument("--compare", type=Path, nargs=2, metavar=("A", "B"), help="two results side by side")
    group = parser.add_argument_group("a real edit, end to end")
    group.add_argument("--model", metavar="DIR", help="folder of a causal LM, or smollm2")
    group.add_argument("--facts", type=Path, metavar="FILE", help="facts as for `rlsedit edit`")
    group.add_argument("--methods", default="rlsedit,alphaedit_dense", metavar="LIST",
                       help="methods to compare; alphaedit_dense is AlphaEdit's published solve")  # fmt: skip
    group.add_argument("--facts-limit", type=positive, metavar="N", help="only the first N facts")
    group.add_argument("--text", type=Path, metavar="FILE", help="text for the second moments, as in `rlsedit edit`")
    group.add_argument("--trace", type=Path, metavar="DIR", help="torch.profiler's trace of one batch by each method")
    _add_own(group)


def _add_own(group: argparse._ActionsContainer) -> None:
    """--set and --seed of `rlsedit edit`; its --layers is called --edited here."""
    inner = argparse.ArgumentParser(add_help=False)
    add_settings(inner)
    group.add_argument(
        "--edited", dest="layers", type=layer_list, metavar="LIST", help='layers of --model to edit, "4-8" or "4,5,8"'
    )
    for action in inner._actions:
        if action.dest in ("seed", "settings"):
            group._add_action(action)


def run(args: argparse.Namespace) -> int:
    """Measures, shows and writes."""
    from rlsedit.report import Console

    console = Console()
    if args.list:
        return _list(console, args)
    if args.compare:
        refuse_unused(args, ("compare",), "with --compare")
        return _compare(console, *args.compare)
    if args.source is not None:
        from rlsedit_kernels.profile import load

        refuse_unused(args, ("source", *_OUTPUT), "with --from")
        return _show(console, load(args.source), args)
    check_outputs(args, "out", "trace")
    check_outputs(args, "json", file=True)
    if args.model is not None or args.facts is not None:
        from rlsedit.cli.profile_edit import run_edit

        refuse_unused(args, _EDIT, "with --model")
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
    if args.out is not None and args.out.is_file():
        raise ValueError(f"--out: {args.out} is a file, needs a folder")

    only = _only(args.only, rp.catalogue(base["device"], 2))

    def contenders(layers: int) -> list[Any]:
        return [one for one in rp.catalogue(base["device"], layers) if only is None or one.name in only]

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
    return _show(console, result, args)


def _base(args: argparse.Namespace) -> dict[str, Any]:
    import torch

    from rlsedit_kernels.profile import SHAPES

    if args.dtype not in ("auto", "float32", "float64"):
        raise ValueError(f"--dtype: a state is kept in float32 or float64, got {args.dtype}")
    if args.shape is not None and (args.dk is not None or args.dv is not None):
        raise ValueError("--shape: give a shape, or --dk and --dv")
    if (args.dk is None) != (args.dv is None):
        raise ValueError("--dk and --dv: give both")
    if args.dk is not None:
        d, v = args.dk, args.dv
    else:
        name = args.shape or "smollm2-135m"
        if name not in SHAPES:
            raise ValueError(f"--shape: must be one of {', '.join(SHAPES)}, got {name!r}")
        d, v = SHAPES[name].d, SHAPES[name].v
    dtype = torch.float64 if args.dtype == "float64" else torch.float32
    return {"d": d, "v": v, "u": args.batch, "layers": args.count, "dtype": dtype, "device": device_of(args.device)}


def _settings(args: argparse.Namespace) -> Any:
    from rlsedit_kernels.profile import Settings

    return Settings(
        repetitions=args.repeat,
        seconds=args.seconds,
        limit=600.0 if args.limit is None else args.limit,
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


def _show(console: Any, result: Any, args: argparse.Namespace) -> int:
    from rlsedit.report.profile_tables import profile_table, stage_table, sweep_table

    if result.kind == "edit":
        from rlsedit.cli.profile_edit import show_edit

        return show_edit(console, result, args)
    rates = ", ".join(f"{1e-9 * rate:.0f} GFLOP/s in {name}" for name, rate in result.ceilings.flops_per_s.items())
    console.line(f"ceilings  a copy {1e-9 * result.ceilings.bytes_per_s:.1f} GB/s, a product {rates}\n")
    if result.kind == "shape":
        console.line(profile_table(result))
        if any(row.stages for row in result.rows):
            console.heading("Stages")
            console.line(stage_table(result))
    else:
        console.line(sweep_table(result))
    write(console, result, args)
    return 0 if any(row.times is not None for row in result.rows) else 1


def write(console: Any, result: Any, args: argparse.Namespace) -> None:
    """--json and --out: the result, its tables and its figures."""
    from rlsedit.report.profile_tables import markdown

    if args.json is not None:
        result.save(args.json)
        console.line(f"\nwritten to {args.json}")
    if args.out is not None:
        result.save(args.out / "profile.json")
        (args.out / "profile.md").write_text(markdown(result), encoding="utf-8")
        names = ["profile.json", "profile.md", *_draw(result, args.out)]
        console.line(f"\nwritten to {args.out}: {', '.join(names)}")


def _draw(result: Any, folder: Path) -> list[str]:
    from rlsedit.report.profile_plots import plot_axis, plot_bars, plot_edit, plot_roofline

    if not any(row.times is not None for row in result.rows):
        return []
    figures: dict[str, Any] = {"growth": plot_axis}
    if result.kind == "shape":
        figures = {"cost": plot_bars, "roofline": plot_roofline}
    elif result.kind == "edit":
        figures = {"stages": plot_edit}
    names = []
    for name, draw in figures.items():
        for kind in ("svg", "png"):
            names.append(f"{name}.{kind}")
            draw(result, folder / names[-1])
    return names


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

    rows, notes = compare(load(first), load(second))
    if not rows:
        raise ValueError(f"--compare: {first.name} and {second.name} have no measured row in common")
    console.line(comparison_table(rows))
    console.line()
    for note in notes:
        console.line(note)
    return 0


def _numbers(text: str) -> tuple[int, ...]:
    if not re.fullmatch(r"\d+(,\d+)*", text):
        raise argparse.ArgumentTypeError(f"needs whole numbers such as 0,100,1000, got {text!r}")
    found = tuple(int(part) for part in text.split(","))
    if len(set(found)) != len(found):
        raise argparse.ArgumentTypeError(f"needs each number once, got {text!r}")
    return tuple(sorted(found))


def _axis(text: str) -> tuple[str, tuple[int, ...]]:
    name, sign, values = text.partition("=")
    if not sign or name not in ("d", "u", "layers"):
        raise argparse.ArgumentTypeError(f"needs d=.., u=.. or layers=.. with whole numbers, got {text!r}")
    return name, _numbers(values)
