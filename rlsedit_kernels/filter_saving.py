"""Copies of an `RLSFilter`, and what it saves: its weight is one tensor, of which the solution has a view."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, TypeVar

import torch

from rlsedit_kernels.rounding import Rounding
from rlsedit_kernels.solutions import CarriedSolution, Solution
from rlsedit_kernels.states import CovarianceState, SquareRootState
from rlsedit_kernels.states.modes import normal_mode, writing
from rlsedit_kernels.states.saving import saved_tensor

VERSION = 1
_NUMBERS = ("objective", "peak", "errors", "forgotten")
_ROUNDING = ("trace", "sum", "steps", "size")

_Filter = TypeVar("_Filter", bound="Saving")


class Saving:
    """What an `RLSFilter` needs to be copied, saved and loaded."""

    layout: str
    state: CovarianceState | SquareRootState
    _weight: torch.Tensor
    _initial: Any
    _solution: Solution
    _track_bounds: bool
    _history: Any
    _rounding: Rounding

    @normal_mode()
    def state_dict(self) -> dict[str, object]:
        """Tensors (copies) and plain values from which `load_state_dict` restores the filter to the bit.

        The weight and W_0 are among them, not the history; `torch.load(..., weights_only=True)` reads it.

        Raises:
            ValueError: the state was changed outside of a filter that carries its solution.
        """
        solution = self._solution
        carried = None
        if isinstance(solution, CarriedSolution):
            solution.check_alone()
            carried = solution.saved()
        return {
            "version": VERSION,
            "layout": self.layout,
            "track_bounds": self._track_bounds,
            "state": self.state.state_dict(),
            "weight": self._weight.clone(),
            "initial": None if self._initial is None else self._initial.clone(),
            "carried": carried,
            **{name: getattr(self, f"_{name}") for name in _NUMBERS},
            "rounding": {name: getattr(self._rounding, f"_{name}") for name in _ROUNDING},
        }

    @normal_mode()
    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Restore what `state_dict` gave, into a filter made with the same prior, state, solution, layout and dtype.

        `weight` stays the same tensor and gets the saved values; W_0 becomes that of the saved filter; `history` stays.

        Raises:
            ValueError: what was saved does not fit; the filter is unchanged.
        """
        self._check_header(saved)
        device, dtype = self.state.device, self.state.dtype
        weight = saved_tensor(saved, "weight", tuple(self._weight.shape), dtype, device)
        initial, B, change = None, None, None
        if self._initial is not None:
            initial = saved_tensor(saved, "initial", tuple(self._initial.shape), dtype, device)
        solution = self._solution
        if isinstance(solution, CarriedSolution):
            B = saved_tensor(saved["carried"], "B", (None, solution.W.shape[1]), dtype, device)
            if saved["carried"].get("change") is not None:
                change = saved_tensor(saved["carried"], "change", tuple(solution.W.shape), dtype, device)
            R = saved["state"].get("tensors", {}).get("R")
            if isinstance(R, torch.Tensor) and R.shape[0] != B.shape[0]:
                raise ValueError(f"load_state_dict: B must have as many rows as R, {R.shape[0]}, got {B.shape[0]}")
        numbers = {f"_{name}": float(saved[name]) for name in _NUMBERS}
        rounding = {f"_{name}": saved["rounding"][name] for name in _ROUNDING}
        self.state.load_state_dict(saved["state"])  # the last thing that can fail
        with writing(self._weight):
            self._weight.copy_(weight)
        self._initial = solution.W_0 = initial  # type: ignore[assignment]
        if isinstance(solution, CarriedSolution):
            assert B is not None
            solution.restore(B, change, saved["carried"])
        else:
            solution._version = None
        self.__dict__.update(numbers)
        self._rounding.__dict__.update(rounding)

    @normal_mode()
    def clone(self: _Filter) -> _Filter:
        """An independent copy without a history, its weight a tensor of its own; the prior is shared."""
        twin = object.__new__(type(self))
        twin.__dict__.update(self.__dict__)
        twin._history = None
        twin._weight = self._weight.clone()
        twin.state = self.state.clone()
        twin._rounding = copy.copy(self._rounding)
        twin._solution = self._solution.copied(twin.state, twin._row_form())  # type: ignore[arg-type]
        return twin

    def __copy__(self: _Filter) -> _Filter:
        return self.clone()  # two filters on one state and one weight would each know half of the stream

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_history": None}

    def __setstate__(self, found: dict[str, Any]) -> None:
        self.__dict__.update(found)
        with normal_mode():
            self._solution.take(self._row_form())

    def _row_form(self) -> torch.Tensor:
        """W (d, v), a view."""
        return self._weight if self.layout == "in_out" else self._weight.mT

    def _check_header(self, saved: Mapping[str, Any]) -> None:
        """Everything is there, and it is a filter of this kind; the state checks what is its own."""
        names = {"version", "layout", "track_bounds", "state", "weight", "initial", "carried", "rounding", *_NUMBERS}
        missing = sorted(names - set(saved))
        missing += sorted(set(_ROUNDING) - set(saved.get("rounding", _ROUNDING)))
        if missing:
            raise ValueError(f"load_state_dict: the saved filter lacks {', '.join(missing)}")
        carried = isinstance(self._solution, CarriedSolution)
        for name, theirs, ours in (
            ("version", saved["version"], VERSION),
            ("layout", saved["layout"], self.layout),
            ("track_bounds", saved["track_bounds"], self._track_bounds),
            ("solution", "gain" if saved["carried"] is None else "carried", "carried" if carried else "gain"),
        ):
            if theirs != ours:
                raise ValueError(f"load_state_dict: {name} must be {ours!r}, got {theirs!r}")
