"""Saving a state and loading it again, to the bit, with everything checked before anything is changed."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import torch

from rlsedit_kernels.states.counters import Counters
from rlsedit_kernels.states.health import Probes

if TYPE_CHECKING:
    from rlsedit_kernels.states.covariance import CovarianceState
    from rlsedit_kernels.states.square_root import SquareRootState

VERSION = 1
_SAME_PRIOR = 1e-9


def state_dict(state: CovarianceState) -> dict[str, object]:
    """Tensors (copies) and plain values."""
    form = state._form
    return {
        "version": VERSION,
        "prior": state.prior.signature(),
        "dtype": str(state.dtype),
        "requested": state._requested,
        "reason": state._reason,
        "form": None if form is None else form.name,
        "storage": None if form is None else str(form.dtype),
        "tensors": {} if form is None else form.saved(),
        "counters": asdict(state._counters),
        "restriction": None if state._restriction is None else state._restriction.clone(),
        "probes": state._saved_probes(),
    }


def factor_state_dict(state: SquareRootState) -> dict[str, object]:
    """Tensors (copies) and plain values."""
    return {
        "version": VERSION,
        "prior": state.prior.signature(),
        "dtype": str(state.dtype),
        "form": state.form,
        "tensors": state._form.saved(),
        "counters": asdict(state._counters),
        "restriction": None if state._restriction is None else state._restriction.clone(),
        "probes": state._probes.saved(),
    }


def load_factor_state_dict(state: SquareRootState, saved: Mapping[str, Any]) -> None:
    """Restore into `state`; see `SquareRootState.load_state_dict`."""
    from rlsedit_kernels.states.triangular_form import TriangularForm

    _check_header(state, saved, {"version", "prior", "dtype", "form", "tensors", "counters", "probes"})
    if saved["form"] != state.form:
        raise ValueError(f"load_state_dict: form must be {state.form!r}, got {saved['form']!r}")
    form = TriangularForm.restore(saved["tensors"], state.d, state.dtype, state.device)
    probes = restored_probes(state, saved["probes"])
    counters, restriction = Counters(**saved["counters"]), restored_restriction(state, saved)
    state._form, state._counters, state._probes = form, counters, probes
    state._restriction = restriction
    state._watch.resume(counters)
    state._writes += 1


def load_state_dict(state: CovarianceState, saved: Mapping[str, Any]) -> None:
    """Restore into `state`; see `CovarianceState.load_state_dict`."""
    from rlsedit_kernels.states import held
    from rlsedit_kernels.states.covariance import _FORM_CLASSES, FORMS

    _check_header(
        state,
        saved,
        {"version", "prior", "dtype", "requested", "reason", "form", "storage", "tensors", "counters", "probes"},
    )
    name = saved["form"]
    if saved["requested"] not in FORMS or (name is not None and name not in _FORM_CLASSES):
        raise ValueError(f"load_state_dict: unknown form {name!r} (asked for: {saved['requested']!r})")
    form, restriction = None, restored_restriction(state, saved)
    if name is not None:
        storage = {str(dtype): dtype for dtype in (torch.float32, torch.float64)}.get(saved["storage"])
        if storage is None:
            raise ValueError(
                f"load_state_dict: storage must be torch.float32 or torch.float64, got {saved['storage']!r}"
            )
        form = state._restored(name, saved["tensors"], storage)
        form = held.restored(form, state._factor, saved["tensors"], restriction, state.device)
    probes, counters = state._restored_probes(saved["probes"]), Counters(**saved["counters"])
    state._form, state._counters, state._probes, state._stale = form, counters, probes, None
    state._restriction = restriction
    state._watch.resume(counters)
    state._writes += 1
    state._requested, state._reason = saved["requested"], saved["reason"]


def _check_header(state: CovarianceState | SquareRootState, saved: Mapping[str, Any], names: set[str]) -> None:
    """Everything is there, and version, dtype and prior are those of the state."""
    missing = sorted(names - set(saved))
    if missing:
        raise ValueError(f"load_state_dict: the saved state lacks {', '.join(missing)}")
    if saved["version"] != VERSION:
        raise ValueError(f"load_state_dict: version must be {VERSION}, got {saved['version']!r}")
    if saved["dtype"] != str(state.dtype):
        raise ValueError(f"load_state_dict: the saved state is {saved['dtype']}, this state is {state.dtype}")
    if not _same_prior(saved["prior"], state.prior.signature()):
        raise ValueError(f"load_state_dict: the saved state was made with another prior: {saved['prior']}")


def restored_probes(state: CovarianceState | SquareRootState, saved: Mapping[str, Any]) -> Probes:
    shape = (state.d, state._probes.z.shape[1])
    z, image = (saved_tensor(saved, key, shape, torch.float64, state.device) for key in ("z", "image"))
    return Probes(z, image)


def restored_restriction(state: CovarianceState | SquareRootState, saved: Mapping[str, Any]) -> torch.Tensor | None:
    """Earlier versions did not save it."""
    if saved.get("restriction") is None:
        return None
    return saved_tensor(saved, "restriction", (state.d, None), torch.float64, state.device)


def saved_tensor(
    saved: Mapping[str, object],
    name: str,
    shape: tuple[int | None, ...],
    dtype: torch.dtype | None,
    device: torch.device,
) -> torch.Tensor:
    """A copy of a saved tensor on `device`; ValueError unless shape and dtype (None: any) and values are right."""
    value = saved.get(name)
    if not isinstance(value, torch.Tensor):
        raise ValueError(f"load_state_dict: {name} must be a tensor, got {type(value).__name__}")
    fits = value.dim() == len(shape) and all(n is None or n == m for n, m in zip(shape, value.shape, strict=False))
    if not fits or dtype not in (None, value.dtype):
        raise ValueError(
            f"load_state_dict: {name} must be {dtype} of shape {shape}, got {value.dtype} of {tuple(value.shape)}"
        )
    if not bool(torch.isfinite(value).all()):
        raise ValueError(f"load_state_dict: {name} must be finite, got NaN or Inf")
    return value.to(device=device, copy=True)


def _same_prior(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    if any(one.get(key) != other.get(key) for key in ("kind", "d", "lam", "mu", "l2")):
        return False
    mine, theirs = other["sums"], one.get("sums", {})
    return mine.keys() == theirs.keys() and all(math.isclose(mine[n], theirs[n], rel_tol=_SAME_PRIOR) for n in mine)
