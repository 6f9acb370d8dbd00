"""`rlsedit stability`: how far any recursion is from the exact solution along hard streams."""

from __future__ import annotations

import argparse
import importlib
import math
from collections.abc import Callable
from contextlib import nullcontext
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlsedit.cli.options import blamed, check_outputs, device_of, natural, place, positive, refuse_unused

if TYPE_CHECKING:
    from rlsedit.report import Console
    from rlsedit_kernels.diagnostics import Stream, Trial

NAME = "stability"
HELP = "measure the numerical error of each form, and of your own step, over long streams"
DESCRIPTION = (
    "Follow streams whose exact solution is known and show, for every form of the recursion, how far weight, "
    "covariance and gain are from it, when they break, and whether health() said so before."
)
EXAMPLES = (
    "rlsedit stability",
    "rlsedit stability --condition 1e9 --forms plain,guarded --step my_editor:MyStep",
)

QUICK = ("anchored", "condition-1e8", "weak-0.1", "weak-0.001", "correlated", "wind-up")
FORMS = ("plain", "whitened", "inverse-root", "square-root", "guarded")
FULL: dict[str, Any] = {"d": 128, "u": 8, "v": 4, "batches": 10_000, "each_decade": 8}
"""Sizes of docs/stability.md."""
_APART = ("easy", "condition-1", "condition-1e4", "cliff-1e8", "tiny", "consistent")
"""Streams that the page leaves out: they tell no two forms apart that others of it do not."""
_COMMON = ("forms", "dtypes", "no_published", "step", "backend", "device", "batches", "out")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What is followed, by whom, and where the result goes."""
    parser.add_argument("--streams", metavar="LIST", help=f"names, or all (default {','.join(QUICK)}); see --list")
    parser.add_argument(
        "--condition",
        action="append",
        default=[],
        type=_condition,
        metavar="X",
        help="a prior of condition X as well; may be repeated",
    )
    parser.add_argument("--stream", type=Path, metavar="FILE", help="streams recorded by `rlsedit edit --record FILE`")
    parser.add_argument(
        "--forms", metavar="LIST", default=",".join(FORMS),
        help="of ours, see --list (default %(default)s); the sequences in plain torch come along",
    )  # fmt: skip
    parser.add_argument(
        "--dtypes", metavar="LIST", default="float32", help="float32, float64 or both (default float32)"
    )
    parser.add_argument(
        "--no-published", action="store_true",
        help="leave those sequences out (released, woodbury, normal-equations) but for what --forms names",
    )  # fmt: skip
    parser.add_argument(
        "--step",
        action="append",
        default=[],
        metavar="MODULE:NAME",
        help="a step of your own, called with the stream; may be repeated",
    )
    parser.add_argument(
        "--backend", metavar="NAME", help="force a back end: cpu, torch, triton, cuda (default: the fastest there is)"
    )
    parser.add_argument(
        "--device", default="cpu", metavar="NAME", help="where the steps work: cpu, cuda, ... (default cpu)"
    )
    parser.add_argument(
        "--dk", dest="d", type=positive, default=64, metavar="D", help="dimension of a key (default %(default)s)"
    )
    parser.add_argument(
        "--batch", dest="u", type=positive, default=8, metavar="N", help="keys of a batch (default %(default)s)"
    )
    parser.add_argument(
        "--dv", dest="v", type=positive, default=4, metavar="V", help="dimension of a target (default %(default)s)"
    )
    parser.add_argument("--batches", type=positive, default=1000, metavar="N", help="of a stream (default %(default)s)")
    parser.add_argument("--seed", type=natural, metavar="N", default=0, help="of the streams (default %(default)s)")
    parser.add_argument("--out", type=place, metavar="DIR", help="folder for results.json, the table and the figures")
    parser.add_argument(
        "--full", action="store_true",
        help="the streams of docs/stability.md at its sizes, kept in bench/results; resumes; --streams takes others",
    )  # fmt: skip
    parser.add_argument(
        "--page", action="store_true", help="write docs/stability.md and its figures from bench/results"
    )
    parser.add_argument("--again", action="store_true", help="with --full: measure --forms anew where they are there")
    parser.add_argument("--list", action="store_true", help="show the streams and forms there are, and stop")


def run(args: argparse.Namespace) -> int:
    """Follows the streams and reports."""
    from rlsedit.report import Console

    console = Console()
    if args.out is not None and args.out.exists() and not args.out.is_dir():
        raise ValueError(f"--out: {args.out} is a file, needs a folder")
    check_outputs(args, "out")
    if args.list:
        _show_names(console)
        return 0
    if args.page and not args.full:
        refuse_unused(args, ("page",), "with --page alone")
        _write_page(console)
        return 0
    if args.full:
        refuse_unused(
            args, ("full", "page", "streams", "forms", "no_published", "backend", "again", "device"), "with --full"
        )
        return _run_full(console, args)
    if args.stream is not None:
        refuse_unused(args, ("stream", *_COMMON), "with --stream")
    if args.again:
        raise ValueError("--again: goes with --full")
    steps = _steps(args)
    if args.stream is None:
        _require_room(args, len(steps))
    streams = _streams(args)
    trials: list[Trial] = []
    sizes: dict[str, Any] = {}
    for stream in streams:
        new, batches = _follow(console, stream, steps, args.batches, 12, args)
        trials += new
        sizes[stream.name] = {"d": stream.d, "u": _keys(stream, batches, args), "v": stream.v, "batches": batches}
    asked = ["d", "u", "v", "batches", "seed"] if args.stream is None else []  # a recorded stream has its own
    names = [*asked, "device", "backend"]
    settings = {name: getattr(args, name) for name in names} | {"sizes": sizes} | _machine()
    _report(console, settings, trials, args.out)
    return 0 if any(trial.points or trial.refused_at is not None for trial in trials) else 1


def _run_full(console: Console, args: argparse.Namespace) -> int:
    """The committed run: streams that the file has already are not run again."""
    from rlsedit.report.stability import PAGE, RESULTS
    from rlsedit_kernels.diagnostics import load, make_steps, make_stream, save

    if device_of(args.device).type != "cpu":
        raise ValueError(f"--full: is a run on the CPU, got --device {args.device}; use --out DIR")
    if not PAGE.parent.is_dir():
        raise ValueError("--full: keeps its results in a checkout of the project, and this is none; use --out DIR")
    names = _full_names(args.streams)
    steps = make_steps(_names("--forms", args.forms), published=not args.no_published)
    if args.forms == ",".join(FORMS):
        steps |= make_steps(("guarded",), ("float64",), published=False)
    settings = {**FULL, "seed": 0} | _machine()
    for name in names:
        kept = load(RESULTS)[1] if RESULTS.exists() else []
        if not args.again and any(trial.stream == name for trial in kept):
            continue
        stream = make_stream(name, FULL["d"], FULL["u"], FULL["v"])
        fresh, _ = _follow(console, stream, steps, FULL["batches"], FULL["each_decade"], args)
        kept = load(RESULTS)[1] if RESULTS.exists() else []  # another part may have been written meanwhile
        save(RESULTS, settings, _merged(kept, fresh))
    if args.page:
        _write_page(console)
    return 0


def _merged(kept: list[Trial], fresh: list[Trial]) -> list[Trial]:
    """Trials of the committed run by stream and step, new for old; steps that are there no more are left out."""
    from rlsedit_kernels.diagnostics import FORMS as OURS
    from rlsedit_kernels.diagnostics import STREAMS, make_steps

    streams, steps = list(STREAMS), [*make_steps((*FORMS, *OURS)), "guarded float64"]
    every = {(t.stream, t.step): t for t in [*kept, *fresh] if t.step in steps}
    return sorted(every.values(), key=lambda t: (streams.index(t.stream), steps.index(t.step)))


def _full_names(text: str | None) -> list[str]:
    """Streams of the committed run; the results are kept in the order of `STREAMS`, so that no others can be taken."""
    from rlsedit_kernels.diagnostics import STREAMS

    if text is None:
        return [name for name in STREAMS if name not in _APART]
    names = list(STREAMS) if text == "all" else _names("--streams", text)
    if unknown := [name for name in names if name not in STREAMS]:
        raise ValueError(f"--streams: must be among {', '.join(STREAMS)} with --full, got {unknown[0]!r}")
    return names


def _require_room(args: argparse.Namespace, steps: int) -> None:
    """Refuse sizes that cannot fit before a stream is made: the system would end the process without a word."""
    import torch

    from rlsedit_kernels.diagnostics import least_bytes
    from rlsedit_kernels.profile.machine import free_bytes

    device, host = device_of(args.device), torch.device("cpu")
    need, free = least_bytes(args.d, args.u, args.v, steps if device == host else 0), free_bytes(host)
    if need > free:
        raise ValueError(
            f"--dk {args.d}, --batch {args.u}, --dv {args.v}: the batch solution in float64 and the steps beside it "
            f"take at least {need / 1e9:.3g} GB, {free / 1e9:.3g} GB are free"
        )


def _streams(args: argparse.Namespace) -> list[Stream]:
    from rlsedit_kernels.diagnostics import STREAMS, make_stream

    if args.stream is not None:
        from rlsedit.recorded import load_streams

        with blamed("--stream", "load_streams: "):
            return list(load_streams(args.stream).values())
    names = list(QUICK) if args.streams is None and not args.condition else []
    if args.streams is not None:
        names = list(STREAMS) if args.streams == "all" else _names("--streams", args.streams)
    conditions = [f"condition-{value}" for value in args.condition]
    found = []
    for name in dict.fromkeys([*names, *conditions]):
        with blamed("--streams" if name in names else "--condition", "make_stream: "):
            found.append(make_stream(name, args.d, args.u, args.v, args.seed))
    return found


def _keys(stream: Stream, batches: int, args: argparse.Namespace) -> list[int]:
    """Keys of a batch: what was asked for, of a recorded stream what its batches have."""
    if args.stream is None:
        return [args.u]
    return sorted({len(batch.K) for batch in islice(stream.batches(), batches)})


def _steps(args: argparse.Namespace) -> dict[str, Any]:
    from rlsedit_kernels.diagnostics import make_steps

    steps = make_steps(_names("--forms", args.forms), _names("--dtypes", args.dtypes), not args.no_published)
    return steps | {name: _own(name) for name in args.step}


def _own(name: str) -> Callable[[Any], Any]:
    """The maker of a step that MODULE:NAME stands for."""
    module, sign, attribute = name.partition(":")
    if not sign:
        raise ValueError(f"--step: needs MODULE:NAME, got {name!r}")
    try:
        found = getattr(importlib.import_module(module), attribute)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module}.".startswith(f"{error.name}."):
            raise  # the module is there, and imports what is not
        raise ValueError(f"--step: no module {error.name!r} beside or on the path, got {name!r}") from None
    except AttributeError:
        raise ValueError(f"--step: module {module} has no {attribute!r}") from None
    if not callable(found):
        raise ValueError(f"--step: {name} must be callable with a stream, got {type(found).__name__}")
    return found  # type: ignore[no-any-return]


def _follow(
    console: Console,
    stream: Stream,
    steps: dict[str, Any],
    batches: int,
    each_decade: int,
    args: argparse.Namespace,
) -> tuple[list[Trial], int]:
    """The trials of one stream, and how many batches it had."""
    import rlsedit_kernels as rk
    from rlsedit_kernels.diagnostics import checkpoints, run_trials

    followed = 0

    def show(done: int) -> None:
        nonlocal followed
        followed = done
        bar.update(done)

    forced = rk.use_backend(args.backend) if args.backend else nullcontext()
    with forced, console.bar(f"{stream.name:<16}", batches) as bar:
        trials = run_trials(
            stream,
            steps,
            batches,
            at=checkpoints(batches, each_decade),
            device=device_of(args.device),
            progress=show,
        )
        ends = (
            ("broke", [t.step for t in trials if t.broke_at is not None]),
            ("refused", [t.step for t in trials if t.refused_at is not None]),
            ("error", [t.step for t in trials if t.failed_at is not None]),
        )
        said = "; ".join(f"{what}: {', '.join(names)}" for what, names in ends if names)
        bar.finish(f"{bar.elapsed:6.1f} s, {said or 'all held'}")
    return trials, followed


def _report(console: Console, settings: dict[str, Any], trials: list[Trial], out: Path | None) -> None:
    from rlsedit.report.stability import error_table, health_table, markdown, messages, sizes
    from rlsedit_kernels.diagnostics import save

    console.line()
    console.line(f"largest error of W along each stream; {sizes(settings)}; @: the first batch above 1e-2")
    console.line(error_table(trials))
    console.line("\n".join(["", *messages(trials), ""]).rstrip("\n"))
    console.line()
    console.line(health_table(trials))
    if out is None:
        return
    from rlsedit.paths import atomic_write_text
    from rlsedit.report.stability_plots import plot_errors, plot_health

    save(out / "results.json", settings, trials)
    atomic_write_text(out / "stability.md", markdown(settings, trials))
    if any(trial.points for trial in trials):
        plot_errors(trials, out / "errors.svg")
    if any(point.drift is not None for trial in trials for point in trial.points):
        plot_health(trials, out / "health.svg")
    console.line(f"\nwritten to {out}")


def _write_page(console: Console) -> None:
    from rlsedit.report.stability import PAGE, RESULTS, write_page

    if not RESULTS.exists():
        raise FileNotFoundError(f"--page: no file {RESULTS}; run `rlsedit stability --full` in a checkout first")
    write_page()
    console.line(f"written {PAGE}")


def _show_names(console: Console) -> None:
    from rlsedit.report import table
    from rlsedit_kernels.diagnostics import FORMS as OURS
    from rlsedit_kernels.diagnostics import PUBLISHED, STREAMS

    console.line(table(("stream", "what is hard about it"), [(n, s) for n, (s, _) in STREAMS.items()], align="ll"))
    console.line()
    rows = [(name, text) for name, (text, _) in OURS.items()]
    rows += [(name, f"in plain torch: {text}") for name, (text, _) in PUBLISHED.items()]
    console.line(table(("form", "what is kept"), rows, align="ll"))


def _condition(text: str) -> str:
    """A condition as it stands in the name of a stream."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 1.0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"needs a number of at least 1, got {text[:40]!r}")
    return text


def _names(option: str, text: str) -> list[str]:
    names = [part.strip() for part in text.split(",") if part.strip()]
    if not names:
        raise ValueError(f"{option}: needs at least one name, got {text!r}")
    return names


def _machine() -> dict[str, Any]:
    from rlsedit.report.environment import environment

    return {"environment": environment()}
