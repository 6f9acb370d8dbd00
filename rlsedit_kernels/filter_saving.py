"""Copies of an `RLSFilter`, and what it saves: its weight is one tensor, of which the solution has a view."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from rlsedit_kernels.solutions import CarriedSolution
from rlsedit_kernels.states.modes import writing
from rlsedit_kernels.states.saving import saved_tensor

if TYPE_CHECKING:
    from rlsedit_kernels.filter import RLSFilter

VERSION = 1
_NUMBERS = ("objective", "peak", "errors", "forgotten")
_ROUNDING = ("trace", "sum", "steps", "size")


def cloned(rls: RLSFilter) -> RLSFilter:
    """See `RLSFilter.clone`."""
    twin = object.__new__(type(rls))
    twin.__dict__.update(rls.__dict__)
    twin._history = None
    twin._weight = rls._weight.clone()
    twin.state = rls.state.clone()
    twin._rounding = copy.copy(rls._rounding)
    twin._solution = rls._solution.copied(twin.state, twin._row_form())  # type: ignore[arg-type]
    return twin


def state_dict(rls: RLSFilter) -> dict[str, object]:
    """See `RLSFilter.state_dict`."""
    solution = rls._solution
    carried = None
    if isinstance(solution, CarriedSolution):
        solution.check_alone()
        carried = solution.saved()
    return {
        "version": VERSION,
        "layout": rls.layout,
        "track_bounds": rls._track_bounds,
        "state": rls.state.state_dict(),
        "weight": rls._weight.clone(),
        "initial": None if rls._initial is None else rls._initial.clone(),
        "carried": carried,
        **{name: getattr(rls, f"_{name}") for name in _NUMBERS},
        "rounding": {name: getattr(rls._rounding, f"_{name}") for name in _ROUNDING},
    }


def load_state_dict(rls: RLSFilter, saved: Mapping[str, Any]) -> None:
    """See `RLSFilter.load_state_dict`."""
    _check_header(rls, saved)
    device, dtype = rls.state.device, rls.state.dtype
    weight = saved_tensor(saved, "weight", tuple(rls._weight.shape), dtype, device)
    initial, B, change = None, None, None
    if rls._initial is not None:
        initial = saved_tensor(saved, "initial", tuple(rls._initial.shape), dtype, device)
    solution = rls._solution
    if isinstance(solution, CarriedSolution):
        B = saved_tensor(saved["carried"], "B", (None, solution.W.shape[1]), dtype, device)
        if saved["carried"].get("change") is not None:
            change = saved_tensor(saved["carried"], "change", tuple(solution.W.shape), dtype, device)
        R = saved["state"].get("tensors", {}).get("R")
        if isinstance(R, torch.Tensor) and R.shape[0] != B.shape[0]:
            raise ValueError(f"load_state_dict: B must have as many rows as R, {R.shape[0]}, got {B.shape[0]}")
    numbers = {f"_{name}": float(saved[name]) for name in _NUMBERS}
    rounding = {f"_{name}": saved["rounding"][name] for name in _ROUNDING}
    rls.state.load_state_dict(saved["state"])  # the last thing that can fail
    with writing(rls._weight):
        rls._weight.copy_(weight)
    rls._initial = solution.W_0 = initial  # type: ignore[assignment]
    if isinstance(solution, CarriedSolution):
        assert B is not None
        solution.restore(B, change, saved["carried"])
    else:
        solution._version = None
    rls.__dict__.update(numbers)
    rls._rounding.__dict__.update(rounding)


def _check_header(rls: RLSFilter, saved: Mapping[str, Any]) -> None:
    """Everything is there, and it is a filter of this kind; the state checks what is its own."""
    names = {"version", "layout", "track_bounds", "state", "weight", "initial", "carried", "rounding", *_NUMBERS}
    missing = sorted(names - set(saved))
    missing += sorted(set(_ROUNDING) - set(saved.get("rounding", _ROUNDING)))
    if missing:
        raise ValueError(f"load_state_dict: the saved filter lacks {', '.join(missing)}")
    carried = isinstance(rls._solution, CarriedSolution)
    for name, theirs, ours in (
        ("version", saved["version"], VERSION),
        ("layout", saved["layout"], rls.layout),
        ("track_bounds", saved["track_bounds"], rls._track_bounds),
        ("solution", "gain" if saved["carried"] is None else "carried", "carried" if carried else "gain"),
    ):
        if theirs != ours:
            raise ValueError(f"load_state_dict: {name} must be {ours!r}, got {theirs!r}")
