"""Counts floating-point operations and bytes of a step, by stage, for any code that is made of torch calls.

Bytes are the least that each call has to move: every tensor argument that it reads, once, and every result that it
writes, once; what a cache saves between two calls is not taken off, what a call moves more than once is not put on.
Symmetric results are counted in full, because they are written in full; the ops of this package that work on one
triangle are counted with the half of C that they read.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from math import prod
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from rlsedit_kernels.profile.flops import flops_of, known, uncounted
from rlsedit_kernels.profile.stages import OTHER, metered

__all__ = ["Count", "Counter", "count"]


@dataclass
class Count:
    """Work of one stage.

    Attributes:
        flops: floating-point operations; a multiplication and an addition are two.
        bytes: moved between memory and processor, at least.
        wide: those of `flops` that are done in float64.
        uncounted: names of the operators whose operations are not among `flops`, since their number is not known.
    """

    flops: float = 0.0
    bytes: float = 0.0
    wide: float = 0.0
    uncounted: set[str] = field(default_factory=set)

    def scaled(self, factor: float) -> Count:
        """That many times the work."""
        return Count(self.flops * factor, self.bytes * factor, self.wide * factor, set(self.uncounted))

    @classmethod
    def total(cls, parts: Iterable[Count]) -> Count:
        """The sum."""
        parts = list(parts)
        flops, moved, wide = (sum(getattr(c, name) for c in parts) for name in ("flops", "bytes", "wide"))
        return cls(flops, moved, wide, set().union(*(c.uncounted for c in parts)))


def count(step: Callable[[], object]) -> dict[str, Count]:
    """Run a step once and count its work by stage."""
    counter = Counter()
    with metered(counter), counter:
        step()
    return counter.stages


# How often C (R, W) is read and written: one triangle read, all of it written; R has one triangle only. The fused
# update reads C for the products and one triangle of it for the downdate; W is read for the innovation and changed.
_PASSES: dict[str, float] = {
    "rlsedit_kernels::downdate_": 1.5,
    "rlsedit_kernels::downdate_gain_products_": 1.5,
    "rlsedit_kernels::rls_update_": 2.5,
    "rlsedit_kernels::weight_update_": 3.0,
    "rlsedit_kernels::qr_append_": 1.0,
    "rlsedit_kernels::qr_append_rhs_": 1.0,
    "rlsedit_kernels::qr_gain": 1.0,
}

_VIEWS = frozenset({"aten::detach", "aten::alias", "aten::_unsafe_view", "aten::lift_fresh", "aten::empty"})

# Of what these read no more is needed than what they give.
_GATHERS = frozenset(
    {"aten::index", "aten::index_select", "aten::gather", "aten::embedding", "aten::take", "aten::masked_select"}
)

# These change no more of an argument than the values that they are given (argument, by position); the second number
# tells how often what is changed is moved: written, or read and written.
_SCATTERS = {
    "aten::index_put_": (2, 1.0),
    "aten::_index_put_impl_": (2, 1.0),
    "aten::index_copy_": (3, 1.0),
    "aten::scatter_": (3, 1.0),
    "aten::index_add_": (3, 2.0),
    "aten::scatter_add_": (3, 2.0),
}

_VALUES_ONLY = frozenset(
    {
        torch.linalg.svdvals, torch.linalg.eigvalsh, torch.linalg.eigvals, torch.linalg.matrix_norm, torch.linalg.norm,
        torch.linalg.cond, torch.linalg.matrix_rank, torch.norm, torch.nuclear_norm, torch.Tensor.norm,
    }
)  # fmt: skip
_VALUES_AT = {"aten::_linalg_svd": 1, "aten::_linalg_eigh": 0, "aten::linalg_eig": 0}


class _Asked(TorchFunctionMode):
    """Knows whether the call that is under way asks for eigenvalues or singular values alone.

    Under a dispatch mode torch works out the vectors as well, which it does not do in the step that is timed.
    """

    def __init__(self) -> None:
        super().__init__()
        self.values = False

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        before, self.values = self.values, func in _VALUES_ONLY or self.values
        try:
            return func(*args, **(kwargs or {}))
        finally:
            self.values = before


class Counter(TorchDispatchMode):
    """Adds up the calls it sees, under the stage that is open."""

    def __init__(self) -> None:
        super().__init__()
        self.stages: dict[str, Count] = {}
        self._stage = OTHER
        self._asked = _Asked()

    def __enter__(self) -> Counter:
        self._asked.__enter__()
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._asked.__exit__(*error)

    def begin(self, name: str) -> None:
        self._stage = name

    def end(self, name: str) -> None:
        self._stage = OTHER

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        name = func.name().split(".")[0]
        if not known(name):  # in inference mode a composite call comes whole: what it is made of is counted
            with self._inner():
                parts = func.decompose(*args, **kwargs)
            if parts is not NotImplemented:
                return parts
        out = func(*args, **kwargs)
        if name in _VIEWS or func.is_view or name.startswith(("aten::new_empty", "aten::empty_")):
            return out
        values = self._asked.values and name in _VALUES_AT and not (torch.is_grad_enabled() and args[0].requires_grad)
        entry = self.stages.setdefault(self._stage, Count())
        flops = flops_of(name, func, args, kwargs, out, values=values)
        entry.flops += flops
        if uncounted(name, func):
            entry.uncounted.add(name)
        if flops and any(a.dtype in _WIDE for a in tree_leaves(args) if isinstance(a, torch.Tensor)):
            entry.wide += flops
        entry.bytes += _bytes(name, args, kwargs, out[_VALUES_AT[name]] if values else out)
        return out

    @contextlib.contextmanager
    def _inner(self) -> Iterator[None]:
        """This mode again, for the calls that one call is made of."""
        super().__enter__()
        try:
            yield
        finally:
            super().__exit__(None, None, None)


_WIDE = (torch.float64, torch.complex128)


def _bytes(name: str, args: tuple, kwargs: dict, out: Any) -> float:
    read = _tensors((args, kwargs))
    results = _tensors(out)
    known_already = {id(a) for a in read}
    written = sum(_size(a) for a in results if id(a) not in known_already)
    if name in _PASSES:
        first, rest = read[0], read[1:]
        moved = _PASSES[name] * _size(first)
        if name == "rlsedit_kernels::qr_append_rhs_":
            moved += _size(rest[0])  # read below, written here
        return moved + sum(map(_size, rest)) + written
    if name in _GATHERS:
        return 2.0 * written + sum(_size(a) for a in read if not a.is_floating_point())
    if name in _SCATTERS:
        at, passes = _SCATTERS[name]
        values = args[at] if len(args) > at else None
        touched = _size(values) if isinstance(values, torch.Tensor) else 0.0
        return passes * touched + sum(map(_size, read[1:]))
    moved = 0.0
    if name.endswith("_"):  # in place: what is written is an argument
        moved += sum(map(_size, _tensors(args[:1])))
    if name in ("aten::copy_", "aten::fill_", "aten::zero_"):
        moved -= _size(read[0])  # written, not read
    return moved + sum(map(_size, read)) + written


def _tensors(values: Any) -> list[torch.Tensor]:
    return [a for a in tree_leaves(values) if isinstance(a, torch.Tensor)]


def _size(a: torch.Tensor) -> float:
    """Bytes that a tensor holds: what is expanded lies there once."""
    distinct = prod(n for n, step in zip(a.shape, a.stride(), strict=True) if step != 0 or n == 0)
    return float(distinct * a.element_size())
