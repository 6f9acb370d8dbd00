"""Restrictions that a state remembers, so that a rebuild from batches does not lift them; what they leave of keys."""

from __future__ import annotations

from typing import Any

import torch

from rlsedit_kernels.priors import PriorFactor
from rlsedit_kernels.states import batch
from rlsedit_kernels.states.coordinates import unwhiten_transposed
from rlsedit_kernels.states.counters import Counters
from rlsedit_kernels.states.held import DEPENDENT, bare, free_rows, holding
from rlsedit_kernels.states.products import Products

_ZERO = 1e-12
_ROOT = 1e3


def joined(held: torch.Tensor | None, Q: torch.Tensor) -> torch.Tensor:
    """An orthonormal basis (d, q) of what was held so far and Q, float64."""
    if held is None:
        return Q.clone()
    U, sizes, _ = torch.linalg.svd(torch.cat([held, Q.to(held.device)], dim=1), full_matrices=False)
    return U[:, sizes > DEPENDENT].contiguous()


def require_directions(counters: Counters, Q: torch.Tensor | None) -> None:
    """ValueError where a rebuild would lift a restriction whose directions are not known."""
    if counters.restrictions and Q is None:
        raise ValueError(
            "refactor: it would lift a restriction whose directions were not saved with the state (by an earlier "
            "version): make another state, write the batches to it and restrict it"
        )


def applied(form: Any, factor: PriorFactor, counters: Counters, Q: torch.Tensor) -> Any:
    """The form restricted in the directions Q (d, q) float64, in place, which it holds now (`states/held.py`).

    What C loses is worked out in float64, with keys K C_0 K' = I for the directions: of those that are left out as
    rounding none is so by the prior alone. A root squares its rounding.

    Raises:
        BreakdownError: C is indefinite; nothing was written.
    """
    rows = free_rows(factor, Q)
    if not len(rows):
        return form  # the prior lets nothing change there
    products = form.products64(form.coordinates64(rows))
    eps = rounding(products, form.dtype)
    factored = batch.factor(products, 0.0, eps, scale(form, factor, counters, rows))
    if factored.rank:
        form.change64_(factored.change, -1.0)
    return holding(form, factor, Q)


def rounding(products: Products, dtype: torch.dtype) -> float:
    """What rounding C to a dtype, or a root of it, is to be taken for in float64 products."""
    eps = torch.finfo(dtype).eps
    return eps if products.F is None else max(_ROOT * eps * eps, torch.finfo(torch.float64).eps)


def restricted(C: torch.Tensor, Q: torch.Tensor) -> torch.Tensor:
    """C - C Q (Q'C Q)^-1 Q'C (d, d) float64 (docs/mathematics.md, fact 9), on the range of Q'C Q."""
    Y = C @ Q
    C = C - Y @ _inverse(Q.mT @ Y) @ Y.mT
    return (C + C.mT) * 0.5


def held_change(
    Y: torch.Tensor, Q: torch.Tensor, change: torch.Tensor, before: torch.Tensor
) -> tuple[torch.Tensor, float]:
    """The minimiser among the changes D of a weight with Q'D = Q'before, and by how much its objective is larger.

    Args:
        Y: (d, q) = C Q, C the covariance of the batches without the restriction, float64.
        Q: (d, q), float64.
        change: (d, v), the minimiser without it, float64.
        before: (d, v).
    """
    solved, more = held_step(Q.mT @ Y, Q.mT @ (before.to(torch.float64) - change))
    return change + Y @ solved, more


def held_step(G: torch.Tensor, missing: torch.Tensor) -> tuple[torch.Tensor, float]:
    """(Q'C Q)^-1 Q'(before - D) (q, v), and by how much the objective is larger for these columns; see `held_change`.

    Args:
        G: (q, q) = Q'C Q, float64.
        missing: (q, v) = Q'(before - D), float64.
    """
    solved = _inverse(G) @ missing
    return solved, float((missing * solved).sum())


def _inverse(G: torch.Tensor) -> torch.Tensor:
    return torch.linalg.pinv((G + G.mT) * 0.5, rtol=_ZERO, hermitian=True)


def scale(form: Any, factor: PriorFactor, counters: Counters, K: torch.Tensor) -> float:
    """max(K C_0 K') for keys (u, d), where C is singular by design; 0 elsewhere: rounding there is that of K C K'."""
    if not counters.singular_writes:
        return 0.0
    return float(prior_products(form, factor, K).amax())


def prior_products(form: Any, factor: PriorFactor, K: torch.Tensor) -> torch.Tensor:
    """k C_0 k' (u,) float64 of keys K (u, d), held or not."""
    whitened = bare(form).coordinates64(K).mT if form.maps else unwhiten_transposed(factor, K.to(torch.float64).mT)
    return whitened.square().sum(dim=0)
