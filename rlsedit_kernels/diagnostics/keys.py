"""Random keys of a given covariance at O(d u) a batch: an orthogonal mixing by a few reflections."""

from __future__ import annotations

import torch

REFLECTIONS = 4


class Mixing:
    """Q, a product of random Householder reflections; x -> x Q costs O(d) a row, and Q is orthogonal to rounding.

    Args:
        d: dimension.
        generator: source of the random directions.
    """

    def __init__(self, d: int, generator: torch.Generator) -> None:
        directions = torch.randn(REFLECTIONS, d, dtype=torch.float64, device="cpu", generator=generator)
        self._directions = directions / directions.norm(dim=1, keepdim=True)

    def rows(self, X: torch.Tensor) -> torch.Tensor:
        """X Q for rows X (n, d) float64."""
        for w in self._directions:
            X = X - torch.outer(2.0 * (X @ w), w)
        return X

    def rows_transposed(self, X: torch.Tensor) -> torch.Tensor:
        """X Q' for rows X (n, d) float64."""
        for w in self._directions.flip(0):
            X = X - torch.outer(2.0 * (X @ w), w)
        return X

    def matrix(self, values: torch.Tensor) -> torch.Tensor:
        """Q' diag(values) Q (d, d), exactly symmetric."""
        Q = self.rows(torch.eye(values.numel(), dtype=torch.float64, device="cpu"))
        product = Q.mT @ (values[:, None] * Q)
        return (product + product.mT) * 0.5


def falling(d: int, decades: float) -> torch.Tensor:
    """Standard deviations from 1 down to 10^-decades, geometric."""
    return torch.logspace(0.0, -decades, d, dtype=torch.float64, device="cpu")


def of_length(K: torch.Tensor, squared: float) -> torch.Tensor:
    """Rows scaled to |k|^2 = `squared`."""
    return K * (squared**0.5 / K.norm(dim=1, keepdim=True))
