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
        name: "alphaedit", "memit", "rlsedit" (their released code) or "easyedit" (its AlphaEdit and MEMIT).
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
    modules = tuple(import_module(target.module) for target in targets)
    for target, module in zip(targets, modules, strict=True):
        _check(target, module)
    with ExitStack() as stack:
        for target, module in zip(targets, modules, strict=True):
            target.install(module, stack, verify)
        yield modules


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


class _Caches:
    """Which stand-ins go with a cache that a caller hands over again.

    The original function adds to the tensor itself, so that a caller may ignore what it returns. Such a tensor is
    known again by being the same object, and gets the keys of its batches when the block ends.
    """

    def __init__(self) -> None:
        self._held: list[tuple[weakref.ref[Tensor], int, dropin.CacheStack]] = []

    def find(self, cache: Tensor) -> dropin.CacheStack | None:
        """The stand-in for this tensor; None for one that is new, or was set to zero for another stream.

        Raises:
            ValueError: the tensor was changed otherwise since.
        """
        self._held = [entry for entry in self._held if entry[0]() is not None]
        for i, (ref, version, stand) in enumerate(self._held):
            if ref() is not cache:
                continue
            if cache._version == version:
                return stand
            del self._held[i]
            if bool(cache.any()):
                raise ValueError(
                    "patch: cache_c was changed after batches were written with it; inside of the block pass on what "
                    "apply_AlphaEdit_to_model returns, or set cache_c to zero for another stream"
                )
            break
        return None

    def add(self, cache: Tensor, stand: dropin.CacheStack) -> None:
        """Remember a pair."""
        self._held.append((weakref.ref(cache), cache._version, stand))

    def write_back(self) -> None:
        """Add the keys of the batches to the tensors that are still in use."""
        for ref, version, stand in self._held:
            cache = ref()
            if cache is not None and cache._version == version:
                cache.copy_(stand.tensor())


def _alphaedit(module: Any, stack: ExitStack, verify: bool) -> None:
    original = module.apply_AlphaEdit_to_model
    signature = inspect.signature(original)
    caches = _Caches()

    @wraps(original)
    def apply(*args: Any, **kwargs: Any) -> Any:
        given = signature.bind(*args, **kwargs)
        given.apply_defaults()
        cache, hparams, P = (given.arguments[name] for name in ("cache_c", "hparams", "P"))
        if not isinstance(cache, dropin.CacheStack):
            known = None if cache is None else caches.find(cache)
            if known is None:
                device = _device(given.arguments.get("model"))
                _, known = dropin.alphaedit(P, hparams.L2, cache, verify=verify, device=device)
                if cache is not None:
                    caches.add(cache, known)
            cache = known
        if P is not cache.partner:
            cache.partner.check(P)  # the same tensor as a rule, which costs nothing
        given.arguments["P"], given.arguments["cache_c"] = cache.partner, cache
        return original(*given.args, **given.kwargs)

    stack.callback(caches.write_back)
    _replace_everywhere(stack, original, apply)


def _device(model: Any) -> torch.device | None:
    parameters = getattr(model, "parameters", None)
    first = next(iter(parameters()), None) if callable(parameters) else None
    return first.device if isinstance(first, Tensor) else None


def _easy_alphaedit(module: Any, stack: ExitStack, verify: bool) -> None:
    original = module.execute_AlphaEdit
    signature = inspect.signature(original)
    dense: list[Tensor] = []

    @wraps(original)
    def execute(*args: Any, **kwargs: Any) -> Any:
        given = signature.bind(*args, **kwargs).arguments
        if not isinstance(module.cache_c, dropin.CacheStack):  # the first batch, or one after reset_cache
            P = dense[-1] if isinstance(module.P, dropin.ProjectorStack) else module.P
            module.P, module.cache_c = dropin.alphaedit(
                P, given["hparams"].L2, module.cache_c, verify=verify, device=_device(given.get("model"))
            )
            dense[:] = [P]
        elif not isinstance(module.P, dropin.ProjectorStack):  # made anew in every call where P_loc is no file
            _check_projectors(dense[-1], module.P)
            module.P = module.cache_c.partner
        return original(*args, **kwargs)

    def leave() -> None:
        if isinstance(getattr(module, "P", None), dropin.ProjectorStack):
            module.P = dense[-1]
        if isinstance(getattr(module, "cache_c", None), dropin.CacheStack):
            module.cache_c = module.cache_c.tensor()

    stack.callback(leave)
    _set(stack, module, "execute_AlphaEdit", execute)


def _check_projectors(first: Tensor, now: Tensor) -> None:
    apart = float((now - first).abs().max()) if now.shape == first.shape else float("inf")
    if not apart <= _SAME_PROJECTOR:
        raise ValueError(
            f"patch: EasyEdit made another P for this batch than for the first one (they differ by {apart:.1e}); the "
            "recursion holds for one P: let hparams.P_loc name the file with it, or pass reset_cache=True"
        )


def _memit(module: Any, stack: ExitStack, verify: bool) -> None:
    _set(stack, module, "get_cov", dropin.memit(module.get_cov, verify=verify))


def _rlsedit(module: Any, stack: ExitStack, verify: bool) -> None:
    _set(stack, module, "_robust_spd_inverse", dropin.rls(module._robust_spd_inverse, verify=verify))


_SAME_PROJECTOR = 1e-3
"""Largest difference of an entry between two P of the same second moment that rounding can explain, float32."""

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
    "easyedit": (
        _Target(f"{_EASY}.alphaedit.AlphaEdit_main", ("execute_AlphaEdit",), _HPARAMS, _easy_alphaedit, _ALPHAEDIT),
        _Target(f"{_EASY}.memit.memit_main", _MEMIT_FUNCTIONS, _HPARAMS, _memit, _MEMIT),
    ),
}
