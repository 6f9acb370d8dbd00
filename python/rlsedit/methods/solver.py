"""What the state of one layer is to an editor, and the one on `rlsedit_kernels.CovarianceState` that recipes share."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from typing import Literal, Protocol, runtime_checkable

import torch
from torch import Tensor

import rlsedit_kernels as rk

from ..config import EditConfig

Commit = Literal["batch", "never", "hard"]
"""When keys enter the state: with every batch, never, or as a hard preservation (noise 0) after the gain."""


@dataclass(frozen=True)
class Proposal:
    """Change of one weight for one batch: `update` (d, v) in row form; `gain` (d, u) where update = gain @ E."""

    update: Tensor
    gain: Tensor | None


class Solver(Protocol):
    """State of one layer. It is never changed: a proposal comes with the state that follows it."""

    def propose(self, keys: Tensor, residual: Tensor, bare: Tensor | None = None) -> tuple[Proposal, Solver]:
        """Change of the weight, and the state after the batch.

        Args:
            keys: (u, d).
            residual: E (u, v), what the weight's output shall change by.
            bare: (u, d), keys of the prompts without a prefix; only ROME reads them.
        """

    def health(self) -> dict[str, object]:
        """What the state reports of itself."""


@dataclass(frozen=True)
class Start:
    """What the state of one layer is made from.

    Attributes:
        moment: second moment E[k k'] (d, d) float64.
        config: hyper-parameters.
        dtype, device: of the state.
    """

    moment: Tensor
    config: EditConfig
    dtype: torch.dtype
    device: torch.device | str = "cpu"


@runtime_checkable
class Removable(Protocol):
    """A solver out of whose state rows can be taken."""

    def removed(self, keys: Tensor) -> tuple[Tensor, Solver]:
        """Gain F A^-1 (d, u) of a removal (docs/mathematics.md, fact 5), and the state without the rows.

        Args:
            keys: (u, d), written with the noise of the method.

        Raises:
            LeverageError: the state knows these directions by these rows alone; `rebuilt` serves.
        """

    def rebuilt(self, rows: Callable[[], Iterable[tuple[Tensor, Tensor, float]]]) -> tuple[Tensor, Solver]:
        """W - W_0 (d, v) float64 that minimises the objective over `rows` (0 for none), and the state that holds them.

        Args:
            rows: gives keys (u, d), targets less K W_0 (u, v), and noise, of all batches that stay; called more than
                once.
        """


@dataclass(frozen=True)
class RecursionSolver:
    """One layer's covariance state.

    Args:
        state: covariance, not changed by `propose`.
        noise: of a batch, from the number of its keys.
        commit: when a batch enters the state; if never, every batch is solved against the prior alone.
    """

    state: rk.CovarianceState
    noise: Callable[[int], float]
    commit: Commit

    def propose(self, keys: Tensor, residual: Tensor, bare: Tensor | None = None) -> tuple[Proposal, RecursionSolver]:
        """gain = C K' (noise I + K C K')^-1, update = gain E; the commit is made on a copy of the state."""
        gain, following = self.solved(keys)
        return Proposal(gain @ residual, gain), following

    def solved(self, keys: Tensor) -> tuple[Tensor, RecursionSolver]:
        """The gain (d, u) of a batch, and the state behind it."""
        noise = self.noise(len(keys))
        if self.commit == "never":
            gain, following = gain_alone(self.state, keys, noise)
            return gain, replace(self, state=following)
        following = self.state.clone()
        if self.commit == "hard":
            gain = following.gain(keys, noise=noise)
            following.commit(keys, noise=0.0)
        else:
            gain = following.update(keys, noise=noise)
        return gain, replace(self, state=following)

    def removed(self, keys: Tensor) -> tuple[Tensor, RecursionSolver]:
        """A downdate of a copy of the state."""
        following = self.state.clone()
        gain = following.remove(keys, self.noise(len(keys)))
        return gain, replace(self, state=following)

    def rebuilt(self, rows: Callable[[], Iterable[tuple[Tensor, Tensor, float]]]) -> tuple[Tensor, RecursionSolver]:
        """A state made anew, and W - W_0 = C sum K'V / noise with C in float64."""
        following = self.refactored((keys, noise) for keys, _, noise in rows())
        exact = rk.CovarianceState(self.state.prior, form="plain", dtype=torch.float64, device=self.state.device)
        exact.refactor((keys.double(), noise) for keys, _, noise in rows())
        covariance = exact.covariance()
        shift = torch.zeros((), dtype=torch.float64, device=self.state.device)  # as it stays where no rows do
        for keys, target, noise in rows():
            shift = shift + (covariance @ keys.double().T) @ (target.double() / noise)
        return shift, following

    def refactored(self, written: Iterable[tuple[Tensor, float]]) -> RecursionSolver:
        """The state that holds batches (K, noise) and no others."""
        following = self.state.clone()
        following.refactor(written)
        return replace(self, state=following)

    def health(self) -> dict[str, object]:
        """The state's own report."""
        return asdict(self.state.health())


def gain_alone(state: rk.CovarianceState, keys: Tensor, noise: float) -> tuple[Tensor, rk.CovarianceState]:
    """The gain (d, u) of a batch that is not committed, and the state: its form may have moved, nothing is written."""
    following = copy.copy(state)
    return following.gain(keys, noise=noise), following


def appended(rows: Tensor | None, keys: Tensor, noise: float) -> Tensor:
    """Rows A (n, d) with A'A = sum of K'K / noise, one batch more; float64, at most 3 d rows are kept.

    Above that they are replaced by the triangular factor of a QR decomposition, whose A'A is the same.
    """
    new = keys.double() / noise**0.5
    stacked = new if rows is None else torch.cat([rows, new])
    return stacked if len(stacked) <= 3 * stacked.shape[1] else torch.linalg.qr(stacked, mode="r")[1]
