"""Reference of RLSFilter: keeps all batches, solves the whole problem anew at every question."""

from __future__ import annotations

from typing import Any

import numpy as np

from rlsedit_kernels.reference.arrays import Array, float64
from rlsedit_kernels.reference.batch import batch_objective, batch_solution


class RLSFilter:
    """Weight (d, v) in row form as the batch solution of all that was written."""

    def __init__(self, weight: Any, prior: Any) -> None:
        self.prior = prior
        self.initial = float64(weight).copy()
        self.batches: list[tuple[Array, Array, float]] = []

    @property
    def weight(self) -> Array:
        """W (d, v)."""
        return batch_solution(self.prior, self.batches, self.initial)

    @property
    def objective(self) -> float:
        """J_t at its minimum."""
        return batch_objective(self.prior, self.batches, self.weight, self.initial)

    def update(self, K: Any, V: Any, noise: float = 1.0) -> None:
        """Append a batch."""
        self.batches.append((float64(K), float64(V), float(noise)))

    def remove(self, K: Any, V: Any, noise: float = 1.0) -> None:
        """Drop the batch with these keys and targets.

        Raises:
            ValueError: there is no such batch.
        """
        K, V = float64(K), float64(V)
        for index, (k, v, nu) in enumerate(self.batches):
            if nu == noise and np.array_equal(k, K) and np.array_equal(v, V):
                del self.batches[index]
                return
        raise ValueError("remove: no batch with these keys, targets and noise was written")
