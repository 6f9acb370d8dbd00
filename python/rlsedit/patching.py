"""`patch`: another code base's solve replaced by the recursion at run time, for the versions whose solve is known."""

from __future__ import annotations

import inspect
import sys
import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import wraps
from importlib import import_module
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from rlsedit import patch_forms
from rlsedit_kernels import dropin
from rlsedit_kernels.states.modes import version


class UnknownVersionError(ValueError):
    """The code that is installed does not solve in a way that is known here."""


@dataclass(frozen=True)
class _Target:
    """A function of another code base, and how its solve has to read.

    Attributes:
        module, functions: where the solve is: in the first of these functions that the module has.
        parameters: that the function must have.
        solves: the one solve that it must contain, in the words of `patch_forms`; none for code that has no solve.
        updates: assignments that it must contain, and the marks by which they are found.
        install: replaces what has to be replaced in the module until the stack unwinds.
    """

    module: str
    functions: tuple[str, ...]
    parameters: frozenset[str]
    install: Callable[[ModuleType, ExitStack, bool], None]
    solves: frozenset[str] = frozenset()
    updates: frozenset[str] = frozenset()
    marks: tuple[str, ...] = ()


@contextmanager
def patch(name: str, *, verify: bool = False) -> Iterator[tuple[ModuleType, ...]]:
    """Let another code base solve by the recursion while the block runs.

    Args:
        name: "alphaedit", "memit", "rlsedit" (their released code) or "easyedit" (its AlphaEdit and MEMIT; with
            "-alphaedit" or "-memit" behind it one of them alone, for a fork that has changed the other).
        verify: compare the first batch of each layer with the original solve, and raise if they differ.

    Yields:
        The patched modules. "alphaedit" replaces the function `apply_AlphaEdit_to_model` wherever a module, or a
        dictionary or tuple in one, holds it by that time.

    Raises:
        ValueError: no such name.
        ImportError: that code base cannot be imported.
        UnknownVersionError: its solve, or the function around it, is not one of those known here.
        rlsedit_kernels.dropin.VerificationError: inside of the block, with `verify`.
    """
    if name not in _TARGETS:
        raise ValueError(f"patch: name must be one of {sorted(_TARGETS)}, got {name!r}")
    targets = _TARGETS[name]
    modules = tuple(_imported(name, target.module) for target in targets)
    for target, module in zip(targets, modules, strict=True):
        _check(target, module)
    with ExitStack() as stack:
        for target, module in zip(targets, modules, strict=True):
            target.install(module, stack, verify)
        yield modules


def _imported(name: str, module: str) -> ModuleType:
    """A module of the code base; one that is not there is named with what to do about it."""
    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module}.".startswith(f"{error.name}."):
            raise  # the module is there, and imports what is not
        told = f"patch: {name!r} needs the module {module}, and there is no {error.name!r}: run in the folder of the"
        raise ModuleNotFoundError(f"{told} checkout, or put it on sys.path", name=error.name) from None


def _check(target: _Target, module: ModuleType) -> None:
    present = [name for name in target.functions if inspect.isfunction(getattr(module, name, None))]
    if not present:
        raise UnknownVersionError(f"patch: {target.module} has no function {' or '.join(target.functions)}")
    where, function = f"{target.module}.{present[0]}", getattr(module, present[0])
    if missing := target.parameters - set(inspect.signature(function).parameters):
        raise UnknownVersionError(f"patch: {where} lacks the parameters {sorted(missing)}")
    try:
        source = inspect.getsource(function)
    except OSError as error:
        raise UnknownVersionError(f"patch: the source of {where} cannot be read") from error
    solved, updated = patch_forms.solves(source), patch_forms.updates(source, target.marks)
    if solved != target.solves or not target.updates <= updated:
        raise UnknownVersionError(
            f"patch: {where} must contain {sorted(target.solves | target.updates)} and no other solve, got "
            f"{sorted(solved | updated)}; use the objects of rlsedit_kernels.dropin by hand (docs/dropin.md)"
        )


def _set(stack: ExitStack, owner: Any, name: str, value: Any) -> None:
    before = getattr(owner, name)
    setattr(owner, name, value)
    stack.callback(setattr, owner, name, before)


def _replace_everywhere(stack: ExitStack, original: Any, value: Any) -> None:
    """In the modules that hold it by name, or in a dictionary or a tuple in one, as in ALG_DICT."""
    for holder in [m for m in list(sys.modules.values()) if isinstance(m, ModuleType)]:
        for name, held in list(vars(holder).items()):
            if held is original:
                _set(stack, holder, name, value)
            elif type(held) is dict:
                for key, entry in list(held.items()):
                    if entry is original:
                        _put(stack, held, key, value)
                    elif type(entry) is tuple and any(part is original for part in entry):
                        _put(stack, held, key, tuple(value if part is original else part for part in entry))


def _put(stack: ExitStack, owner: dict[Any, Any], key: Any, value: Any) -> None:
    before = owner[key]
    owner[key] = value
    stack.callback(owner.__setitem__, key, before)


@dataclass
class _Stream:
    """A cache_c that its caller keeps, and the stand-ins that have solved with it."""

    owner: weakref.ref[Tensor]
    place: tuple[Any, ...]
    stands: tuple[dropin.ProjectorStack, dropin.CacheStack]
    seen: int | None = None
    diagonal: Tensor | None = None

    def look(self, cache: Tensor) -> None:
        """Remember the cache as it is now."""
        self.seen, self.diagonal = version(cache), _diagonal(cache)

    def is_of(self, cache: Tensor) -> bool:
        """Whether it is the same memory, and nobody has written to it since; what hides from torch may show in it."""
        same = self.owner() is _owner(cache) and self.place == _place(cache) and self.seen == version(cache)
        return same and self.diagonal is not None and torch.equal(self.diagonal, _diagonal(cache))


def _owner(cache: Tensor) -> Tensor:
    return cache if cache._base is None else cache._base


def _place(cache: Tensor) -> tuple[Any, ...]:
    return cache.data_ptr(), cache.shape, cache.stride(), cache.dtype


def _diagonal(cache: Tensor) -> Tensor:
    return cache.detach().diagonal(dim1=-2, dim2=-1).clone()


_KEPT = 4
"""Streams whose states are kept, the last ones that were written to; those of another are made anew from its cache."""


class _Streams:
    """Stand-ins by the cache_c that a caller hands over again.

    The cache grows as it does with the original, so that callers may ignore what the function returns, save it, or set
    it to zero for another stream. Where it is not as the last batch left it, its stand-ins are made from it anew.
    """

    def __init__(self, verify: bool) -> None:
        self._verify, self._held = verify, list[_Stream]()

    @contextmanager
    def solving(self, P: Any, l2: float, cache: Any, model: Any) -> Iterator[tuple[Any, Any]]:
        """Stand-ins for P and cache_c, for one call of the original.

        Raises:
            TypeError, ValueError: as `dropin.alphaedit`.
        """
        if isinstance(cache, dropin.CacheStack):  # made by hand
            if P is not cache.partner:
                cache.partner.check(P)
            yield cache.partner, cache
            return
        if not isinstance(cache, Tensor):
            raise TypeError(f"patch: cache_c must be a tensor, got {type(cache).__name__}")
        self._held = [stream for stream in self._held if stream.owner() is not None]
        stream = next((stream for stream in self._held if stream.is_of(cache)), None)
        if stream is None or stream.stands[0].l2 != l2 or not _is_for(stream.stands[0], P):
            like = next((s.stands[0] for s in self._held if s.stands[0].l2 == l2 and _is_for(s.stands[0], P)), None)
            self._held = [s for s in self._held if s.owner() is not _owner(cache)]
            stands = dropin.alphaedit(P, l2, cache, verify=self._verify, device=_device(model), grow=True, like=like)
            stream = _Stream(weakref.ref(_owner(cache)), _place(cache), stands)
        self._held = [*[s for s in self._held if s is not stream][1 - _KEPT :], stream]
        try:
            yield stream.stands
        finally:
            stream.look(cache)


def _is_for(projectors: dropin.ProjectorStack, P: Any) -> bool:
    try:
        projectors.check(P)
    except (TypeError, ValueError):
        return False
    return True


def _alphaedit(module: Any, stack: ExitStack, verify: bool) -> None:
    original = module.apply_AlphaEdit_to_model
    signature = inspect.signature(original)
    streams = _Streams(verify)

    def apply(*args: Any, **kwargs: Any) -> Any:
        given = signature.bind(*args, **kwargs)
        given.apply_defaults()
        P, cache = given.arguments["P"], given.arguments["cache_c"]
        with streams.solving(P, given.arguments["hparams"].L2, cache, given.arguments.get("model")) as stands:
            given.arguments["P"], given.arguments["cache_c"] = stands
            found = original(*given.args, **given.kwargs)
        return tuple(cache if part is stands[1] else part for part in found) if type(found) is tuple else found

    _replace_everywhere(stack, original, _while_open(stack, original, apply))


def _while_open(stack: ExitStack, original: Callable[..., Any], patched: Callable[..., Any]) -> Callable[..., Any]:
    """The patched function until the stack unwinds, then the original: a name may have been imported in between."""
    held = [patched]
    stack.callback(held.clear)

    @wraps(original)
    def call(*args: Any, **kwargs: Any) -> Any:
        return (held[0] if held else original)(*args, **kwargs)

    return call


def _device(model: Any) -> torch.device | None:
    """Where the first parameter lies that is not offloaded; None where there is no such."""
    parameters = getattr(model, "parameters", None)
    found = parameters() if callable(parameters) else ()
    return next((one.device for one in found if isinstance(one, Tensor) and one.device.type != "meta"), None)


def _easy_alphaedit(module: Any, stack: ExitStack, verify: bool) -> None:
    original = module.execute_AlphaEdit
    signature = inspect.signature(original)
    streams = _Streams(verify)

    def execute(*args: Any, **kwargs: Any) -> Any:
        given = signature.bind(*args, **kwargs).arguments
        P, cache = module.P, module.cache_c
        try:
            with streams.solving(P, given["hparams"].L2, cache, given.get("model")) as stands:
                module.P, module.cache_c = stands
                return original(*args, **kwargs)
        finally:
            module.P, module.cache_c = P, cache

    _set(stack, module, "execute_AlphaEdit", _while_open(stack, original, execute))


def _memit(module: Any, stack: ExitStack, verify: bool) -> None:
    original = module.get_cov
    _set(stack, module, "get_cov", _while_open(stack, original, dropin.memit(original, verify=verify)))


def _rlsedit(module: Any, stack: ExitStack, verify: bool) -> None:
    original = module._robust_spd_inverse
    _set(stack, module, "_robust_spd_inverse", _while_open(stack, original, dropin.rls(original, verify=verify)))


_ALPHAEDIT = frozenset(
    {
        patch_forms.solve_form(
            "P[i] @ (layer_ks @ layer_ks.T + cache_c[i]) + hparams.L2 * EYE", "P[i] @ layer_ks @ resid.T"
        )
    }
)
_MEMIT = frozenset({patch_forms.solve_form("hparams.mom2_update_weight * cov + layer_ks @ layer_ks.T", "layer_ks")})
_RLSEDIT = frozenset({"F_t = C_prev @ K_t", "C_t = C_prev - G_t @ G_t.T"})
_HPARAMS = frozenset({"hparams"})
_MEMIT_FUNCTIONS = ("execute_memit", "apply_memit_to_model")
_EASY = "easyeditor.models"
_EASY_TARGETS = (
    _Target(f"{_EASY}.alphaedit.AlphaEdit_main", ("execute_AlphaEdit",), _HPARAMS, _easy_alphaedit, _ALPHAEDIT),
    _Target(f"{_EASY}.memit.memit_main", _MEMIT_FUNCTIONS, _HPARAMS, _memit, _MEMIT),
)
_TARGETS: dict[str, tuple[_Target, ...]] = {
    "alphaedit": (
        _Target(
            "AlphaEdit.AlphaEdit_main",
            ("apply_AlphaEdit_to_model",),
            frozenset({"hparams", "cache_c", "P"}),
            _alphaedit,
            _ALPHAEDIT,
        ),
    ),
    "memit": (_Target("memit.memit_main", _MEMIT_FUNCTIONS, _HPARAMS, _memit, _MEMIT),),
    "rlsedit": (
        _Target(
            "RLSEdit.RLSEdit_main",
            ("apply_RLSEdit_to_model",),
            frozenset({"hparams", "cache_c"}),
            _rlsedit,
            updates=_RLSEDIT,
            marks=("C_prev", "C_t @"),
        ),
    ),
    "easyedit": _EASY_TARGETS,
    "easyedit-alphaedit": _EASY_TARGETS[:1],
    "easyedit-memit": _EASY_TARGETS[1:],
}
