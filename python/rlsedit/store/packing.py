"""The state of a layer as tensors and plain values, and back again to the bit.

What the method makes anew from second moment and hyper-parameters is left out. A prior that has moved with the stream
is kept whole. Coordinates of a state may be those of the prior's root, which is factored anew: its checksum says
whether it came out the same here.
"""

from __future__ import annotations

import types
import typing
from dataclasses import fields, is_dataclass, replace
from typing import Any

import torch
from torch import Tensor

import rlsedit_kernels as rk

from ..config import EditConfig
from .errors import StoreError
from .tensors import checksum

__all__ = ["RootChanged", "pack", "unpack"]

_FROM_START = {("LyapLockSolver", "moment"), ("LyapLockSolver", "gram"), ("Deviations", "gram"),
               ("DenseAlphaEdit", "projector"), ("LangEditSolver", "start")}  # fmt: skip
_OWN_PRIOR = {"LangEditSolver", "LyapLockSolver"}


class RootChanged(StoreError):
    """The prior's root comes out in other bits on this machine; what is kept in its coordinates cannot be used."""


def pack(value: object, name: str, out: dict[str, Tensor], own_prior: bool = False) -> Any:
    """A JSON-ready tree of `value`; its tensors go into `out` under names that start with `name`."""
    if isinstance(value, Tensor):
        out[name] = value
        return {"tensor": name}
    if isinstance(value, rk.CovarianceState):
        tree = {"state": pack(value.state_dict(), name, out)}
        root = value.prior.factor.root
        if root is not None and value.form != "plain":
            tree["root"] = checksum(root)
        if own_prior:
            prior = value.prior
            scalars = {key: getattr(prior, key) for key in ("lam", "mu", "l2") if getattr(prior, key) is not None}
            arrays = pack(prior.arrays, f"{name}.prior", out)
            tree["prior"] = {"kind": prior.kind, "d": prior.d, "arrays": arrays, "scalars": scalars}
        return tree
    if is_dataclass(value) and not isinstance(value, type):
        kind = type(value).__name__
        kept = {}
        for part in fields(value):
            inner = getattr(value, part.name)
            if (kind, part.name) in _FROM_START or isinstance(inner, (types.FunctionType, EditConfig)):
                continue
            kept[part.name] = pack(inner, f"{name}.{part.name}", out, own_prior or kind in _OWN_PRIOR)
        return {"fields": kept}
    if isinstance(value, dict):
        return {"dict": {str(key): pack(inner, f"{name}.{key}", out) for key, inner in value.items()}}
    if isinstance(value, (list, tuple)):
        return {"list": [pack(inner, f"{name}.{i}", out) for i, inner in enumerate(value)]}
    if value is None or isinstance(value, (bool, int, float, str)):
        return {"value": value}
    if not getattr(value, "__dict__", True):  # a solver that keeps nothing
        return {"start": type(value).__name__}
    raise TypeError(f"pack: cannot keep a {type(value).__name__} ({name})")


def unpack(tree: Any, tensors: dict[str, Tensor], fresh: Any, hint: Any = None) -> Any:
    """What `pack` was given; `fresh` is the same object as the method starts it.

    Raises:
        StoreError: the tree does not fit the method.
        RootChanged: see there.
    """
    if "tensor" in tree:
        return tensors[tree["tensor"]]
    if "value" in tree:
        return tree["value"]
    if "dict" in tree:
        return {key: unpack(inner, tensors, None) for key, inner in tree["dict"].items()}
    if "list" in tree:
        return [unpack(inner, tensors, None) for inner in tree["list"]]
    if "start" in tree:
        return fresh
    if "state" in tree:
        return _state(tree, tensors, fresh)
    if "fields" not in tree:
        raise StoreError(f"snapshot: unknown entry {sorted(tree)}")
    kind = type(fresh) if fresh is not None else _class_of(hint)
    hints = typing.get_type_hints(kind)
    parts = {
        name: unpack(inner, tensors, getattr(fresh, name, None), hints.get(name))
        for name, inner in tree["fields"].items()
    }
    return kind(**parts) if fresh is None else replace(fresh, **parts)


def _state(tree: Any, tensors: dict[str, Tensor], fresh: Any) -> rk.CovarianceState:
    if not isinstance(fresh, rk.CovarianceState) and (fresh is not None or "prior" not in tree):
        raise StoreError(f"snapshot: holds a covariance state where the method has {type(fresh).__name__}")
    saved = unpack(tree["state"], tensors, None)
    if fresh is None:  # the method starts without a state
        dtype = {str(t): t for t in (torch.float32, torch.float64)}[saved["dtype"]]
        device = next(iter(tensors.values())).device
    else:
        prior, dtype, device = fresh.prior, fresh.dtype, fresh.device
    if "prior" in tree:
        given = tree["prior"]
        arrays = unpack(given["arrays"], tensors, None)
        eps = torch.finfo(torch.float64).eps
        prior = rk.Prior(given["kind"], given["d"], arrays, given_eps=eps, **given["scalars"])
    root = prior.factor.root
    if "root" in tree and (root is None or checksum(root) != tree["root"]):
        raise RootChanged("snapshot: the root of the prior comes out in other bits on this machine")
    state = rk.CovarianceState(prior, dtype=dtype, device=device)
    state.load_state_dict(saved)
    return state


def _class_of(hint: Any) -> Any:
    """The dataclass in an annotation such as `Last | None`."""
    options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    for option in options:
        if is_dataclass(option):
            return option
    raise StoreError(f"snapshot: nothing of the method fits {hint}")
