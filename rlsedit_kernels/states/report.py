"""Dense float64 views of a state: its precision matrix and its health."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from rlsedit_kernels.priors import PriorFactor
from rlsedit_kernels.states import choice
from rlsedit_kernels.states.coordinates import unwhiten, unwhiten_transposed, whitened64
from rlsedit_kernels.states.counters import Counters
from rlsedit_kernels.states.forgetting import size
from rlsedit_kernels.states.forms import Form
from rlsedit_kernels.states.health import DRIFT_BROKEN, DRIFT_WARNING, ERROR_WARNING, RHO_WARNING, Health, Probes
from rlsedit_kernels.states.moving import Moving
from rlsedit_kernels.states.state import State
from rlsedit_kernels.states.triangular_form import TriangularForm

_RANGE = 1e3
_TINY = torch.finfo(torch.float64).tiny

EXCESS = 1e-3
_ROUNDINGS = 64.0
"""An eigenvalue of C~ above 1 by `EXCESS` and as many roundings is worth a warning."""

CONDITION_LOSS = 1e-3
"""(unit roundoff of W) sqrt(condition of the prior) from which on `health()` warns: a condition of 2.8e8 in float32."""


def null_fraction(form: Form | TriangularForm) -> float:
    """Fraction of the largest eigenvalue of C~ below which an eigenvalue is what rounding left of a null space.

    A fraction eps of a covariance, eps^2 of one that is a root squared, with a margin.
    """
    fraction = torch.finfo(form.dtype).eps ** (1 if form.name in ("plain", "whitened") else 2)
    return float(_RANGE * max(fraction, torch.finfo(torch.float64).eps))


def precision(form: Form, factor: PriorFactor, *, singular: bool) -> torch.Tensor:
    """S = T^-T C~^-1 T^-1 (d, d) float64; by the pseudo-inverse of C~ where it is singular by design."""
    matrix = form.whitened64(factor)
    matrix = (matrix + matrix.mT) * 0.5
    L, info = torch.linalg.cholesky_ex(matrix)
    if int(info) == 0 and not singular:
        inverse = torch.cholesky_inverse(L)
    else:
        inverse = torch.linalg.pinv(matrix, rtol=null_fraction(form), hermitian=True)
    if factor.root_inverse is None:
        assert factor.scale is not None
        S = inverse / factor.scale**2
    else:
        map_ = factor.root_inverse.to(inverse.device)
        S = map_.mT @ inverse @ map_
    return (S + S.mT) * 0.5


def inverse_on_range(S: torch.Tensor, factor: PriorFactor) -> torch.Tensor:
    """C = T (T' S T)^-1 T' (d, d) float64 of an information matrix S."""
    if factor.root is None:
        return torch.cholesky_inverse(torch.linalg.cholesky(S))
    root = factor.root.to(S.device)
    inner = root.mT @ S @ root
    solved = torch.cholesky_inverse(torch.linalg.cholesky((inner + inner.mT) * 0.5))
    C = unwhiten(factor, unwhiten(factor, solved).mT)
    return (C + C.mT) * 0.5


@dataclass
class _Findings:
    """A status that only grows worse, and the sentences behind it."""

    status: str
    messages: list[str]

    def warn(self, message: str) -> None:
        self.status = "warning" if self.status == "ok" else self.status
        self.messages.append(message)

    def broken(self, message: str) -> None:
        self.status = "broken"
        self.messages.append(message)


def health(state: Moving, *, thorough: bool = False) -> Health:
    """See `CovarianceState.health`."""
    factor, counters, form = state._factor, state._counters, state._form
    storage = state.dtype if form is None else form.dtype
    level = choice.rho(factor, storage, counters.largest_key)  # without noise: how it falls matters, and drift tells
    found = _prior(factor, state.dtype)
    inner = level if form is None or not form.maps else 0.5 * torch.finfo(storage).eps * counters.largest_inner
    if form is not None and inner > RHO_WARNING[form.name]:
        cures = [] if form.name == "inverse_root" else ["form='inverse_root'"]
        cures += ["a stronger prior, or smaller keys"] if storage == torch.float64 else ["float64"]
        cure = " or ".join(cures)
        found.warn(f"rho {inner:.1e} is high for the {form.name} form in {storage}: use {cure}")
    drift = state._probes.drift(form, factor)
    kind = "plain" if form is None else form.name
    worst = _drifted(found, drift, max(counters.worst_drift, state._watch.worst), kind, storage == torch.float64)
    if state._watch.fault is not None and found.status != "broken":
        found.broken(state._watch.fault)
    _count(found, counters)
    weighted_level = choice.rho(factor, storage, counters.largest_weighted)
    if counters.unheld and kind in ("plain", "whitened") and weighted_level > choice.PLAIN_LIMIT:
        found.warn(
            f"{counters.unheld} hard writes, beyond 1/8 of the space, are kept by C alone, which keys at rho "
            f"{weighted_level:.1e} move: use form='inverse_root', restrict(Q), or write them after such keys"
        )
    if form is not None and not (reach := size(form, factor)) < torch.finfo(state.dtype).max:
        found.broken(f"C has grown to {reach:.1e}, which {state.dtype} cannot hold: refactor(batches)")
    bounded = not counters.forgot
    measured = _thorough(found, form, state._probes, factor, bounded, counters.singular_writes > 0) if thorough else {}
    return Health(
        status=found.status,
        form=state.form,
        reason=state._reason,
        dtype=str(state.dtype),
        storage=str(storage),
        steps=counters.steps,
        rank=factor.rank,
        columns=0 if form is None else form.columns,
        dense=form is not None and form.dense,
        prior=factor.method,
        condition=factor.condition,
        lifted=factor.lifted,
        rho=weighted_level,
        smallest_pivot=counters.smallest_pivot,
        largest_leverage=counters.largest_leverage,
        careful_steps=counters.careful_steps,
        drift=drift,
        messages=tuple(found.messages),
        worst_drift=worst,
        repairs=counters.repairs,
        **measured,
    )


def factor_health(state: State, *, thorough: bool = False) -> Health:
    """See `SquareRootState.health`."""
    factor, counters, form = state._factor, state._counters, state._form
    nothing = state.prior.is_nothing
    found = _prior(factor, state.dtype)
    _count(found, counters)
    drift, measured, worst = 0.0, {}, max(counters.worst_drift, state._watch.worst)
    if form.regular:
        drift = state._probes.drift(form, factor)
        worst = _drifted(found, drift, worst, form.name, form.dtype == torch.float64)
        if state._watch.fault is not None and found.status != "broken":
            found.broken(state._watch.fault)
        pivot = form.smallest_pivot()
        if not pivot > torch.finfo(form.dtype).max ** -0.5:
            found.broken(f"R has a pivot of {pivot:.1e}: C is more than {form.dtype} can hold: refactor(batches)")
        bounded = not counters.forgot and not nothing
        singular = counters.singular_writes > 0
        measured = _thorough(found, form, state._probes, factor, bounded, singular) if thorough else {}
    else:
        found.warn(
            f"{form.directions} of {form.rank} directions are known: no gain and no weight before all of them are"
        )
    return Health(
        status=found.status,
        form=form.name,
        reason="asked for",
        dtype=str(state.dtype),
        storage=str(form.dtype),
        steps=counters.steps,
        rank=form.rank,
        columns=form.rank,
        dense=True,
        prior="none" if nothing else factor.method,
        condition=math.inf if nothing else factor.condition,
        lifted=factor.lifted,
        rho=math.inf if nothing else choice.rho(factor, form.dtype, counters.largest_weighted),
        smallest_pivot=None,
        largest_leverage=counters.largest_leverage,
        careful_steps=0,
        drift=drift,
        messages=tuple(found.messages),
        worst_drift=worst,
        repairs=counters.repairs,
        **measured,
    )


def _prior(factor: PriorFactor, dtype: torch.dtype) -> _Findings:
    """What the prior alone says of a weight of this dtype: rounding it costs (unit roundoff) sqrt(condition)."""
    found = _Findings("warning" if factor.lifted else "ok", list(factor.notes))
    floor = 0.5 * torch.finfo(dtype).eps * math.sqrt(factor.condition)
    if floor > CONDITION_LOSS:
        found.warn(
            f"a weight of {dtype} may be off by {floor:.1e} for the condition of the prior alone: keep it in float64"
        )
    return found


def _count(found: _Findings, counters: Counters) -> None:
    """A state of an earlier version may have gone below zero."""
    if counters.steps < 0:
        found.broken(f"{-counters.steps} batches more were taken back than written: refactor(batches)")


def _drifted(found: _Findings, drift: float, worst: float, form: str, wide: bool) -> float:
    """What the drift says, now and at earlier checks; the largest that was worth a warning."""
    cure = "refactor(batches)" + ("" if wide else ", or use float64")
    if drift > DRIFT_WARNING[form]:
        worst = max(worst, drift)
        found.warn(f"probes of C S have drifted by {drift:.1e}: {cure}")
    elif worst > 0.0:
        found.warn(f"probes of C S had drifted by {worst:.1e} in between, and W with them: {cure}")
    if not drift < DRIFT_BROKEN[form]:
        found.broken("do not write weights from this state")
    return worst


def _thorough(
    found: _Findings,
    form: Form | TriangularForm | None,
    probes: Probes,
    factor: PriorFactor,
    bounded: bool,
    singular: bool,
) -> dict[str, float]:
    """Spectrum, asymmetry and S-norm error of the probes, from C~ in float64.

    `bounded`: C is at most C_0; `singular`: hard writes or restrictions have left it a null space, of which rounding
    makes eigenvalues of either sign.
    """
    matrix = _whitened(form, factor, probes.z.device).to(torch.float64)
    symmetric = (matrix + matrix.mT) * 0.5
    values, vectors = torch.linalg.eigh(symmetric)
    if singular and form is not None:
        kept = values.abs() > null_fraction(form) * values[-1]
        values, vectors = values[kept], vectors[:, kept]
    low, high = (float(values[0]), float(values[-1])) if len(values) else (0.0, 0.0)
    if bounded and high > 1.0 + _excess(form, factor):
        found.warn(
            f"C has the eigenvalue {high:.6g} in whitened coordinates, and more than 1 is not possible without "
            "forgetting: a batch was taken back that was not written so, or C has drifted: refactor(batches)"
        )
    x, image = probes.whitened(factor), unwhiten_transposed(factor, probes.image)
    error = math.inf
    if low > 0.0 or not len(values):
        residual = (vectors.mT @ (symmetric @ image - x)) / values.sqrt()[:, None]
        error = float((residual.norm(dim=0) / (x * image).sum(dim=0).clamp_min(_TINY).sqrt()).max())
    else:
        found.broken(f"C has the eigenvalue {low:.1e} beside {high:.1e}: it is not positive definite")
    if math.isfinite(error) and error > ERROR_WARNING:
        found.warn(f"the probes are off by {error:.1e} in the S-norm: refactor(batches), or use float64")
    return {
        "smallest_eigenvalue": low,
        "largest_eigenvalue": high,
        "asymmetry": float((matrix - matrix.mT).norm() / matrix.norm()),
        "error": error,
    }


def _excess(form: Form | TriangularForm | None, factor: PriorFactor) -> float:
    """By how much rounding alone may bring an eigenvalue of C~ above 1; infinite where there is no prior."""
    if form is None:
        return EXCESS
    condition = 1.0 if form.maps else factor.condition if form.name == "plain" else math.sqrt(factor.condition)
    return EXCESS + _ROUNDINGS * torch.finfo(form.dtype).eps * condition


def _whitened(form: Form | TriangularForm | None, factor: PriorFactor, device: torch.device) -> torch.Tensor:
    if form is None:
        return torch.eye(factor.rank, dtype=torch.float64, device=device)
    return whitened64(form.covariance64(), factor) if isinstance(form, TriangularForm) else form.whitened64(factor)
