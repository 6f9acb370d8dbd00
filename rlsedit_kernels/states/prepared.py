"""A batch between the two halves of an update: all that can fail has been computed, and nothing written."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from rlsedit_kernels.states import triangular
from rlsedit_kernels.states.batch import BatchFactor
from rlsedit_kernels.states.keys import Keys
from rlsedit_kernels.states.triangular_form import TriangularForm


def require_current(prepared: int, writes: int) -> None:
    """ValueError where a state that now counts so many changes is not the one that a batch was prepared for."""
    if prepared != writes:
        raise ValueError("write: the state has changed since this batch was prepared; prepare it again")


@dataclass(frozen=True)
class Prepared:
    """A batch of which all that can fail has been computed and nothing written.

    Attributes:
        gain: (d, u), as `CovarianceState.gain` gives it.
        size: |gain| in the Frobenius norm; infinite where that overflows.
        factored: the u x u system, from which residuals and costs follow.
        inner: largest squared norm of a key in the coordinates of the form.
        keys, noise, forget: the batch.
        writes: the moment of the state at which it was prepared.
    """

    gain: torch.Tensor
    size: float
    factored: BatchFactor
    inner: float
    keys: Keys
    noise: float
    forget: float
    writes: int


@dataclass(frozen=True)
class PreparedRows:
    """A batch of which all that can fail has been computed and nothing written; see `Prepared`.

    Attributes:
        gain: (d, u), as `SquareRootState.gain` gives it.
        size: |gain| in the Frobenius norm; infinite where that overflows.
        rows: (u, r) what is appended to R.
        trace: |R|^2 with them.
        system: (u, u) Cholesky factor of forget noise I + K C K', float64; None for a state that this batch determines.
        form: the form that holds the batch already, for such a state only.
        keys, noise, forget: the batch.
        writes: the moment of the state at which it was prepared.
    """

    gain: torch.Tensor
    size: float
    rows: torch.Tensor
    trace: float
    system: torch.Tensor | None
    form: TriangularForm | None
    keys: Keys
    noise: float
    forget: float
    writes: int

    def after(self, innovation: torch.Tensor) -> torch.Tensor:
        """What E = V - K W adds to the objective, <E, E_after> / noise, and |E_after|, E_after = (I - K g) E.

        (2,) float64 on the device of the state.
        """
        if self.system is not None:
            return triangular.after(self.system, innovation, self.noise, self.forget)
        E = innovation.to(torch.float64)
        residual = E - (self.keys.rows.to(torch.float64) @ self.gain.to(torch.float64)) @ E
        return torch.stack([(E * residual).sum() / self.noise, residual.norm()])
