"""What a profile says, as dataclasses and as JSON of one versioned schema."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rlsedit_kernels.profile.machine import Ceilings

__all__ = ["SCHEMA", "Profile", "Row", "StageRow", "Times", "load"]

SCHEMA = "rlsedit-profile/1"


@dataclass(frozen=True)
class Times:
    """Seconds of the repetitions: median, and the second and eighth decile as spread."""

    median: float
    p20: float
    p80: float
    repetitions: int

    @classmethod
    def of(cls, seconds: Sequence[float]) -> Times:
        """Of at least one repetition."""
        ordered = sorted(seconds)

        def at(q: float) -> float:
            return ordered[min(len(ordered) - 1, round(q * (len(ordered) - 1)))]

        return cls(statistics.median(ordered), at(0.2), at(0.8), len(ordered))


@dataclass(frozen=True)
class StageRow:
    """One stage of a step.

    Attributes:
        name: as the step names it; "other" for what is outside of every stage.
        seconds: median.
        flops, bytes: counted (`profile.counting`); bytes are the least that its calls have to move.
        of_ceiling: `Ceilings.reached`. Above 1 where a cache serves what is counted as memory.
    """

    name: str
    seconds: float
    flops: float
    bytes: float
    of_ceiling: float | None


@dataclass(frozen=True)
class Row:
    """One contender on one problem.

    Attributes:
        name, summary: of the contender.
        status: "measured", "extrapolated" (from smaller sizes, never mixed with measured ones), "skipped", "failed".
        reason: why it was skipped or failed, or from what it was extrapolated.
        problem: d, v, u, layers, dtype, device, seed; `history`, batches written before the clock was started.
        times: of one batch, all layers; None where there are none.
        ratio: its median over `baseline`; None without a baseline.
        baseline: seconds, median of the baseline in the same interleaved run; it is measured anew with each group that
            fits into memory together. None without one, and in files older than this field.
        baseline_repetitions: how many calls that median is of.
        stages: parts of a batch.
        flops, bytes: of a batch, counted.
        uncounted: operators whose operations are not among `flops`, since their number is not known.
        of_ceiling: as for a stage, of the whole batch.
        peak_bytes: most memory that a batch takes beyond what is in use before it.
        kept_bytes: memory in use by the contender between batches, by the growth of what is in use when it is made.
        error: |W - W_exact|_F / |W_exact - W_0|_F after the first batches, against float64.
        error_batches: how many batches that was.
    """

    name: str
    summary: str
    status: str
    reason: str
    problem: dict[str, Any]
    times: Times | None = None
    ratio: float | None = None
    stages: tuple[StageRow, ...] = ()
    flops: float | None = None
    bytes: float | None = None
    of_ceiling: float | None = None
    peak_bytes: float | None = None
    kept_bytes: float | None = None
    error: float | None = None
    error_batches: int | None = None
    baseline: float | None = None
    baseline_repetitions: int | None = None
    uncounted: tuple[str, ...] = ()

    @property
    def compared_with(self) -> float | None:
        """Seconds of the baseline that `ratio` is of, also in older files, which have time and ratio alone."""
        if self.baseline is not None or self.times is None or not self.ratio:
            return self.baseline
        return self.times.median / self.ratio

    @property
    def per_edit(self) -> float | None:
        """Seconds for one edit: a batch over its u keys."""
        return None if self.times is None else self.times.median / int(self.problem["u"])


@dataclass(frozen=True)
class Profile:
    """A run.

    Attributes:
        kind: "shape" (one problem), "history", "d", "u" or "layers" (a sweep of that).
        machine: device, versions, threads.
        ceilings: of the machine, taken in the same run.
        settings: how it was measured.
        rows: one for each contender and problem.
    """

    kind: str
    machine: dict[str, Any]
    ceilings: Ceilings
    settings: dict[str, Any]
    rows: tuple[Row, ...] = field(default=())

    def as_dict(self) -> dict[str, Any]:
        """For JSON; numbers that are not finite become null."""
        content = _finite({"schema": SCHEMA, **asdict(self)})
        assert isinstance(content, dict)
        return content

    def save(self, path: str | Path) -> None:
        """Write JSON, whole or not at all.

        Raises:
            OSError: it cannot be written; what was there is still there.
        """
        final = Path(path)
        final.parent.mkdir(parents=True, exist_ok=True)
        part = final.with_name(f".{final.name}.part")
        try:
            part.write_text(json.dumps(self.as_dict(), indent=1) + "\n", encoding="utf-8")
            part.replace(final)
        finally:
            part.unlink(missing_ok=True)


def load(path: str | Path) -> Profile:
    """Read what `Profile.save` wrote.

    Raises:
        OSError: it cannot be read.
        ValueError: it is no profile of this schema.
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: a profile must be JSON, got {error}") from None
    found = content.get("schema") if isinstance(content, dict) else type(content).__name__
    if found != SCHEMA:
        raise ValueError(f"{path}: schema must be {SCHEMA!r}, got {found!r}")
    try:
        rows = tuple(_row(entry) for entry in content["rows"])
        return Profile(content["kind"], content["machine"], Ceilings(**content["ceilings"]), content["settings"], rows)
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path}: not a whole profile of schema {SCHEMA!r}: {error}") from None


def _row(entry: dict[str, Any]) -> Row:
    times = None if entry["times"] is None else Times(**entry["times"])
    stages = tuple(StageRow(**stage) for stage in entry["stages"])
    return Row(**{**entry, "times": times, "stages": stages, "uncounted": tuple(entry.get("uncounted", ()))})


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(entry) for key, entry in value.items()}
    return [_finite(entry) for entry in value] if isinstance(value, (list, tuple)) else value
