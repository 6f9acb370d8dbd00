"""Define the public ops: schema, fake, router, version counters and gradient rule of each.

The router asks `backends.kernel_for` at every call, so a back end can be forced anywhere: eagerly, through
`torch.ops`, and inside a compiled graph. It is the kernel of every back end and, where autograd is on, that
of the key "Autograd" as well: called there, a plain tensor has no other kernel to pass, and going on to the
back end at once saves a second trip through the dispatcher.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import is_grad_enabled
from torch._C import _any_requires_grad as any_requires_grad
from torch.autograd import forward_ad
from torch.autograd.graph import increment_version

from rlsedit_kernels.backends.registry import kernel_for
from rlsedit_kernels.ops.contract import require
from rlsedit_kernels.ops.schemas import NAMESPACE, SCHEMAS, written

_library = torch.library.Library(NAMESPACE, "DEF")
_REGISTERED: set[str] = set()

_Key, _Keys = torch._C.DispatchKey, torch._C.DispatchKeySet

# What a call has left when "Autograd" is reached with dense tensors of one device: no subclass, no fake, no transform.
_PLAIN = frozenset(
    (_Keys(getattr(_Key, device)) | _Keys(getattr(_Key, f"Autograd{device}"))).raw_repr()
    for device in ("CPU", "CUDA", "XPU")
)


def registered() -> frozenset[str]:
    """Names of the ops that have been registered."""
    return frozenset(_REGISTERED)


def _about_to_write(tensor: torch.Tensor) -> None:
    """What torch's in-place ops do before they write: refuse an inference tensor, and let autograd see the change."""
    if tensor.is_inference() and not torch.is_inference_mode_enabled():
        raise RuntimeError(
            "Inplace update to inference tensor outside InferenceMode is not allowed. "
            "You can make a clone to get a normal tensor before doing inplace update."
        )
    increment_version(tensor)


def _router(op: str) -> Callable[..., object]:
    def route(first: torch.Tensor, *rest: object) -> object:
        return kernel_for(op, first.device.type)(first, *rest)

    def route_one(first: torch.Tensor, *rest: object) -> object:
        _about_to_write(first)
        return kernel_for(op, first.device.type)(first, *rest)

    def route_two(first: torch.Tensor, second: torch.Tensor, *rest: object) -> object:
        _about_to_write(first)
        _about_to_write(second)
        return kernel_for(op, first.device.type)(first, second, *rest)

    chosen: Callable[..., object] = (route, route_one, route_two)[written(op)]
    chosen.__name__ = op
    return chosen


def _has_tangent(arguments: tuple[object, ...]) -> bool:
    """Whether forward-mode AD carries a tangent along with one of the arguments."""
    return any(isinstance(a, torch.Tensor) and forward_ad.unpack_dual(a).tangent is not None for a in arguments)


def _autograd(op: str, route: Callable[..., object]) -> Callable[..., object]:
    """The kernel of "Autograd": no gradient is ever given, and none is silently zero.

    Without a gradient to refuse, the call goes on. Otherwise an op that returns new tensors gives them a backward that
    raises, since they may be wanted for their values; an op that writes raises at once, before it has written: its
    argument would have to carry the graph from then on. Under a transform of torch.func, and for a tangent, every op
    raises at once: there is no later place.
    """
    overload: Any = getattr(getattr(torch.ops, NAMESPACE), op).default
    count = written(op)
    text = f"{NAMESPACE}::{op} has no gradient: the recursion is a closed form, call it under torch.no_grad()"

    def go_on(keyset: Any, *arguments: Any) -> Any:
        for tensor in arguments[:count]:
            _about_to_write(tensor)
        with torch._C._AutoDispatchBelowAutograd():
            return overload.redispatch(keyset & torch._C._after_autograd_keyset, *arguments)

    class Refused(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, keyset: Any, *arguments: Any) -> Any:
            return go_on(keyset, *arguments)

        @staticmethod
        def backward(ctx: Any, *grads: Any) -> Any:
            raise NotImplementedError(text)

    def autograd(keyset: Any, *arguments: Any) -> Any:
        if forward_ad._current_level >= 0 and _has_tangent(arguments):
            raise NotImplementedError(text)
        if not (is_grad_enabled() and any_requires_grad(*arguments)):
            return route(*arguments) if keyset.raw_repr() in _PLAIN else go_on(keyset, *arguments)
        if any(t.is_leaf and t.requires_grad for t in arguments[:count]):
            raise RuntimeError("a leaf Variable that requires grad is being used in an in-place operation.")
        if count or torch._C._functorch.maybe_current_level() is not None:
            raise NotImplementedError(text)
        return Refused.apply(keyset, *arguments)

    return autograd


def _checked(op: str, fake: Callable[..., object]) -> Callable[..., object]:
    """The fake kernel behind what every native one checks.

    Without it a call that mixes a meta tensor with true ones has a result, of memory that nobody has written.
    """

    @wraps(fake)
    def checked(*arguments: Any) -> object:
        require(op, *arguments)
        return fake(*arguments)

    return checked


def register(op: str, fake: Callable[..., object]) -> None:
    """Register `op` of the schema table with its fake kernel, its router and a gradient that raises."""
    _library.define(op + SCHEMAS[op])
    route = _router(op)
    _library.impl(op, route, "CompositeExplicitAutograd")
    _library.impl(op, _autograd(op, route), "Autograd", with_keyset=True)
    torch.library.register_fake(f"{NAMESPACE}::{op}", _checked(op, fake), lib=_library)
    _REGISTERED.add(op)
