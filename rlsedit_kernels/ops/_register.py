"""Define the public ops: schema, fake, router and gradient rule of each.

The router is the only kernel in the public namespace. It asks `backends.kernel_for` at every call, so a
back end can be forced anywhere: eagerly, through `torch.ops`, and inside a compiled graph.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from rlsedit_kernels.backends.registry import kernel_for
from rlsedit_kernels.ops.schemas import NAMESPACE, SCHEMAS, is_in_place

_library = torch.library.Library(NAMESPACE, "DEF")
_REGISTERED: set[str] = set()


def registered() -> frozenset[str]:
    """Names of the ops that have been registered."""
    return frozenset(_REGISTERED)


def _router(op: str) -> Callable[..., object]:
    def route(first: torch.Tensor, *rest: object) -> object:
        return kernel_for(op, first.device.type)(first, *rest)

    route.__name__ = op
    return route


def _no_gradient(op: str) -> Callable[..., None]:
    def backward(ctx: object, *grads: object) -> None:
        raise NotImplementedError(
            f"{NAMESPACE}::{op} has no gradient: the recursion is a closed form, call it under torch.no_grad()"
        )

    return backward


def register(op: str, fake: Callable[..., object]) -> None:
    """Register `op` of the schema table with its fake kernel, its router and a gradient that raises."""
    _library.define(op + SCHEMAS[op])
    qualified = f"{NAMESPACE}::{op}"
    _library.impl(op, _router(op), "CompositeExplicitAutograd")
    torch.library.register_fake(qualified, fake, lib=_library)
    if not is_in_place(op):  # writing to a tensor that needs a gradient is refused by torch itself
        torch.library.register_autograd(qualified, _no_gradient(op), lib=_library)
    _REGISTERED.add(op)
