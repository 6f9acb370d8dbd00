"""One call of a method over ranks: what goes wrong on one of them ends the call on all of them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import torch

from rlsedit_kernels.distributed.ranks import Ranks
from rlsedit_kernels.errors import BreakdownError
from rlsedit_kernels.states.guard import Guarded
from rlsedit_kernels.states.modes import normal_mode

__all__ = ["GuardedByAll", "known_to_all", "session"]

_Method = TypeVar("_Method", bound=Callable[..., Any])


def session(method: _Method) -> _Method:
    """A method of an object with `ranks`, within `Ranks.guarded`, its products in IEEE precision.

    Errors that `Ranks.confirmed` raises, and a breakdown, which every rank finds from the same bits, are known to all:
    the ranks can go on. Any other one is told to the others, and the group has ended.
    """

    @functools.wraps(method)
    def called(self: Any, *args: Any, **kwargs: Any) -> Any:
        with self.ranks.guarded(method.__name__), normal_mode():
            try:
                return method(self, *args, **kwargs)
            except BreakdownError as error:
                raise known_to_all(error) from None

    return called  # type: ignore[return-value]


class GuardedByAll(Guarded):
    """A state over ranks: all of them have a history or none has, and one that fails on a rank fails on all."""

    ranks: Ranks

    def _has_history(self) -> bool:
        with self.ranks.confirmed("look") as agreed:
            agreed["whether there is a history"] = found = super()._has_history()
        return found

    def _given_history(self) -> Iterable[tuple[torch.Tensor, float]]:
        with self.ranks.confirmed("look"):
            return super()._given_history()


def known_to_all(error: Exception) -> Exception:
    """The error, marked as one that every rank raises by itself."""
    error.agreed = True  # type: ignore[attr-defined]
    return error
