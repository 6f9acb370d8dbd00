"""Measures contenders on one problem, in turns, so that a drifting machine favours none."""

from __future__ import annotations

import contextlib
import gc
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from types import AsyncGeneratorType, CoroutineType, GeneratorType
from typing import Any

import torch

from rlsedit_kernels.profile.contenders import BASELINE, Contender, Step
from rlsedit_kernels.profile.counting import Count, Counter
from rlsedit_kernels.profile.machine import Ceilings, Peak, ceilings, free_bytes, machine, used_bytes
from rlsedit_kernels.profile.problem import Problem, least_bytes, solution_bytes
from rlsedit_kernels.profile.result import Profile, Row, StageRow, Times
from rlsedit_kernels.profile.stages import Clock, metered

__all__ = ["Settings", "measure", "require_room", "rows_of"]

logger = logging.getLogger("rlsedit_kernels")

Progress = Callable[[str], None]

_FLUSH = {"cpu": 2**27, "cuda": 2**28}
_SLOW = 10.0
_LATER = (GeneratorType, CoroutineType, AsyncGeneratorType)


@dataclass(frozen=True)
class Settings:
    """How a profile is taken.

    Attributes:
        repetitions: calls of each contender that are timed; fewer where they would take longer than `seconds`.
        seconds: time for the repetitions of one contender.
        limit: a contender that is expected to take longer than this for one batch, or for all those that are written
            before it is timed, in seconds, is left out.
        check: batches after which the weight is compared with float64; they serve as warm-up too.
        cold: whether caches are flushed before each timed call, as the passes over a language model do that lie
            between two batches.
        memory: bytes that contenders may take together; None for nine tenths of what is free.
        baseline: name of the contender that ratios refer to.
    """

    repetitions: int = 11
    seconds: float = 20.0
    limit: float = 600.0
    check: int = 2
    cold: bool = True
    memory: float | None = None
    baseline: str = BASELINE

    def __post_init__(self) -> None:
        for name in ("repetitions", "check"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int):
                raise TypeError(f"profile: {name} must be an int, got {value!r}")
            if value < 1:
                raise ValueError(f"profile: {name} must be at least 1, got {value}")
        for name in ("seconds", "limit"):
            if not getattr(self, name) > 0:
                raise ValueError(f"profile: {name} must be positive, got {getattr(self, name)}")
        if self.memory is not None and not self.memory > 0:
            raise ValueError(f"profile: memory must be positive or None, got {self.memory}")


@dataclass(frozen=True)
class _Cell:
    """A contender at an age: batches written before the clock is started."""

    contender: Contender
    history: int


@dataclass
class _Run:
    """A cell whose contender has been made."""

    cell: _Cell
    steps: list[Step]
    written: int = 0
    pace: float = 0.0
    samples: list[tuple[float, dict[str, float]]] = field(default_factory=list)
    counter: Counter = field(default_factory=Counter)
    error: float | None = None
    error_batches: int | None = None
    peak: float | None = None
    kept: float | None = None


def measure(
    contenders: Sequence[Contender],
    problem: Problem,
    settings: Settings | None = None,
    *,
    history: Sequence[int] = (0,),
    found: Ceilings | None = None,
    progress: Progress | None = None,
) -> Profile:
    """Put contenders into one table.

    Args:
        contenders: those of `profile.catalogue()`, one's own, or both.
        problem: the layer and its batches.
        settings: how it is measured.
        history: batches that are written before the clock is started; several ages are measured side by side.
        found: ceilings of the machine where they are known from just before; None measures them, in seconds.
        progress: called with a line about what is being done.

    Raises:
        TypeError: one of `contenders` is no `Contender`.
        ValueError: no contenders, names that repeat, or a negative history.
    """
    settings = settings or Settings()
    found = found or ceilings(problem.device)
    rows = rows_of(contenders, problem, settings, found, history=history, progress=progress)
    kind = "shape" if len(history) == 1 else "history"
    return Profile(kind, machine(problem.device), found, asdict(settings), tuple(rows))


def rows_of(
    contenders: Sequence[Contender],
    problem: Problem,
    settings: Settings,
    found: Ceilings,
    *,
    history: Sequence[int] = (0,),
    progress: Progress | None = None,
) -> list[Row]:
    """The rows of `measure`, contender by contender."""
    for one in contenders:
        if not isinstance(one, Contender):
            raise TypeError(f"profile: contenders must be Contender(name, make), got {one!r}")
    names = [one.name for one in contenders]
    if not names:
        raise ValueError("profile: contenders must hold at least one, got none")
    if len(set(names)) != len(names):
        raise ValueError(f"profile: contenders must have distinct names, got {names}")
    if not history or min(history) < 0 or len(set(history)) != len(history):
        raise ValueError(f"profile: history must be distinct numbers of batches, none negative, got {list(history)}")
    tell = progress or (lambda _: None)
    budget = settings.memory if settings.memory is not None else 0.9 * free_bytes(problem.device)
    cells = [_Cell(one, age) for one in contenders for age in history]
    rows: dict[_Cell, Row] = {}
    able: list[_Cell] = []
    for cell in cells:
        reason = _in_the_way(cell, problem, settings, found, budget)
        if reason:
            rows[cell] = _row(cell, problem, status="skipped", reason=reason)
        else:
            able.append(cell)
    tell("the float64 solution")  # before anything else takes memory
    exact = {
        key: problem.exact(key[1], key[0]) for key in dict.fromkeys(_truth(cell, settings) for cell in able) if key
    }
    for group in _groups(able, problem, settings.baseline, budget):
        new = _together(group, problem, settings, found, exact, tell)
        rows = {**new, **rows}  # the baseline stays with its first group
    return [rows[cell] for cell in cells]


_Exact = Mapping[tuple[str, int], torch.Tensor]


def _truth(cell: _Cell, settings: Settings) -> tuple[str, int] | None:
    """Which weight a contender is compared with, and after how many batches."""
    one = cell.contender
    return None if one.truth is None else (one.truth, settings.check if one.history else 1)


def require_room(problems: Sequence[Mapping[str, Any]], memory: float | None = None, option: str = "memory") -> None:
    """Refuse problems whose weight and batches alone do not fit, before any of them is made.

    Args:
        problems: arguments of `Problem`.
        memory: bytes that may be used; None for nine tenths of what is free.
        option: what a message calls that.

    Raises:
        ValueError: with the bytes that are needed.
    """
    for given in problems:
        sizes = [given[name] for name in ("d", "v", "u")]
        device, host = torch.device(given.get("device", "cpu")), torch.device("cpu")
        own, drawn = least_bytes(given["d"], given["v"], given["u"], given.get("dtype", torch.float32))
        needs = {host: max(own, drawn)} if device == host else {device: own, host: drawn}
        for place, need in needs.items():
            budget = memory if memory is not None and place == device else 0.9 * free_bytes(place)
            if need > budget:
                raise ValueError(
                    f"profile: d = {sizes[0]}, v = {sizes[1]}, u = {sizes[2]}: weight and batches alone take "
                    f"{need / 1e9:.1f} GB on {place}, {budget / 1e9:.1f} GB may be used; {option} says otherwise"
                )


def _in_the_way(cell: _Cell, problem: Problem, settings: Settings, found: Ceilings, budget: float) -> str:
    """Why a contender is not run: memory or time."""
    one, rate = cell.contender, found.flops_per_s["float32"]
    needs = {"": _need(one, problem)}
    if one.truth is not None:
        needs[" for the float64 solution"] = solution_bytes(problem.d, problem.v)
    for what, need in needs.items():
        if need > budget:
            return f"needs {need / 1e9:.3g} GB{what}, {budget / 1e9:.3g} GB may be used"
    batch = _expected(one, problem, found)
    start = 0.0 if one.start is None else _times(one, problem) * one.start(problem) / rate
    older = batch if one.age is None else _times(one, problem) * one.age(problem) / rate
    first = settings.check if one.history else 1
    waits = {
        "a batch": batch,
        "its start": start,
        f"{first} batches for its error": (first - 1) * batch,
        f"{cell.history} batches before it": max(0, cell.history - first) * older,
    }
    for what, expected in waits.items():
        if expected > settings.limit:
            return f"{what} would take about {expected:.3g} s, the limit is {settings.limit:.3g} s"
    return ""


def _expected(one: Contender, problem: Problem, found: Ceilings) -> float:
    """Seconds of a batch, roughly; 0 where nothing is known."""
    return 0.0 if one.flops is None else _times(one, problem) * one.flops(problem) / found.flops_per_s["float32"]


def _times(one: Contender, problem: Problem) -> int:
    """Steps of a batch."""
    return 1 if one.at_once else problem.layers


def _need(one: Contender, problem: Problem) -> float:
    if one.bytes is None:
        return 0.0
    return one.bytes(problem) * _times(one, problem)


def _groups(cells: Sequence[_Cell], problem: Problem, baseline: str, budget: float) -> list[list[_Cell]]:
    """Groups that fit into memory together, the baseline in each: what is compared is measured in one run."""
    base = [cell for cell in cells if cell.contender.name == baseline]
    reserved = sum(_need(cell.contender, problem) for cell in base)
    groups: list[list[_Cell]] = []
    left = 0.0
    for cell in cells:
        if cell in base:
            continue
        need = _need(cell.contender, problem)
        if not groups or need > left:
            groups.append([*base])
            left = budget - reserved
        groups[-1].append(cell)
        left -= need
    return groups or ([base] if base else [])


def _together(
    group: Sequence[_Cell], problem: Problem, settings: Settings, found: Ceilings, exact: _Exact, tell: Progress
) -> dict[_Cell, Row]:
    rows: dict[_Cell, Row] = {}
    runs: list[_Run] = []
    flush = torch.empty(_FLUSH.get(problem.device.type, 2**27) // 4, device=problem.device) if settings.cold else None

    def failed(cell: _Cell, error: Exception) -> None:
        logger.debug("profile: %s failed", cell.contender.name, exc_info=True)
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]
        rows[cell] = _row(cell, problem, status="failed", reason=reason)

    gc.collect()
    for cell in group:
        tell(f"{cell.contender.name}: first batches")
        try:
            run = _started(cell, problem, settings, found, flush, exact)
            changed = problem.restore()
            if changed:
                raise ValueError(
                    f"the step changed {' and '.join(changed)} in place: others are given it too, use a copy"
                )
            runs.append(run)
        except Exception as error:  # whatever a contender does wrong is a row of the table
            problem.restore()
            failed(cell, error)
    wanted = {id(run): _repetitions(run, settings) for run in runs}
    rounds = max(wanted.values(), default=0)
    for i in range(rounds):
        tell(f"round {i + 1} of {rounds}")
        for run in list(runs):
            if (i + 1) * wanted[id(run)] // rounds > i * wanted[id(run)] // rounds:
                try:
                    run.samples.append(_timed(run, problem, flush))
                except Exception as error:
                    failed(run.cell, error)
                    runs.remove(run)
    base = {run.cell.history: run for run in runs if run.cell.contender.name == settings.baseline}
    for run in runs:
        rows[run.cell] = _measured(run, problem, found, base.get(run.cell.history))
    return rows


def _started(
    cell: _Cell,
    problem: Problem,
    settings: Settings,
    found: Ceilings,
    flush: torch.Tensor | None,
    exact: _Exact,
) -> _Run:
    """Make it, write the batches of the check, compare, write the history, and count the work."""
    one = cell.contender
    if one.shared is not None:
        one.shared(problem)
    before = used_bytes(problem.device)
    with one.forced():
        run = _Run(cell, [one.make(problem) for _ in range(_times(one, problem))])
        after = used_bytes(problem.device)
        run.kept = None if before is None or after is None else max(0.0, after - before)
        batches = settings.check if one.history else 1
        firsts = [_timed(run, problem, flush) for _ in range(batches - 1)]
        slow = (firsts[-1][0] if firsts else _expected(one, problem, found)) > _SLOW
        with Peak(problem.device) as peak:
            firsts.append(_timed(run, problem, flush, counter=run.counter if slow else None))
        run.peak, run.pace = peak.bytes, firsts[-1][0]
        weight = getattr(run.steps[0], "weight", None)
        truth = _truth(cell, settings)
        if truth is not None and isinstance(weight, torch.Tensor):
            run.error, run.error_batches = _error(weight, exact[truth], problem.weight), batches
        while run.written < cell.history:
            _write(run, problem, timed=False)
        if slow:  # warm from its first call, counted with it, and not asked for again
            run.samples.extend(firsts if run.written == batches else [])
            return run
        _write(run, problem)  # what a state does in its first batches only is neither counted nor measured
        with run.counter, metered(run.counter):
            _write(run, problem)
        _write(run, problem)
        with Peak(problem.device) as peak:
            _write(run, problem)
        run.peak = peak.bytes
    return run


def _write(run: _Run, problem: Problem, *, timed: bool = True) -> None:
    K, V = problem.batch(run.written)
    for step in run.steps:
        given = (step if timed else getattr(step, "age", step))(K, V)
        if isinstance(given, _LATER):
            if isinstance(given, CoroutineType):
                given.close()
            raise TypeError(f"a step must do its work when it is called, got a {type(given).__name__} from it")
    run.written += 1


def _timed(
    run: _Run, problem: Problem, flush: torch.Tensor | None, *, counter: Counter | None = None
) -> tuple[float, dict[str, float]]:
    """One batch on the clock; counted too where it is long enough not to notice."""
    if flush is not None:
        flush.fill_(float(run.written))
    with run.cell.contender.forced(), counter or contextlib.nullcontext(), Clock(problem.device, counter) as clock:
        _write(run, problem)
    return clock.seconds, clock.stages


def _repetitions(run: _Run, settings: Settings) -> int:
    """How often a contender is still to be timed."""
    wanted = min(float(settings.repetitions), max(1.0, settings.seconds / max(run.pace, 1e-9)))
    return max(0, int(wanted) - len(run.samples))


def _error(weight: torch.Tensor, exact: torch.Tensor, first: torch.Tensor) -> float:
    """Relative to the change, in slices: no float64 copy of a large weight more than is needed.

    Raises:
        ValueError: the weight of the step has another shape, or is not finite.
    """
    if weight.shape != exact.shape:
        raise ValueError(f"weight of a step must have shape (d, v) = {tuple(exact.shape)}, got {tuple(weight.shape)}")
    weight = weight.detach()
    wrong = change = 0.0
    for rows in range(0, exact.shape[0], 1024):
        part = slice(rows, rows + 1024)
        wrong += float((weight[part].to(exact) - exact[part]).square().sum())
        change += float((exact[part] - first[part].double()).square().sum())
    if not math.isfinite(wrong):
        raise ValueError("weight of the step is not finite")
    return (wrong / change) ** 0.5


def _measured(run: _Run, problem: Problem, found: Ceilings, base: _Run | None) -> Row:
    times = Times.of([seconds for seconds, _ in run.samples])
    names = list(dict.fromkeys(name for _, stages in run.samples for name in stages))
    stages = []
    for name in names:
        seconds = Times.of([stages.get(name, 0.0) for _, stages in run.samples]).median
        work = run.counter.stages.get(name, Count())
        stages.append(StageRow(name, seconds, work.flops, work.bytes, found.reached(work, seconds)))
    total = Count.total(run.counter.stages.values())
    beside = None if base is None else Times.of([seconds for seconds, _ in base.samples])
    return _row(
        run.cell,
        problem,
        status="measured",
        times=times,
        ratio=None if beside is None else times.median / beside.median,
        baseline=None if beside is None else beside.median,
        baseline_repetitions=None if beside is None else beside.repetitions,
        stages=tuple(stages),
        flops=total.flops,
        uncounted=tuple(sorted(total.uncounted)),
        bytes=total.bytes,
        of_ceiling=found.reached(total, times.median),
        peak_bytes=run.peak,
        kept_bytes=run.kept,
        error=run.error,
        error_batches=run.error_batches,
    )


def _row(cell: _Cell, problem: Problem, *, status: str, reason: str = "", **values: Any) -> Row:
    facts = {**problem.settings(), "history": cell.history}
    return Row(cell.contender.name, cell.contender.summary, status, reason, facts, **values)
