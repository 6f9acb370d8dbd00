"""Editing methods as recipes over one state, a file each; `list_methods` names them."""

from __future__ import annotations

from . import (
    alphaedit,
    emmet,
    encore,
    evoedit,
    ft,
    langedit,
    lyaplock,
    memit,
    memit_seq,
    pmet,
    prune,
    r_rome,
    rect,
    rlsedit,
    rome,
    simie,
    ultraedit,
)  # fmt: skip
from .dense_alphaedit import DenseAlphaEdit
from .method import Method, Signals
from .priors import null_basis
from .solver import Proposal, RecursionSolver, Solver, Start

_METHODS = {
    module.METHOD.name: module.METHOD
    for module in (
        rlsedit, memit, memit_seq, encore, alphaedit, langedit, evoedit, emmet, rome, r_rome, pmet, prune, rect,
        lyaplock, simie, ultraedit, ft,
    )
}  # fmt: skip
_BASELINES = {
    "alphaedit_dense": Method(
        "alphaedit_dense",
        "AlphaEdit as published, a dense solve each batch",
        prior=alphaedit.METHOD.prior,
        solver=DenseAlphaEdit.make,
        objective=alphaedit.METHOD.objective,
        soft=True,
    )
}


def list_methods() -> list[str]:
    """Names of the methods that `Editor` takes."""
    return list(_METHODS)


def get_method(name: str) -> Method:
    """The recipe called `name`.

    Raises:
        ValueError: no such method; the message lists those that exist.
    """
    method = _METHODS.get(name) or _BASELINES.get(name)
    if method is None:
        raise ValueError(f"Editor: method must be one of {list_methods()}, got {name!r}")
    return method


__all__ = [
    "DenseAlphaEdit",
    "Method",
    "Proposal",
    "RecursionSolver",
    "Signals",
    "Solver",
    "Start",
    "get_method",
    "list_methods",
    "null_basis",
]
