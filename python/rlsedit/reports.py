"""What an edit tells about itself."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Progress:
    """One event for a progress bar: in `stage` of batch `batch` (from 0) of `batches`, `done` of `total` are done."""

    stage: str
    batch: int
    batches: int
    done: int
    total: int


@dataclass(frozen=True)
class BatchReport:
    """One batch; sums and norms run over all edited layers.

    Attributes:
        ids: facts of the batch.
        seconds: wall time by stage: "targets", "keys", "solve", "report".
        fit: sum_s |K_s W - V_s|^2 / noise after this batch (of this batch alone for a method that commits nothing).
        parameter_deviation: |W - W_0|^2 (the objective has lam^2 times it).
        anchor_deviation: |K_0 (W - W_0)|^2 with K_0'K_0 = mom2_weight E[k k'] (mu^2 times it in the objective).
        parameter_bound: bound of |W - W_0| (not squared), None where the objective has no such term.
        anchor_bound: bound of |K_0 (W - W_0)|, or None.
        target_loss: mean of the last loss of z*.
        steps: mean number of loss evaluations of z*.
    """

    ids: tuple[str, ...]
    seconds: dict[str, float]
    fit: float
    parameter_deviation: float
    anchor_deviation: float
    parameter_bound: float | None
    anchor_bound: float | None
    target_loss: float
    steps: float


@dataclass(frozen=True)
class Conflict:
    """A fact that is asked for, and an edit about the same subject with the same prompt or the same (named) relation.

    Attributes:
        new: id of the fact that is asked for.
        old: id of the edit that the model holds, or of an earlier fact of the same request.
        subject: of the fact that is asked for.
    """

    new: str
    old: str
    subject: str


@dataclass
class EditReport:
    """All batches of one call of `Editor.edit`, and the conflicts that were found before the first of them."""

    method: str
    batches: list[BatchReport] = field(default_factory=list)
    conflicts: list[Conflict] = field(default_factory=list)

    @property
    def facts(self) -> int:
        """Facts written."""
        return sum(len(batch.ids) for batch in self.batches)

    @property
    def seconds(self) -> dict[str, float]:
        """Wall time by stage, all batches."""
        total: dict[str, float] = {}
        for batch in self.batches:
            for stage, value in batch.seconds.items():
                total[stage] = total.get(stage, 0.0) + value
        return total
