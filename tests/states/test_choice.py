"""form="auto": what is taken, where a state goes that drifts, and what it says of both."""

from __future__ import annotations

from itertools import islice

import pytest
import torch

import rlsedit_kernels as rk
from rlsedit_kernels.diagnostics import make_stream
from rlsedit_kernels.states import choice

D = 32
NARROW, WIDE = torch.float32, torch.float64


def anchor(size: float = 1.0) -> rk.Prior:
    return rk.Prior.precision(torch.diag(torch.linspace(1.0, 2.0, D, dtype=WIDE)) / size)


def kept(prior: rk.Prior, form: str, dtype: torch.dtype = NARROW, batches: int = 0) -> rk.CovarianceState:
    state = rk.CovarianceState(prior, form=form, dtype=dtype, guard="off")
    for batch in islice(make_stream("easy", D, 16).batches(), batches):
        state.commit(batch.K)
    return state


@pytest.mark.parametrize(
    ("prior", "form", "dtype", "batches", "expected"),
    [
        (anchor(), "plain", NARROW, 0, ("inverse_root", NARROW)),
        (anchor(), "whitened", NARROW, 0, ("inverse_root", NARROW)),
        (anchor(), "inverse_root", NARROW, 0, ("inverse_root", WIDE)),
        (anchor(1e9), "plain", NARROW, 0, ("plain", WIDE)),
        (anchor(1e9), "whitened", NARROW, 0, ("whitened", WIDE)),
        (rk.Prior.ridge(D, 1.0), "whitened", NARROW, 1, ("whitened", WIDE)),
        (rk.Prior.ridge(D, 1.0), "whitened", NARROW, 4, ("inverse_root", NARROW)),
        (anchor(), "plain", WIDE, 0, ("inverse_root", WIDE)),
        (anchor(), "whitened", WIDE, 0, None),
        (anchor(), "inverse_root", WIDE, 0, None),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_where_a_state_goes_that_drifts(prior, form, dtype, batches, expected) -> None:
    """To a root where rho allows one, else to float64; columns of a ridge stay columns, a matrix of it does not."""
    state = kept(prior, form, dtype, batches)
    found = choice.next_safer(prior.factor, NARROW, 1.0, state._form, "it drifts")
    assert (None if found is None else (found.form, found.storage)) == expected
    assert found is None or found.reason == "it drifts"


def test_a_ridge_that_drifts_keeps_its_columns() -> None:
    state = rk.CovarianceState(rk.Prior.ridge(D, 10.0))
    batches = [batch.K for batch in islice(make_stream("easy", D, 4).batches(), 3)]
    for K in batches[:2]:
        state.commit(K)
    chunk = state._form.chunks[0]
    chunk.filled.mul_(1.0 + 1e-3)
    state.commit(batches[2])
    health = state.health()
    assert (health.form, health.storage, health.repairs) == ("whitened", "torch.float64", 1)
    assert not state._form.dense


@pytest.mark.parametrize(("rank", "form"), [(4, "whitened"), (D, "plain")])
def test_a_null_space_is_whitened_where_that_is_cheaper(rank, form) -> None:
    basis = torch.linalg.qr(torch.randn(D, rank, generator=torch.Generator().manual_seed(0), dtype=WIDE))[0]
    prior = rk.Prior.null_space(basis @ basis.mT, 10.0)
    found = choice.choose(prior.factor, NARROW, 1.0)
    assert found.form == form
    assert (f"the prior has rank {rank} of {D}: cheaper" in found.reason) == (rank < D)
