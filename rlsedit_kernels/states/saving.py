"""What states share of saving and loading again, to the bit, with everything checked before anything is changed."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from typing import Any

import torch

from rlsedit_kernels.states.health import Probes
from rlsedit_kernels.states.state import State

VERSION = 1
_SAME_PRIOR = 1e-9


def header(state: State) -> dict[str, object]:
    """What every state saves beside its form and its probes; tensors are copies."""
    return {
        "version": VERSION,
        "prior": state.prior.signature(),
        "dtype": str(state.dtype),
        "counters": asdict(state._counters),
        "restriction": None if state._restriction is None else state._restriction.clone(),
    }


@contextlib.contextmanager
def as_saved() -> Iterator[None]:
    """ValueError for what is not as `state_dict` gives it, whatever that breaks in the block."""
    try:
        yield
    except (AttributeError, IndexError, KeyError, TypeError) as error:
        raise ValueError(f"load_state_dict: the saved state is not as state_dict gives it: {error!r}") from error


def saved_figures(saved: Mapping[str, Any]) -> tuple[float, bool]:
    """|R|^2 and whether R is regular, as a triangular form saves them."""
    trace, is_regular = saved["trace"], saved["regular"]
    if not isinstance(is_regular, bool) or isinstance(trace, bool) or not isinstance(trace, (int, float)):
        raise ValueError(
            f"load_state_dict: trace and regular must be a number and a bool, got {trace!r}, {is_regular!r}"
        )
    if not 0.0 <= trace < math.inf:
        raise ValueError(f"load_state_dict: trace must be finite and >= 0, got {trace}")
    return float(trace), is_regular


def check_header(state: State, saved: Mapping[str, Any], *more: str) -> None:
    """ValueError unless all is there, `more` too, and version, dtype and prior are those of the state."""
    missing = sorted({"version", "prior", "dtype", "form", "tensors", "counters", "probes", *more} - set(saved))
    if missing:
        raise ValueError(f"load_state_dict: the saved state lacks {', '.join(missing)}")
    if saved["version"] != VERSION:
        raise ValueError(f"load_state_dict: version must be {VERSION}, got {saved['version']!r}")
    if saved["dtype"] != str(state.dtype):
        raise ValueError(f"load_state_dict: the saved state is {saved['dtype']}, this state is {state.dtype}")
    if not _same_prior(saved["prior"], state.prior.signature()):
        raise ValueError(f"load_state_dict: the saved state was made with another prior: {saved['prior']}")


def restored_probes(state: State, saved: Mapping[str, Any]) -> Probes:
    shape = (state.d, state._probes.z.shape[1])
    z, image = (saved_tensor(saved, key, shape, torch.float64, state.device) for key in ("z", "image"))
    return Probes(z, image)


def restored_restriction(state: State, saved: Mapping[str, Any]) -> torch.Tensor | None:
    """Earlier versions did not save it."""
    if saved.get("restriction") is None:
        return None
    return saved_tensor(saved, "restriction", (state.d, None), torch.float64, state.device)


def restored_storage(saved: Mapping[str, Any]) -> torch.dtype:
    """In what the form was kept."""
    storage = {str(dtype): dtype for dtype in (torch.float32, torch.float64)}.get(saved["storage"])
    if storage is None:
        raise ValueError(f"load_state_dict: storage must be torch.float32 or torch.float64, got {saved['storage']!r}")
    return storage


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
