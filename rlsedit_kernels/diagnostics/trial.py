"""One stream, several steps beside it, and how far each is from the truth as the stream goes on."""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from pathlib import Path
from types import CoroutineType, GeneratorType
from typing import Any

import torch

from rlsedit_kernels.backends.precision import ieee_products
from rlsedit_kernels.diagnostics import measures
from rlsedit_kernels.diagnostics.steps import HasCovariance, HasHealth, MakeStep, Step
from rlsedit_kernels.diagnostics.streams import Batch, Stream
from rlsedit_kernels.diagnostics.truth import Exact, Truth, checkpoints

logger = logging.getLogger("rlsedit_kernels")

SCHEMA = "rlsedit-stability/1"

BROKEN = 1e-2
"""Error of W from which on a step counts as broken, and before which `health()` must have spoken."""

HEALTHY = 1e-4
"""Error of W up to which `health()` must be silent."""

DENSE_LIMIT = 1024
"""Largest d at which the covariance is taken apart at every look unless it is asked for."""

_REFUSALS = (ArithmeticError, torch.linalg.LinAlgError)
"""What a step says no with (`BreakdownError` is an ArithmeticError); any other exception is a mistake in the step."""


@dataclass(frozen=True)
class Point:
    """A step after a number of batches; what cannot be had is None. For the errors see `measures`.

    Attributes:
        batches: written so far.
        error_W, error_W_plain: of the weight, in the S-norm and plain, relative to W* - W_0.
        error_C, error_C_plain, smallest, asymmetry, condition: of the covariance.
        error_gain, error_gain_plain: of the gain of the last batch, formed from C as it is.
        leverage: of the last batch.
        drift: as `health()` measures it.
        status: of `health()`.
        form: in use.
    """

    batches: int
    error_W: float
    error_W_plain: float
    leverage: float
    error_C: float | None = None
    error_C_plain: float | None = None
    smallest: float | None = None
    asymmetry: float | None = None
    condition: float | None = None
    error_gain: float | None = None
    error_gain_plain: float | None = None
    drift: float | None = None
    status: str | None = None
    form: str | None = None


@dataclass(frozen=True)
class Trial:
    """One step on one stream.

    Attributes:
        stream, step: names.
        points: at growing numbers of batches, up to the end or to where the step gave up.
        seconds: spent in `update`.
        refused_at: the batch (from 1; 0: when it was made) at which the step refused, None if it did not.
        failed_at: the same for an exception that is no refusal: an error in the step, or in what it was given.
        reason: kind and text of the exception.
        broke_at: the first checkpoint with an error of W above `BROKEN`, or not finite; None if there was none.
        flagged_at: the first checkpoint at which `health()` said "warning" or "broken".
    """

    stream: str
    step: str
    points: tuple[Point, ...]
    seconds: float
    refused_at: int | None
    reason: str | None
    failed_at: int | None = None

    @property
    def ended_at(self) -> int | None:
        """The batch at which an exception ended the trial, of either kind."""
        return self.refused_at if self.failed_at is None else self.failed_at

    @property
    def broke_at(self) -> int | None:
        return next((p.batches for p in self.points if not p.error_W <= BROKEN), None)

    @property
    def flagged_at(self) -> int | None:
        return next((p.batches for p in self.points if p.status not in (None, "ok")), None)

    @property
    def missed(self) -> tuple[int, ...]:
        """Checkpoints at which W is off by more than `BROKEN` and `health()` says ok."""
        return tuple(p.batches for p in self.points if p.status == "ok" and not p.error_W <= BROKEN)

    @property
    def warned_in_time(self) -> bool | None:
        """Whether `health()` spoke no later than W passed `BROKEN`, and ever after; None where it never did."""
        if self.broke_at is None:
            return None
        return self.flagged_at is not None and self.flagged_at <= self.broke_at and not self.missed

    @property
    def false_alarm(self) -> bool:
        """Whether `health()` spoke on a stream along which W was never off by more than `HEALTHY`."""
        return self.flagged_at is not None and self.worst <= HEALTHY and self.ended_at is None

    @property
    def worst(self) -> float:
        """Largest error of W along the stream."""
        return max((p.error_W for p in self.points), default=math.nan)


class _Runner:
    """One step, fed until it gives up."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.step: Step | None = None
        self.reason: str | None = None
        self.points: list[Point] = []
        self.seconds = 0.0
        self.refused_at: int | None = None
        self.failed_at: int | None = None

    @property
    def ended(self) -> bool:
        return self.refused_at is not None or self.failed_at is not None

    @contextmanager
    def guarded(self, count: int) -> Iterator[None]:
        """Whatever the step raises ends its trial alone, and is kept as what it is: a refusal or an error."""
        try:
            yield
        except Exception as error:
            self.reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
            if isinstance(error, _REFUSALS):
                self.refused_at = count
            else:
                logger.debug("stability: %s failed", self.name, exc_info=True)
                self.failed_at = count

    def make(self, maker: MakeStep, stream: Stream) -> None:
        with self.guarded(0):
            self.step = maker(replace(stream, W_0=stream.W_0.clone()))

    def write(self, batch: Batch, count: int) -> None:
        if self.step is None or self.ended:
            return
        K, V = batch.K.clone(), batch.V.clone()  # a step may do with them what it likes
        _settle(K)
        begin = time.perf_counter()
        with self.guarded(count):
            given = self.step.update(K, V, batch.noise, batch.forget)  # type: ignore[func-returns-value]
            if isinstance(given, (GeneratorType, CoroutineType)):
                given.close()
                raise TypeError(f"update must write the batch when it is called, got a {type(given).__name__} from it")
        _settle(K)
        self.seconds += time.perf_counter() - begin

    def look(self, batch: Batch, count: int, exact: Exact, true_gain: torch.Tensor | None, leverage: float) -> None:
        if self.step is not None and not self.ended:
            with self.guarded(count):
                self.points.append(self._point(self.step, batch, count, exact, true_gain, leverage))

    @staticmethod
    def _point(
        step: Step, batch: Batch, count: int, exact: Exact, true_gain: torch.Tensor | None, leverage: float
    ) -> Point:
        point = Point(count, *measures.weight_errors(step.weight, exact), leverage)
        if true_gain is not None and isinstance(step, HasCovariance):
            C = step.covariance()
            gain = measures.on_host(C) @ batch.K.to(torch.float64).mT / batch.noise
            of_gain = measures.gain_errors(gain, true_gain, exact)
            e = measures.covariance_error(C, exact)
            point = replace(
                point, error_C=e.relative, error_C_plain=e.plain, smallest=e.smallest, asymmetry=e.asymmetry,
                condition=e.condition, error_gain=of_gain[0], error_gain_plain=of_gain[1],
            )  # fmt: skip
        if isinstance(step, HasHealth):
            health = step.health()
            used = f"{health.form} {health.storage.removeprefix('torch.')}"
            point = replace(point, drift=health.drift, status=health.status, form=used)
        return point

    def trial(self, stream: str) -> Trial:
        return Trial(stream, self.name, tuple(self.points), self.seconds, self.refused_at, self.reason, self.failed_at)


def least_bytes(d: int, u: int, v: int, steps: int) -> float:
    """Bytes of host memory that `run_trials` takes at the least, on streams of (u, d) keys and (u, v) targets.

    The factor of the batch solution stacked with a batch, put into order, and what comes of it, in float64; for each of
    the steps a d x d matrix and a weight in float32.
    """
    return 8.0 * (3 * d + 2 * u) * (d + v) + 4.0 * steps * d * (d + v)


def run_trials(
    stream: Stream,
    steps: Mapping[str, MakeStep],
    batches: int,
    *,
    at: Sequence[int] | None = None,
    covariances: bool | None = None,
    device: torch.device | str | None = None,
    progress: Callable[[int], None] | None = None,
) -> list[Trial]:
    """Write a stream with several steps side by side and compare each with the batch solution.

    Args:
        stream: where the batches come from; one that ends sooner is followed to its end, and looked at there.
        steps: makers by name; see `steps.Step` for what is asked of them.
        batches: >= 1.
        at: numbers of batches at which errors are looked at, each >= 1; default `checkpoints(batches)`.
        covariances: whether errors of C and gain are told too, at two dense eigendecompositions a look; None: up to
            d = `DENSE_LIMIT`.
        device: where the steps find the first weight and the batches, and work; None for the CPU. The truth is worked
            out on the CPU.
        progress: called with the number of batches done.

    Returns:
        One trial for each step. A step that raises is left at that batch; other steps go on. What is no refusal is kept
        apart (`Trial.failed_at`). Each step is given copies of the first weight and of the batches.

    Raises:
        ValueError: `batches` or `at` do not fit, or float64 cannot hold the batch solution of the stream (`Truth`).
    """
    if batches < 1:
        raise ValueError(f"run_trials: batches must be >= 1, got {batches}")
    looks = set(checkpoints(batches) if at is None else at)
    if any(count < 1 for count in looks):
        raise ValueError(f"run_trials: at must hold numbers >= 1, got {min(looks)}")
    dense = stream.d <= DENSE_LIMIT if covariances is None else covariances
    given = replace(stream, W_0=stream.W_0.to(device or "cpu"))
    truth = Truth(stream)
    runners = [_Runner(name) for name in steps]
    for runner, make in zip(runners, steps.values(), strict=True):
        runner.make(make, given)

    def look(batch: Batch, count: int) -> None:
        exact = truth.now()
        true_gain = exact.C @ batch.K.to(torch.float64).mT / batch.noise if dense else None
        leverage = measures.leverage(batch.K, batch.noise, exact)
        for runner in runners:
            runner.look(batch, count, exact, true_gain, leverage)

    last: tuple[Batch, int] | None = None
    with ieee_products():
        for count, batch in enumerate(stream.batches(), start=1):
            truth.add(batch)
            there = replace(batch, K=batch.K.to(given.W_0.device), V=batch.V.to(given.W_0.device))
            for runner in runners:
                runner.write(there, count)
            if count in looks:
                look(batch, count)
            if progress is not None:
                progress(count)
            last = batch, count
            if count == batches:
                break
        if last is not None and last[1] < batches and last[1] not in looks:
            look(*last)
    return [runner.trial(stream.name) for runner in runners]


def _settle(tensor: torch.Tensor) -> None:
    """What was launched on the tensor's device has ended."""
    if tensor.is_cuda:
        torch.cuda.synchronize(tensor.device)


def save(path: Path, settings: Mapping[str, Any], trials: Sequence[Trial]) -> None:
    """Write trials as JSON of the schema `SCHEMA`: points by column, three digits, what is not finite as a word.

    Args:
        path: the file.
        settings: d, u, batches, machine, ...: what the figures mean nothing without.
        trials: in the order in which they shall be kept.
    """
    content: dict[str, Any] = {"schema": SCHEMA, "settings": dict(settings), "columns": _COLUMNS, "trials": []}
    for trial in trials:
        entry = {name: getattr(trial, name) for name in (*_KEPT, "broke_at", "flagged_at")}
        entry["points"] = [[_plain(getattr(point, name)) for name in _COLUMNS] for point in trial.points]
        content["trials"].append(_plain(entry))
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".part")
    temporary.write_text(_lines(content), encoding="utf-8")
    temporary.replace(path)


def load(path: Path) -> tuple[dict[str, Any], list[Trial]]:
    """What `save` wrote: settings and trials.

    Raises:
        ValueError: the file is not of the schema `SCHEMA`, or not whole.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"load: {path.name} must be JSON: {error}") from None
    if not isinstance(content, dict) or content.get("schema") != SCHEMA:
        found = content.get("schema") if isinstance(content, dict) else type(content).__name__
        raise ValueError(f"load: {path.name} must have the schema {SCHEMA!r}, got {found!r}")
    try:
        columns = content["columns"]
        trials = []
        for entry in content["trials"]:
            points = tuple(Point(**dict(zip(columns, map(_number, row), strict=True))) for row in entry["points"])
            trials.append(
                Trial(points=points, **{key: entry[key] for key in _KEPT if key in entry})
            )  # older files: no failed_at
        return content["settings"], trials
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"load: {path.name} is not a whole file of schema {SCHEMA!r}: {error}") from None


_KEPT = ("stream", "step", "seconds", "refused_at", "failed_at", "reason")
_COLUMNS = [field.name for field in fields(Point)]
_WORDS = {"inf": math.inf, "-inf": -math.inf, "nan": math.nan}


def _lines(content: dict[str, Any]) -> str:
    """JSON with one trial a line."""
    trials = content.pop("trials")
    head = json.dumps(content, allow_nan=False)[:-1]
    return head + ', "trials": [\n' + ",\n".join(json.dumps(t, allow_nan=False) for t in trials) + "\n]}\n"


def _plain(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.3g}") if math.isfinite(value) else str(value)
    return value


def _number(value: Any) -> Any:
    return _WORDS.get(value, value) if isinstance(value, str) else value
