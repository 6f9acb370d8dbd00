"""A batch between the two halves of an update: all that can fail has been computed, and nothing written."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from rlsedit_kernels.states import triangular
from rlsedit_kernels.states.batch import BatchFactor
from rlsedit_kernels.states.guard import Guarded, Moment
from rlsedit_kernels.states.keys import Keys
from rlsedit_kernels.states.triangular_form import TriangularForm


def require_current(prepared: object, state: Guarded) -> None:
    """Raises:
    TypeError: what is to be written is no prepared batch.
    ValueError: another state prepared it, or this one has changed since.
    """
    moment = getattr(prepared, "moment", None)
    if not isinstance(moment, Moment):
        raise TypeError(f"write: needs what prepare() gave, got {type(prepared).__name__}")
    if not state._is_at(moment):
        raise ValueError(
            "write: the state has changed since this batch was prepared, or another state prepared it; prepare it again"
        )


@dataclass(frozen=True)
class Prepared:
    """A batch of which all that can fail has been computed and nothing written.

    Attributes:
        gain: (d, u), as `CovarianceState.gain` gives it.
        size: |gain| in the Frobenius norm; infinite where that overflows.
        factored: the u x u system, from which residuals and costs follow.
        inner: largest squared norm of a key in the coordinates of the form.
        keys, noise, forget: the batch.
        moment: the state, and the changes it had seen, when it was prepared.
    """

    gain: torch.Tensor
    size: float
    factored: BatchFactor
    inner: float
    keys: Keys
    noise: float
    forget: float
    moment: Moment


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
        moment: the state, and the changes it had seen, when it was prepared.
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
    moment: Moment

    def after(self, innovation: torch.Tensor) -> torch.Tensor:
        """What E = V - K W adds to the objective, <E, E_after> / noise, and |E_after|, E_after = (I - K g) E.

        (2,) float64 on the device of the state.
        """
        if self.system is not None:
            return triangular.after(self.system, innovation, self.noise, self.forget)
        E = innovation.to(torch.float64)
        residual = E - (self.keys.rows.to(torch.float64) @ self.gain.to(torch.float64)) @ E
        return torch.stack([(E * residual).sum() / self.noise, residual.norm()])
