"""What passes between a form and a factored batch: its products with the keys, and the change that a batch makes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Stack:
    """[F; sqrt(noise) I] = [Q; Q_2] R with orthonormal columns, and what a root A makes of Q (`batch.stacked`).

    Attributes:
        Q: (r, u).
        R: (u, u) upper triangular, positive diagonal.
        Z: (m, u) = A Q.
    """

    Q: torch.Tensor
    R: torch.Tensor
    Z: torch.Tensor


@dataclass(frozen=True)
class Products:
    """Products of a form with the keys K of a batch, in the coordinates of the form.

    Attributes:
        Y: (m, u) = C K'.
        G: (u, u) = K Y, exactly symmetric.
        F: (r, u) = A'K' of a form that keeps a root A of C = A A', so that Y = A F and G = F'F; None of one
            that keeps C itself.
        times: A X (m, p) for float64 columns X (r, p); None unless there is such an A, and the products are float64.
        stack: what has been made of F by `times` already, where that sends something.
    """

    Y: torch.Tensor
    G: torch.Tensor
    F: torch.Tensor | None = None
    times: Callable[[torch.Tensor], torch.Tensor] | None = None
    stack: Stack | None = None


@dataclass(frozen=True)
class Change:
    """left right', which a commit subtracts from what a form keeps and a removal adds to it.

    Attributes:
        left: (m, w).
        right: (r, w) for a form that keeps a root of C; None for one that keeps C: the change is left left'.
    """

    left: torch.Tensor
    right: torch.Tensor | None = None

    @property
    def dtype(self) -> torch.dtype:
        return self.left.dtype
