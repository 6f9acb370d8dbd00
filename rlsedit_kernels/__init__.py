"""Recursive least squares kernels for writing facts into language models.

The recursion of RLSEdit (arXiv 2601.15686) keeps C = (lambda^2 I + mu^2 K0'K0 + sum K'K)^-1 up to date at a
cost that depends on the new batch only. See `ops` for the kernels, `Prior`, `CovarianceState`,
`SquareRootState` and `RLSFilter` for the recursion, `profile` to measure any editor's step beside it, `diagnostics` to
follow its errors, `dropin` for the solves of other editors, `distributed` for many GPUs, and `reference` for float64
SciPy versions of all of it. `diagnostics`, `distributed` and `dropin` are imported on first use.
"""

from importlib import import_module
from typing import Any

from rlsedit_kernels import ops, profile, reference
from rlsedit_kernels._version import __version__
from rlsedit_kernels.backends import BackendInfo, BackendUnavailableError, backends, build_info, use_backend
from rlsedit_kernels.errors import BreakdownError, LeverageError, UnderdeterminedError
from rlsedit_kernels.filter import RLSFilter, Step
from rlsedit_kernels.priors import Prior
from rlsedit_kernels.states import CovarianceState, Health, SquareRootState

__all__ = [
    "BackendInfo",
    "BackendUnavailableError",
    "BreakdownError",
    "CovarianceState",
    "Health",
    "LeverageError",
    "Prior",
    "RLSFilter",
    "SquareRootState",
    "Step",
    "UnderdeterminedError",
    "__version__",
    "backends",
    "build_info",
    "ops",
    "profile",
    "reference",
    "use_backend",
]

_ON_FIRST_USE = ("diagnostics", "distributed", "dropin")


def __getattr__(name: str) -> Any:
    if name not in _ON_FIRST_USE:
        raise AttributeError(f"module 'rlsedit_kernels' has no attribute {name!r}")
    return import_module(f"rlsedit_kernels.{name}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_ON_FIRST_USE})
