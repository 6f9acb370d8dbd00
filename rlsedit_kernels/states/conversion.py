"""A state in another form: the same stream, exact to the rounding of the form that it goes to."""

from __future__ import annotations

import copy

import torch

from rlsedit_kernels.priors import PriorFactor
from rlsedit_kernels.states import held, report, triangular
from rlsedit_kernels.states.coordinates import unwhiten
from rlsedit_kernels.states.covariance import CovarianceState
from rlsedit_kernels.states.forms import FORMS
from rlsedit_kernels.states.square_root import SquareRootState
from rlsedit_kernels.states.state import State
from rlsedit_kernels.states.triangular_form import TriangularForm

_ROUNDING = 1e-13
"""`null` for a C~ that turns out singular all the same."""


def converted(state: State, form: str) -> State:
    """A new state with the stream of `state`, its covariance worked out in float64 and rounded once; no history.

    Args:
        state: any state; unchanged.
        form: "plain", "whitened", "inverse_root", "auto" (then the choice starts from the keys seen), "square_root".

    Raises:
        ValueError: no such form, or a triangular state from nothing: there is no covariance without a prior.
    """
    known = (*FORMS, TriangularForm.name)
    if form not in known:
        raise ValueError(f"convert: form must be one of {', '.join(map(repr, known))}, got {form!r}")
    if form == state.form:
        return state.clone()
    if form == TriangularForm.name:
        assert isinstance(state, CovarianceState)
        return _to_square_root(state)
    return _to_covariance(state, form)


def _to_covariance(state: State, form: str) -> CovarianceState:
    twin = CovarianceState(state.prior, form=form, dtype=state.dtype, device=state.device, guard=state._watch.guard)
    twin._counters, twin._restriction = copy.copy(state._counters), state._restriction
    undecided = isinstance(state, CovarianceState) and state._form is None
    if not undecided:
        twin.take_covariance(_covariance64(state), state._counters.largest_weighted)
        twin._form = held.carried(state._form, twin._form)
        twin._counters.moved(state._form, twin._form, twin._factor.largest)
    twin._probes = state._probes.to(state.device)
    return twin


def _covariance64(state: State) -> torch.Tensor:
    form = state._form
    assert form is not None
    return form.covariance64() if isinstance(form, TriangularForm) else form.covariance(torch.float64)


def _to_square_root(state: CovarianceState) -> SquareRootState:
    twin = SquareRootState(state.prior, dtype=state.dtype, device=state.device, guard=state._watch.guard)
    if state._form is not None:
        singular = state._counters.singular_writes > 0
        null = report.null_fraction(state._form) if singular else None
        R, basis = _factor_of_whitened(state._form.whitened64(state._factor), state._factor, null)
        twin._form = TriangularForm(R.to(state.dtype), None if basis is None else basis.to(state.dtype), regular=True)
    twin._counters, twin._restriction = copy.copy(state._counters), state._restriction
    twin._probes = state._probes.to(state.device)
    return twin


def _factor_of_whitened(
    C: torch.Tensor, factor: PriorFactor, null: float | None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """R and the basis of the space of edits for C = T C~ T', C~ (r, r) float64.

    `null` is the fraction of the largest eigenvalue below which one is zero, where C~ is singular by design (hard
    writes, restrictions).
    """
    C = (C + C.mT) * 0.5
    L, info = torch.linalg.cholesky_ex(C)
    if null is None and int(info) == 0 and factor.rank == factor.d:
        # S = (L^-1 T^-1)'(L^-1 T^-1)
        inverse = torch.eye(factor.d, dtype=C.dtype, device=C.device) / (factor.scale or 1.0)
        if factor.root_inverse is not None:
            inverse = factor.root_inverse.to(C.device)
        return triangular.factor_of(torch.linalg.solve_triangular(L, inverse, upper=False)), None
    if null is not None or int(info) != 0:
        values, vectors = torch.linalg.eigh(C)
        keep = values > (null or _ROUNDING) * float(values[-1])
        L = vectors[:, keep] * values[keep].sqrt()
    # C = (T L)(T L)' = Q inner inner' Q' with an orthonormal basis Q; S has the factor of inner^-1 there.
    basis, inner = torch.linalg.qr(unwhiten(factor, L))
    identity = torch.eye(inner.shape[0], dtype=C.dtype, device=C.device)
    return triangular.factor_of(torch.linalg.solve_triangular(inner, identity, upper=True)), basis
