"""Stand-in for the second moment in MEMIT's solve (Meng et al. 2023, eq. 14; also in EasyEdit).

The released code solves solve(weight * cov.double() + K @ K.T, K) with cov = get_cov(..) for each batch and layer, and
multiplies with the residuals afterwards. Here that is the gain of a state that is factored once and never changed.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Collection, Hashable, Iterable
from functools import wraps
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rlsedit_kernels.backends.precision import ieee_products
from rlsedit_kernels.dropin import stand
from rlsedit_kernels.dropin.doubts import Doubts, wide_gram
from rlsedit_kernels.dropin.stand import Held, Stand
from rlsedit_kernels.priors import Prior
from rlsedit_kernels.states import CovarianceState


def memit(get_cov: Callable[..., Tensor], *, verify: bool = False) -> Callable[..., Any]:
    """`get_cov` of MEMIT with its results replaced by stand-ins; those of one layer share a state.

    Args:
        get_cov: called as (model, tok, layer_name, ...); returns E[k k'] (d, d).
        verify: compare the first solve with each second moment with the original one.

    The moment is fetched once per model and layer, and again where another argument differs from the call before, where
    one is a list, a dictionary or a tensor, which may hold something else by now, and for `force_recompute=True`; one
    with the same elements keeps its state. `inv=True` is passed on. A model is known by `config._name_or_path`, as in
    the cache of that code, and by itself where it has no such name.
    """
    stand.require_function("memit: get_cov", get_cov)
    known: dict[Hashable, tuple[list[Hashable] | None, Moment]] = {}
    signature = inspect.signature(get_cov)

    @wraps(get_cov)
    def get(model: Any, tok: Any, layer_name: str, *args: Any, **kwargs: Any) -> Any:
        told = signature.bind(model, tok, layer_name, *args, **kwargs)
        told.apply_defaults()
        named = {**told.arguments, **kwargs}
        if named.get("inv"):
            return get_cov(model, tok, layer_name, *args, **kwargs)
        key = (getattr(getattr(model, "config", None), "_name_or_path", None) or _Same(model), layer_name)
        more = [part for pair in sorted(told.kwargs.items()) for part in pair]
        others = None if named.get("force_recompute") else _frozen((*told.args[3:], *more))
        before, stand = known.get(key, (None, None))
        if stand is None or others is None or others != before:
            fetched = get_cov(model, tok, layer_name, *args, **kwargs)
            if isinstance(fetched, Moment):  # patched twice
                return fetched
            if stand is None or not stand.holds(fetched):
                stand = Moment(fetched, verify=verify)
            known[key] = others, stand
        return stand

    return get


class _Same:
    """A key that is equal for the same object only, and keeps it, so that its address is not used again."""

    def __init__(self, held: object) -> None:
        self.held = held

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and other.held is self.held

    def __hash__(self) -> int:
        return id(self.held)


def _frozen(arguments: Iterable[object]) -> list[Hashable] | None:
    """Arguments to compare with those of a later call, objects by identity; None where one may change in place."""
    found: list[Hashable] = []
    for value in arguments:
        if isinstance(value, (str, int, float, torch.dtype, torch.device, type(None))):
            found.append(value)
        elif isinstance(value, (Tensor, np.ndarray, Collection)):
            return None
        else:
            found.append(_Same(value))
    return found


class Moment(Stand):
    """Stands for E[k k'] (d, d).

    Args:
        moment: (d, d), symmetric positive semi-definite, any floating dtype; it must not be changed in place any more.
        verify: compare the first solve with the original one, of the matrices that it was given.

    A solve returns (d, u) in float64 for float64 keys and in float32 for all others, under `torch.autocast` too. It
    raises ValueError where K K' is not that of the keys on the right, or the moment was changed. Where the moment is
    not positive definite to its rounding (fewer samples than d), the original system is solved, with a RuntimeWarning.
    """

    def __init__(self, moment: Tensor, *, verify: bool = False) -> None:
        stand.check_shape("memit", "the second moment", moment, -1, -1)
        if moment.shape[0] != moment.shape[1] or not moment.is_floating_point():
            got = f"{tuple(moment.shape)} of {moment.dtype}"
            raise ValueError(f"dropin.memit: the second moment must be (d, d) of a floating dtype, got {got}")
        self._moment, self._verify = Held(moment.detach()), verify
        self.like(moment)
        self._states: dict[tuple[float, torch.dtype, torch.device], CovarianceState | None] = {}

    def holds(self, other: Tensor) -> bool:
        """Whether another (d, d) has the elements that this one was made from, and still has."""
        return self._moment.is_same(other)

    def __rmul__(self, weight: object) -> _Weighted:
        if isinstance(weight, bool) or not isinstance(weight, (int, float)):
            raise TypeError(f"dropin.memit: the second moment is multiplied by a number, got {type(weight).__name__}")
        return _Weighted(self, float(weight))

    __mul__ = __rmul__

    def gain(self, weight: float, keys: Tensor, gram: Tensor) -> Tensor:
        """(weight E[k k'] + K K')^-1 K (d, u) for keys (d, u) and K K' (d, d) of one device.

        Raises:
            ValueError: they do not fit, or do not belong together.
        """
        moment = self._moment.read("the second moment")
        stand.check_shape("memit", "the right-hand side K", keys, len(moment), -1)
        stand.check_shape("memit", "K @ K.T", gram, *self.shape)
        stand.check_on("memit", "K @ K.T", gram, keys.device)
        doubts = Doubts()
        doubts.gram(gram, keys)
        dense_gram = wide_gram(gram, keys) if self._verify else None
        key = (weight, keys.dtype, keys.device)
        with ieee_products():
            if key not in self._states:
                self._states[key] = _state(weight, moment, keys)
            state = self._states[key]
            if state is None:
                doubts.settle()
                wide = torch.promote_types(gram.dtype, keys.dtype)
                return torch.linalg.solve(weight * moment.to(keys.device, wide) + gram, keys.to(wide))
            gain = state.gain(keys.T)
            doubts.settle()  # behind the gain, for which a GPU was waited for already
            if dense_gram is not None:
                system = weight * moment.to(keys.device, torch.float64) + dense_gram
                stand.verify(gain, system, keys, "MEMIT")
                self._verify = False
        return gain


def _state(weight: float, moment: Tensor, keys: Tensor) -> CovarianceState | None:
    """The state that starts from weight * moment (d, d) float64 as it is; None where that is not positive definite.

    What the original solves then hangs on the rounding of the moment, and a lifted one has another answer.
    """
    prior = Prior.precision(weight * moment.double())
    try:
        _ = prior.factor
    except ValueError as error:
        warnings.warn(
            f"dropin.memit: batches with this second moment are solved as the original does, at its cost: {error}",
            RuntimeWarning,
            stacklevel=2,
        )
        return None
    dtype = torch.float64 if keys.dtype == torch.float64 else torch.float32
    return CovarianceState(prior, dtype=dtype, device=keys.device)


class _Weighted(Stand):
    """weight * cov."""

    def __init__(self, moment: Moment, weight: float) -> None:
        self.moment, self.weight = moment, weight

    def __add__(self, gram: object) -> _System:
        if not isinstance(gram, Tensor):
            raise TypeError(f"dropin.memit: weight * cov + {type(gram).__name__} is not part of the known solve")
        return _System(self, Held(gram))

    def __radd__(self, gram: object) -> _System:
        return self + gram


_Weighted.handlers = stand.add(lambda gram, weighted: weighted + gram)


class _System(Stand):
    """weight * cov + K @ K.T."""

    def __init__(self, weighted: _Weighted, gram: Held) -> None:
        self.weighted, self.gram = weighted, gram

    def __add__(self, other: object) -> _System:
        raise TypeError("dropin.memit: the system has two terms, weight * cov and K @ K.T; MEMIT keeps no earlier keys")


def _solve(A: object, B: object) -> Tensor:
    if not isinstance(A, _System) or not isinstance(B, Tensor):
        raise TypeError("dropin.memit: the right-hand side of the solve must be the keys (d, u)")
    return A.weighted.moment.gain(A.weighted.weight, B, A.gram.read("K @ K.T"))


_System.handlers = {torch.linalg.solve: _solve}
