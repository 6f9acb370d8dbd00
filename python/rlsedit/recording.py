"""Records what the solvers of a run are given, as streams that `rlsedit stability --stream FILE` follows again."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

import rlsedit_kernels as rk
from rlsedit_kernels.diagnostics.streams import Batch

from .methods import Method
from .methods.solver import Proposal, RecursionSolver, Start
from .recorded import save_streams

WIDTH = 16
"""Columns to which targets are reduced by random signs: least squares has one problem a column, so that nothing about
numerics is lost, and the file stays small."""

Note = Callable[[int, Tensor, Tensor, float, Tensor], None]


@dataclass
class _Log:
    """One layer: its prior, the batches so far, and W - W_0 (d, width) before and after the last of them."""

    prior: rk.Prior
    signs: Tensor | None
    batches: list[Batch]
    before: Tensor | None = None
    after: Tensor | None = None

    def put(self, count: int, keys: Tensor, residual: Tensor, noise: float, update: Tensor) -> None:
        """Batch number `count`, in the place of one with that number that an editor has undone."""
        if count < len(self.batches):
            del self.batches[count:]
            self.after = self.before
        K, E, change = keys.detach().to("cpu").float(), self._reduced(residual), self._reduced(update)
        shift = torch.zeros_like(change) if self.after is None or count == 0 else self.after
        targets = (K.double() @ shift + E).float()
        self.batches.append(Batch(K, targets, noise))
        self.before, self.after = shift, shift + change

    def _reduced(self, part: Tensor) -> Tensor:
        wide = part.detach().to("cpu", torch.float64)
        return wide if self.signs is None else wide @ self.signs


class Recorder:
    """Keeps the streams of all edited layers of one run.

    Args:
        width: columns of the targets that are kept; None keeps all of them.
        seed: of the random signs.
    """

    def __init__(self, width: int | None = WIDTH, seed: int = 0) -> None:
        if width is not None and width < 1:
            raise ValueError(f"Recorder: width must be >= 1 or None, got {width}")
        self.width = width
        self.seed = seed
        self._logs: list[_Log] = []
        self._layers: tuple[int, ...] = ()

    def begin(self, layers: tuple[int, ...], prior: rk.Prior) -> _Log:
        """A log for the next of the edited layers, in ascending order; after the last one a run starts anew."""
        if len(self._logs) == len(layers):
            self._logs = []
        self._layers = layers
        self._logs.append(_Log(prior, None, []))
        return self._logs[-1]

    def signs(self, outputs: int) -> Tensor | None:
        """(v, width) of +-1 / sqrt(width), or None where all columns are kept."""
        if self.width is None or self.width >= outputs:
            return None
        generator = torch.Generator().manual_seed(self.seed)
        bits = torch.randint(2, (outputs, self.width), generator=generator, dtype=torch.int64, device="cpu")
        return (2 * bits - 1).double() / self.width**0.5

    def save(self, path: Path, note: str = "") -> None:
        """Write all layers (`rlsedit.recorded`).

        Raises:
            ValueError: nothing was written yet.
        """
        kept = {layer: (log.prior, log.batches) for layer, log in zip(self._layers, self._logs, strict=False)}
        save_streams(path, kept, note)


@dataclass(frozen=True)
class RecordingSolver(RecursionSolver):
    """A `RecursionSolver` that notes what it is given.

    Attributes:
        note: is told number, keys, residual, noise and update of a batch. A function, so that a snapshot of the
            editor leaves it out.
        count: batches before the next one.
    """

    note: Note
    count: int = 0

    def propose(self, keys: Tensor, residual: Tensor, bare: Tensor | None = None) -> tuple[Proposal, RecursionSolver]:
        """As `RecursionSolver.propose`."""
        proposal, following = super().propose(keys, residual, bare)
        self.note(self.count, keys, residual, self.noise(len(keys)), proposal.update)
        return proposal, replace(following, count=self.count + 1)  # type: ignore[call-arg]


def recording(method: Method, recorder: Recorder) -> Method:
    """`method` with solvers that note keys, residuals and noise in `recorder`; nothing else about it changes.

    A target is K (W - W_0) + E of the moment it was given, so that the batch solution of the recorded stream is what
    the recursion stands for (docs/mathematics.md, fact 2).

    Args:
        method: one that is a single recursion with its batches committed, such as "rlsedit", "memit_seq", "encore",
            "alphaedit".
        recorder: of one run.

    Raises:
        ValueError: the method keeps no such recursion.
    """
    if method.solver is not None or method.prior is None or method.commit != "batch":
        raise ValueError(
            f"--record: {method.name!r} must be one recursion that keeps its batches (rlsedit, memit_seq, encore, "
            "alphaedit, ...): there is no stream to follow in it"
        )

    def make(start: Start) -> RecordingSolver:
        plain = method.recursion(start)
        log = recorder.begin(start.config.layers, plain.state.prior)

        def note(count: int, keys: Tensor, residual: Tensor, noise: float, update: Tensor) -> None:
            if log.signs is None:
                log.signs = recorder.signs(residual.shape[1])
            log.put(count, keys, residual, noise, update)

        return RecordingSolver(plain.state, plain.noise, plain.commit, note)

    return replace(method, solver=make, removable=None if method.lasting else method.removal, entangled=method.lasting)
