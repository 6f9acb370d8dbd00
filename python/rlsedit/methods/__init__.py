"""Editing methods as recipes over one state; `list_methods` names those that work."""

from __future__ import annotations

from .dense_alphaedit import DenseAlphaEdit
from .method import Method, Proposal, Solver
from .recursion import RecursionSolver, anchor_solver, null_basis, null_space_solver

_METHODS = {
    method.name: method
    for method in (
        Method(
            "rlsedit",
            "recursive least squares with an anchor, every batch committed",
            anchor_solver(True, ridge=True),
            "anchor",
            ridge=True,
        ),
        Method("alphaedit", "AlphaEdit (Fang et al. 2025) through the recursion", null_space_solver, "null_space"),
        Method(
            "memit",
            "MEMIT (Meng et al. 2023): each batch against the anchor alone",
            anchor_solver(False),
            "anchor",
            commit=False,
        ),
        Method("memit_seq", "MEMIT with the keys of earlier batches kept", anchor_solver(True), "anchor"),
    )
}
_BASELINES = {
    "alphaedit_dense": Method(
        "alphaedit_dense", "AlphaEdit as published, a dense solve each batch", DenseAlphaEdit.make, "null_space"
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
    "Solver",
    "anchor_solver",
    "get_method",
    "list_methods",
    "null_basis",
    "null_space_solver",
]
