"""What the pivots of a triangular factor tell: whether it can be solved with, and whether there is room for more."""

from __future__ import annotations

import math

import torch

from rlsedit_kernels.errors import UnderdeterminedError

_HEADROOM = 0.125
"""R may grow to this fraction of the largest number of its dtype."""

_SINGULAR = 8.0
"""A factor that started from zero counts as regular once no pivot is below this many r eps times the largest."""


class Pivoted:
    """A form with a triangular factor R (r, r) of which the diagonal is known; |R|^2 is `trace`."""

    trace: float
    _regular: bool

    @property
    def dtype(self) -> torch.dtype:
        """That of R."""
        raise NotImplementedError

    @property
    def rank(self) -> int:
        """r."""
        raise NotImplementedError

    @property
    def pivots(self) -> torch.Tensor:
        """The diagonal of R (r), >= 0."""
        raise NotImplementedError

    def smallest_pivot(self) -> float:
        """That of R; the host waits. Of a factor over ranks all of them ask together."""
        return float(self.pivots.min())

    @property
    def regular(self) -> bool:
        """Whether R can be solved with; false only for one that started from zero and has seen too little."""
        if not self._regular:
            self._regular = float(self.pivots.min()) > self._threshold()
        return self._regular

    @property
    def directions(self) -> int:
        """Pivots of R that are more than rounding."""
        return int((self.pivots > self._threshold()).sum())

    def _threshold(self) -> float:
        return _SINGULAR * self.rank * torch.finfo(self.dtype).eps * float(self.pivots.max())

    def require_regular(self) -> None:
        """UnderdeterminedError where there is no solution yet."""
        if not self.regular:
            raise UnderdeterminedError(
                f"the state started from nothing (lam = 0) and knows {self.directions} of {self.rank} directions: "
                "there is no gain and no weight before d independent keys have been committed"
            )

    def room_for(self, op: str, squared: float, forget: float) -> float:
        """|R|^2 once rows with this sum of squares are appended; ValueError where R could overflow on the way."""
        trace = forget * self.trace + squared
        if not math.sqrt(trace) < _HEADROOM * torch.finfo(self.dtype).max:
            raise ValueError(
                f"{op}: R would grow to {math.sqrt(trace):.1e}, too much for {self.dtype}: scale K or raise noise"
            )
        return trace
