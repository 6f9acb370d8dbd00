"""`rlsedit edit`: writes facts into a model on disk, a batch at a time, each durable before the next begins."""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlsedit.cli.launch import add_parallel, load_spread, size, started
from rlsedit.cli.moments import add_text, measured, read_given
from rlsedit.cli.options import (
    add_facts,
    add_model,
    add_settings,
    check_layers,
    check_outputs,
    config_for,
    load_any,
    measurable,
    method_name,
    place,
    positive,
    read_facts,
)  # fmt: skip

if TYPE_CHECKING:
    from rlsedit.config import EditConfig
    from rlsedit.editor import Editor
    from rlsedit.facts import Fact
    from rlsedit.methods import Method
    from rlsedit.recording import Recorder
    from rlsedit.store.ledger import Edit
    from rlsedit.store.origin import Origin
    from rlsedit_kernels.distributed import Ranks

_SHOWN = 5

NAME = "edit"
HELP = "write facts into a model and save it"
DESCRIPTION = (
    "Write facts into a causal LM and save it as a folder that from_pretrained loads. Every batch is durable as soon "
    "as it is written: whatever ends the process, --resume goes on to the same bits. The dtype of the weights stays "
    "and the tokenizer comes along. With --facts - or --follow it runs on, reads one JSON fact a line and "
    "acknowledges each on standard output once it is durable."
)
EXAMPLES = (
    "rlsedit edit MODEL --facts facts.jsonl --out DIR",
    "rlsedit edit DIR --facts more.jsonl --out DIR --resume",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """MODEL, the facts, where the result goes and how it is made."""
    add_model(parser)
    add_facts(parser)
    parser.add_argument("--out", required=True, type=place, metavar="DIR", help="folder of the edited model")
    parser.add_argument("--force", action="store_true", help="replace --out if it is there")
    parser.add_argument("--resume", action="store_true", help="go on with the edits that --out holds")
    parser.add_argument(
        "--again", action="store_true", help="with --resume: write facts again that were removed, undone or replaced"
    )
    parser.add_argument("--follow", action="store_true", help="wait for more lines at the end of --facts")
    parser.add_argument(
        "--on-conflict", default="keep-both", choices=("keep-both", "replace", "refuse"),
        help="what becomes of an edit about the same subject with the same prompt or relation (default keep-both)",
    )  # fmt: skip
    parser.add_argument("--method", type=method_name, metavar="NAME", help="see `rlsedit methods` (default rlsedit)")
    parser.add_argument(
        "--batch", type=positive, metavar="N", help="facts of one batch (default: that of the preset, or of the folder)"
    )
    parser.add_argument(
        "--snapshot-every", type=positive, default=20, metavar="N",
        help="batches between two snapshots; a resume repeats at most so many from their records (default 20)",
    )  # fmt: skip
    add_text(parser)
    add_settings(parser)
    parser.add_argument(
        "--record", type=place, metavar="FILE", help="keep what the solvers are given, for `rlsedit stability --stream`"
    )
    parser.add_argument("--no-evaluate", action="store_true", help="do not measure the scores before and after")
    parser.add_argument("--dry-run", action="store_true", help="show what would be done, and do nothing")
    add_parallel(parser)


def run(args: argparse.Namespace) -> int:
    """Edits and saves; in all processes that torchrun has started."""
    with started(args) as ranks:
        return _run(args, ranks)


def _run(args: argparse.Namespace, ranks: Ranks | None) -> int:
    from rlsedit.checking import check_lengths
    from rlsedit.models import Adapter
    from rlsedit.recording import Recorder
    from rlsedit.report import Console

    streams = args.follow or str(args.facts) == "-"
    console = Console(sys.stderr if streams else None)
    with ranks.together("edit") if ranks is not None else nullcontext():
        facts, texts = _read(args, streams)
    with console.bar(f"loading {args.model}", None):
        model, tokenizer = load_any(args) if ranks is None else load_spread(args)
    adapter = Adapter.for_model(model)
    config, method = _kept(model, args) if args.resume else _new(model, args)
    check_layers(adapter, config, method, args.states)
    if not args.resume:  # what the folder holds is not written again; the rest is checked where it is known
        check_lengths(adapter, tokenizer, facts or [], method, [])
    batch = args.batch or config.batch_size
    if args.dry_run and facts is not None:
        facts = _rehearsed(console, facts, args)
    _plan(console, adapter, config, method, facts, batch, args)
    if args.dry_run:
        return 0
    with _place(args, adapter.processes.writes):
        recorder = Recorder() if args.record is not None else None
        editor = _editor(console, adapter, tokenizer, config, method, texts, recorder, args)
        _write(console, editor, facts, batch, recorder, args)
    return 0


def _read(args: argparse.Namespace, streams: bool) -> tuple[list[Fact] | None, list[str] | None]:
    """Facts, None where they come as a stream, and the text of --text; what can be refused without the model is."""
    from rlsedit.cli.saving import check_out
    from rlsedit.methods import get_method
    from rlsedit.paths import check_writable
    from rlsedit.store import conflicts
    from rlsedit.store.folder import store_of
    from rlsedit.store.index import Index

    if args.force and args.out.is_symlink():
        args.out = args.out.resolve()  # what the link leads to is replaced, not the link
    _check(args, streams)
    if args.method is not None:
        get_method(args.method)
    check_out(args.out, args.force, args.model, args.resume)
    reads = (args.model, args.facts, args.text)
    check_outputs(args, "out", beside=args.force, spare=reads if args.force else ())
    check_outputs(args, "record", beside=True, file=True, spare=reads)
    if args.resume:
        check_writable("--out", store_of(args.out))
    texts = read_given(args.text)
    if streams:
        return None, texts
    facts = read_facts(args)
    if args.on_conflict == "refuse" and not args.resume:  # what is in a folder is known with the model
        conflicts.settle(facts, Index(), args.on_conflict)
    return facts, texts


def _new(model: Any, args: argparse.Namespace) -> tuple[EditConfig, Method]:
    """Hyper-parameters and method of a stream that begins; where it is resumed its batches have the same size."""
    from rlsedit.methods import get_method

    args.method = args.method or "rlsedit"
    config = config_for(model, args)
    return replace(config, batch_size=args.batch or config.batch_size), get_method(args.method)


@contextmanager
def _place(args: argparse.Namespace, writes: bool) -> Iterator[None]:
    """--force puts aside what --out holds, and a folder into which no edit was written does not stay."""
    from rlsedit.cli.saving import replacing

    with replacing(args.out) if args.force and writes else nullcontext():
        existed = args.out.exists()
        try:
            yield
        except BaseException:
            if writes and not args.resume:
                _clear(args.out, existed)
            raise


def _write(
    console: Any, editor: Editor, facts: list[Fact] | None, batch: int, recorder: Recorder | None,
    args: argparse.Namespace,
) -> None:  # fmt: skip
    """The facts, or the stream; what has been written when it ends early stays, which is said."""
    try:
        if facts is None:
            _serve(console, editor, batch, args)
        else:
            _edit(console, editor, facts, batch, args)
        if recorder is not None and _steps(editor):
            recorder.save(args.record, f"{Path(args.model).name}, {args.method}")
            console.line(f"what the solvers were given is in {args.record}")
    except BaseException:
        if _steps(editor):
            console.line(f"what has been written is kept in {args.out}; --resume goes on")
        raise
    finally:
        editor.close()


def _check(args: argparse.Namespace, streams: bool) -> None:
    if args.follow and str(args.facts) != "-" and not args.facts.is_file():
        raise FileNotFoundError(f"--facts: no file {args.facts}; --follow waits for lines of one that is there")
    if streams and (args.limit or args.skip_bad):
        raise ValueError("--limit, --skip-bad: are for files that are read at once; bad lines are answered one by one")
    if args.again and not args.resume:
        raise ValueError("--again: goes with --resume; what is begun writes all facts")
    if args.resume and args.text is not None:
        raise ValueError("--text: the folder has its second moments; leave it out with --resume")
    if (streams or args.record is not None) and size() > 1:
        raise ValueError("--facts -, --follow, --record: are for one process; leave torchrun out")
    if args.record is not None and args.resume:
        raise ValueError("--record: begins with a run; leave it out with --resume")
    if args.record is not None and not args.record.absolute().parent.is_dir():
        raise FileNotFoundError(f"--record: no folder {args.record.parent}")


def _kept(model: Any, args: argparse.Namespace) -> tuple[EditConfig, Method]:
    """Hyper-parameters and method of the folder; those on the command line have to be the same."""
    from dataclasses import asdict

    from rlsedit.methods import get_method
    from rlsedit.store.folder import store_of
    from rlsedit.store.session import Session

    session = Session.read(store_of(args.out))
    if args.method not in (None, session.method):
        raise ValueError(f"--method: {args.out} was made with {session.method!r}, got {args.method!r}")
    args.method = session.method
    if args.settings or args.layers is not None or args.seed is not None:
        wanted, kept = asdict(config_for(model, args)), asdict(session.config)
        named = {name for name, _ in args.settings} | ({"layers"} if args.layers is not None else set())
        named |= {"seed"} if args.seed is not None else set()
        for name in sorted(named):
            if wanted[name] != kept[name]:
                raise ValueError(f"--resume: {args.out} was made with {name} = {kept[name]}, got {wanted[name]}")
    return session.config, get_method(session.method)


def _rehearsed(console: Any, facts: list[Fact], args: argparse.Namespace) -> list[Fact]:
    """The facts that a run would write; conflicts among them, and with what is in the folder, are refused or named."""
    from rlsedit.store import conflicts
    from rlsedit.store.check import reading
    from rlsedit.store.index import Index
    from rlsedit.store.records import Entry

    index = Index()
    if args.resume:
        with reading(args.out) as (ledger, _):
            rows, step = ledger.edits(), ledger.known
        facts = _left(console, rows, step, facts, args)
        inside = [row.fact for row in rows if row.state == "applied"]
        about = tuple((fact.subject, fact.prompt, fact.relation or "") for fact in inside)
        index.push(Entry(step, "batch", tuple(fact.id for fact in inside), (), about))  # all as of one step
    conflicts.settle(facts, index, args.on_conflict)
    return facts


def _plan(
    console: Any, adapter: Any, config: Any, method: Any, facts: list[Fact] | None, batch: int, args: Any
) -> None:
    from rlsedit.store.conflicts import batches

    weight, part = adapter.rows(config.layers[0]), adapter.part(config.layers[0])
    d, v = part.d, part.v
    state = 8 if str(weight.dtype).endswith("float64") else 4
    console.line(f"model    {type(adapter.model).__name__}, {adapter.num_layers} layers, on {weight.device}")
    if adapter.processes.many:
        lies = {"rows": "rows", "columns": "columns", "whole": "copies"}[part.kind]
        console.line(f"lies     on {adapter.processes.size} processes ({args.parallel}), {lies} of the edited weights")
    console.line(f"edits    {adapter.module} of layers {', '.join(map(str, config.layers))}: {d} x {v}, {weight.dtype}")
    console.line(f"method   {method.name}: {method.summary}")
    if facts is None:
        console.line(f"facts    as they come, in batches of at most {batch}")
    else:
        count = len(batches(facts, batch, apart=args.on_conflict == "replace"))
        console.line(f"facts    {len(facts)} in {count} {'batch' if count == 1 else 'batches'} of at most {batch}")
    size = len(config.layers) * d * d * state / 2**20
    console.line(f"state    at most {size:.0f} MiB for {len(config.layers)} layers")
    console.line(f"output   {args.out}" + (" (not written: --dry-run)" if args.dry_run else ""))


def _editor(
    console: Any, adapter: Any, tokenizer: Any, config: EditConfig, method: Method, texts: list[str] | None,
    recorder: Recorder | None, args: argparse.Namespace,
) -> Editor:  # fmt: skip
    """The editor of the folder, which is read or made."""
    from rlsedit.editor import Editor
    from rlsedit.recording import recording
    from rlsedit.store.modelfiles import mend

    every = args.snapshot_every
    if args.resume:
        with console.bar(f"edits of {args.out}", None):
            editor = Editor.resume(args.out, adapter.model, tokenizer, adapter=adapter, every=every, states=args.states)
            with adapter.processes.together("--resume"):
                if adapter.processes.writes:
                    mend(args.out)
        return editor
    moments = measured(console, adapter, tokenizer, config.layers, texts)
    recipe = method if recorder is None else recording(method, recorder)
    editor = Editor(adapter.model, tokenizer, recipe, config, moments=moments, adapter=adapter, states=args.states)
    editor.save(args.out, every=every)
    return editor


def _edit(console: Any, editor: Editor, facts: list[Fact], batch: int, args: argparse.Namespace) -> None:
    from rlsedit.checking import check_lengths
    from rlsedit.report.scores import score_table
    from rlsedit.report.stream import edit_stream
    from rlsedit.store import conflicts

    assert editor.folder is not None
    todo = facts
    if args.resume:
        todo = _left(console, editor.folder.ledger.edits(), _steps(editor), facts, args)
    check_lengths(editor.adapter, editor.tokenizer, todo, editor.method, editor.folder.session.contexts)
    if args.resume and not args.no_evaluate:  # a new folder is measured before anything is written
        _check_scored(editor, facts)
    found = []
    if todo:
        found = conflicts.settle(todo, editor.folder.journal.index, args.on_conflict)
    origin = _origin(editor, args, bool(todo))
    scores = {}
    scored = [] if args.no_evaluate else measurable(facts, console)
    if not args.no_evaluate and not args.resume:
        scores["before"] = _measure(console, editor, scored, "measuring the model before")
    if todo:
        console.heading(f"Writing {len(todo)} facts")
        edit_stream(editor, todo, batch, console, on_conflict=args.on_conflict)
    if not args.no_evaluate:
        scores["after"] = _measure(console, editor, scored, "measuring the model after")
        console.line()
        console.line(score_table(scores))
    finish(console, editor, args.model, args.out, origin, scores, found)


def _left(console: Any, rows: Sequence[Edit], step: int, facts: Sequence[Fact], args: argparse.Namespace) -> list[Fact]:
    """Facts that are neither in the model nor taken out, after those that were planned when the last run ended."""
    from rlsedit.store.again import told_apart

    found = told_apart(facts, rows, args.again, args.on_conflict == "replace")
    named = {fact.id for fact in found.facts}
    todo = [row.fact for row in rows if row.state == "planned" and row.fact.id not in named] + found.left
    console.line(f"resumed  behind step {step}: {len(todo)} facts are left")
    if found.outdated:
        shown = _shown(fact.id for fact in found.outdated)
        console.line(f"left out {len(found.outdated)} that later facts replace, which the model has already: {shown}")
    if found.out:
        reasons = Counter(row.reason for row in found.out)
        console.line(
            f"left out {len(found.out)} written before and taken out of the model since ("
            + ", ".join(f"{count} {reason}" for reason, count in reasons.items())
            + f"): {_shown(row.fact.id for row in found.out)}"
        )
        console.line(
            "         later facts of the file replace them" if args.again else "         --again writes them again"
        )
    return todo


def _shown(ids: Iterable[str]) -> str:
    some = list(ids)
    return ", ".join(some[:_SHOWN]) + (", ..." if len(some) > _SHOWN else "")


def _origin(editor: Editor, args: argparse.Namespace, given: bool = True) -> Origin:
    """Where the edits come from, kept as soon as facts are written, since nobody can tell it after an interruption."""
    from rlsedit.store.origin import Origin, base_of, origin_of

    if args.resume:
        origin = origin_of(args.out, args.model)
    else:
        origin = Origin(base_of(args.model), text=args.text.name if args.text else None)
    if given:
        origin = origin.given("-" if str(args.facts) == "-" else args.facts.name)
        with editor.adapter.processes.together("edit"):
            if editor.adapter.processes.writes:
                origin.write(args.out)
    return origin


def _serve(console: Any, editor: Editor, batch: int, args: argparse.Namespace) -> None:
    from rlsedit.cli.serving import serve
    from rlsedit.store.origin import origin_of

    _origin(editor, args, not args.resume)
    serve(
        editor, args.facts, batch, follow=args.follow, on_conflict=args.on_conflict, again=args.again,
        begun=lambda: _origin(editor, args),
    )  # fmt: skip
    finish(console, editor, args.model, args.out, origin_of(args.out, args.model), {}, [])


def finish(
    console: Any, editor: Editor, source: str, out: Path, origin: Origin, scores: dict[str, Any], found: Sequence[Any]
) -> None:  # fmt: skip
    """Takes a snapshot and puts the model with its report into the folder, unless they are there."""
    import torch

    from rlsedit.cli.saving import save_model
    from rlsedit.models import smollm2
    from rlsedit.store.modelfiles import behind, wrong

    processes = editor.adapter.processes
    there = processes.writes and behind(out) == _steps(editor) and not scores and not wrong(out)
    if bool(processes.same(torch.tensor(int(there)))[0]):
        console.line(f"\nnothing new: {out} stays as it is")
        return

    with console.bar("saving", None):
        editor.save(out)
        content = _report(editor, origin, scores, found)
        folder = smollm2.cached_copy() if source == "smollm2" else Path(source)
        save_model(
            editor.model, editor.tokenizer, folder, out, _steps(editor),
            json.dumps(content, indent=1, ensure_ascii=False) + "\n", processes,
        )  # fmt: skip
    console.line(f"\nwritten to {out}; its report is rlsedit-report.json")


def _steps(editor: Editor) -> int:
    return 0 if editor.folder is None else len(editor.folder.journal.entries)


def _clear(out: Path, existed: bool) -> None:
    """Leave nothing of a folder into which no edit was written, unless another process is about to write into it."""
    from rlsedit.store.errors import StoreError
    from rlsedit.store.folder import store_of
    from rlsedit.store.lock import Lock

    store = store_of(out)
    if store.is_dir() and not any((store / "records").iterdir()):
        with suppress(StoreError):
            lock = Lock(store / "lock", out)
            shutil.rmtree(store if existed else out, ignore_errors=True)
            lock.close()
    if not existed:
        with suppress(OSError):  # it is not empty, or not there
            out.rmdir()


def _check_scored(editor: Editor, facts: Sequence[Fact]) -> None:
    from rlsedit.metrics.counterfact import check_scored

    try:
        check_scored(editor.adapter, editor.tokenizer, facts)
    except ValueError as error:
        raise ValueError(f"{error}; --no-evaluate leaves the scores out") from None


def _measure(console: Any, editor: Any, facts: list[Any], label: str) -> Any:
    with console.bar(label, 1) as bar:
        return editor.evaluate(facts, progress=lambda done, total: bar.update(done / total))


def _report(editor: Editor, origin: Origin, scores: dict[str, Any], found: Sequence[Any]) -> dict[str, Any]:
    from dataclasses import asdict

    from rlsedit.report.environment import environment
    from rlsedit.report.scores import finite

    assert editor.folder is not None
    journal = editor.folder.journal
    entries = [entry for entry in journal.index.stack if entry.kind == "batch"]
    batches = [dict(journal.header(entry.number).report) for entry in entries if not entry.damaged]
    seconds: dict[str, float] = {}
    for batch in batches:
        for stage, value in batch["seconds"].items():
            seconds[stage] = seconds.get(stage, 0.0) + value
    return {
        "environment": environment(),
        "model": origin.model,
        "base": origin.base,
        "facts": {
            "file": origin.facts[-1] if origin.facts else "",
            "files": list(origin.facts),
            "written": len(journal.index.live),
        },
        "text": origin.text,
        "method": editor.method.name,
        "config": asdict(editor.config),
        "seconds": seconds,
        "conflicts": [asdict(conflict) for conflict in found],
        **{name: finite(asdict(entry)) for name, entry in scores.items()},
        "batches": finite(batches),
        "health": {str(layer): finite(entry) for layer, entry in editor.health().items()},
    }
