"""Stand-ins for AlphaEdit's P and cache_c (Fang et al. 2025; also in EasyEdit and LangEdit's base).

The released code solves, for layer i with keys K (d, u) and residuals R (v, u),

    solve(P[i] @ (K @ K.T + cache_c[i]) + L2 * eye, P[i] @ K @ R.T)

and then says cache_c[i] += K @ K.T. Here P[i] @ (..) and P[i] @ K @ R.T stay symbols, the solve is gain @ R.T with the
gain of C = P / L2 (docs/mathematics.md, fact 3), and the addition commits the keys. That is the answer for K @ K.T of
the keys on the right, and for L2 * eye: what is handed over is compared with these (`doubts`).
"""

from __future__ import annotations

import copy
import weakref
from typing import Any

import torch
from torch import Tensor

from rlsedit_kernels.backends.precision import ieee_products
from rlsedit_kernels.dropin import stand
from rlsedit_kernels.dropin.doubts import Doubts, wide_gram
from rlsedit_kernels.dropin.stand import Held, Stand
from rlsedit_kernels.priors import Prior
from rlsedit_kernels.states import CovarianceState
from rlsedit_kernels.states.covariance import Prepared
from rlsedit_kernels.states.modes import version


def alphaedit(
    P: Tensor,
    l2: float,
    cache_c: Tensor | None = None,
    *,
    verify: bool = False,
    device: torch.device | str | None = None,
    grow: bool = False,
    like: ProjectorStack | None = None,
) -> tuple[ProjectorStack, CacheStack]:
    """Stand-ins for `P` and `cache_c`, to be passed on in their places.

    Args:
        P: (layers, d, d) orthogonal projectors on the null spaces, any floating dtype.
        l2: > 0, `hparams.L2`.
        cache_c: (layers, d, d) sums of K K' of batches that were written before, any floating dtype; None or zeros for
            none.
        verify: compare the first solve of each layer with the original one, of the matrices that it was given; keeps P
            until then.
        device: where P is factored, once; None for where it lies.
        grow: add the K K' of every commit to `cache_c` itself too, as the original does, so that whoever keeps it may
            go on with it, save it and compare it.
        like: stand-ins of another stream with this P and this l2, whose factors are used again.

    Raises:
        TypeError, ValueError: P is no stack of projectors, cache_c is not symmetric or is to grow and None, l2 is not
            positive, or `like` has another P or l2. That a cache_c is positive semi-definite is seen, and raised, at
            the first solve.

    A solve returns a change (d, v) in the wider one of the dtypes of R and of the state, which is float64 for float64
    keys and float32 for all others, under `torch.autocast` too. Solve and commit raise ValueError, with nothing
    written, where K @ K.T is not that of the keys or the ridge is not L2 * eye.
    """
    if not isinstance(P, Tensor) or P.dim() != 3 or P.shape[1] != P.shape[2]:
        got = tuple(P.shape) if isinstance(P, Tensor) else type(P).__name__
        raise ValueError(f"dropin.alphaedit: P must be a tensor of shape (layers, d, d), got {got}")
    if cache_c is not None and cache_c.shape != P.shape:
        raise ValueError(
            f"dropin.alphaedit: cache_c must have the shape of P, {tuple(P.shape)}, got {tuple(cache_c.shape)}"
        )
    if cache_c is not None:
        _check_symmetric(cache_c)
    elif grow:
        raise ValueError("dropin.alphaedit: cache_c must be a tensor where it is to grow, got None")
    if like is not None:
        like.check(P)
        if like.l2 != l2:
            raise ValueError(f"dropin.alphaedit: l2 must be that of like, {like.l2}, got {l2}")
    layers = []
    for i in range(P.shape[0]):
        part = P[i].to(device or P.device)
        prior = Prior.null_space(part, float(l2)) if like is None else like.prior(i)
        past = None if cache_c is None else cache_c[i]
        layers.append(_Layer(i, part, prior, past, verify=verify, grow=grow))
    projectors = ProjectorStack(layers, P)
    return projectors, CacheStack(projectors)


def _check_symmetric(cache: Tensor) -> None:
    apart, size = torch.stack([(cache - cache.mT).abs().max(), cache.abs().max()]).tolist()
    if not apart <= max(1e-5, 4.0 * torch.finfo(cache.dtype).eps) * size:
        raise ValueError(
            f"dropin.alphaedit: cache_c must hold sums of K @ K.T, which are symmetric, got elements of size {size:.3g}"
            f" that differ from their mirror image by {apart:.3g}"
        )


class _Layer:
    """State of one layer, made on the device of the first keys."""

    def __init__(self, index: int, P: Tensor, prior: Prior, past: Tensor | None, *, verify: bool, grow: bool) -> None:
        assert prior.l2 is not None
        self.index, self.prior, self.l2 = index, prior, prior.l2
        self.shape, self.dtype, self.device = tuple(P.shape), P.dtype, P.device
        self._grows = past if grow else None
        self._past = None if past is None or not bool(past.any()) else past.detach().clone()
        self._dense = P.detach().clone() if verify else None
        self._state: CovarianceState | None = None
        self._pending: tuple[Tensor, Prepared] | None = None
        self.commits = 0

    def solve(self, system: _System, right: _Columns) -> Tensor:
        """The change (d, v) for the system P (K K' + cache) + L2 I and its right-hand side P K R'."""
        assert right.residual is not None
        gram, keys, residual = system.gram.read("K @ K.T"), right.keys.read("K"), right.residual.read("R")
        if system.commits != self.commits:
            raise ValueError("dropin.alphaedit: keys were added to cache_c between the system and its solve")
        doubts = system.doubts
        doubts.gram(gram, keys)
        dense_gram = None if self._dense is None else wide_gram(gram, keys)
        with ieee_products():
            own = keys.detach().clone()  # the batch may be written after the caller has used its tensor for another
            prepared = self._ready(own).prepare(own.T)
            doubts.settle()  # behind the gain, for which a GPU was waited for already
            wide = torch.promote_types(prepared.gain.dtype, residual.dtype)
            update = prepared.gain.to(wide) @ residual.to(wide)
        if self._dense is not None:
            assert system.ridge is not None
            assert dense_gram is not None
            P = self._dense.to(keys.device, torch.float64)
            past = 0.0 if self._past is None else self._past.to(P)
            with ieee_products():
                dense = P @ (dense_gram + past) + system.ridge.read("the ridge").double()
                stand.verify(update, dense, P @ keys.double() @ residual.double(), f"layer {self.index}")
            self._dense = self._past = None
        self._pending = own, prepared
        return update

    def commit(self, gram: Tensor) -> None:
        """Take K K' (d, d) in: that of the keys of the last solve."""
        if self._pending is None:
            raise ValueError("dropin.alphaedit: cache_c may grow by keys that were solved for only, and once")
        assert self._state is not None
        keys, prepared = self._pending
        doubts = Doubts()
        doubts.gram(gram, keys.to(gram.device), again=True)  # released code adds on the host
        doubts.settle()
        if self._grows is not None:
            self._grows.add_(gram.detach())
        with ieee_products():
            self._state.write(prepared)
        self._pending = None
        self.commits += 1

    def is_kin(self, other: _Layer) -> bool:
        """Whether it is this layer, or a copy of it: P is the same, and the state is that of the cache."""
        return self.prior is other.prior

    def __deepcopy__(self, memo: dict[int, Any]) -> _Layer:
        twin = memo[id(self)] = object.__new__(_Layer)
        twin.__dict__ = dict(self.__dict__)
        twin._state = None if self._state is None else self._state.clone()
        twin._grows = None if self._grows is None else self._grows.clone()
        return twin

    @property
    def basis(self) -> Tensor:
        """Q (d, r) float64 with P = Q Q'."""
        return self.prior.arrays["basis"]

    def health(self) -> object:
        """The state's report, None before the first batch."""
        return None if self._state is None else self._state.health()

    def gram(self) -> Tensor:
        """M (d, d) float32 on the CPU for which P M is that of the batches so far: S - P L2, or the cache that grew."""
        basis = self.basis
        if self._grows is not None:
            found = self._grows
        elif self._state is None:
            found = torch.zeros(self.prior.d, self.prior.d) if self._past is None else self._past
        else:
            with ieee_products():
                found = self._state.precision() - self.l2 * (basis @ basis.mT).to(self._state.device)
        return found.to("cpu", torch.float32)

    def _ready(self, keys: Tensor) -> CovarianceState:
        if self._state is None:
            dtype = torch.float64 if keys.dtype == torch.float64 else torch.float32
            state = CovarianceState(self.prior, dtype=dtype, device=keys.device)
            if self._past is not None:
                state.refactor([(stand.rows_of(self._past.to(keys.device)), 1.0)])
            self._state = state
            if self._dense is None:
                self._past = None
        return self._state


class ProjectorStack(Stand):
    """Stands for P (layers, d, d)."""

    def __init__(self, layers: list[_Layer], P: Tensor) -> None:
        self._layers = layers
        self.l2 = layers[0].l2
        self._given = weakref.ref(P), version(P)
        self.like(P)

    def check(self, P: Tensor) -> None:
        """Refuse another P (layers, d, d) than the one given: free for the same tensor, O(layers d^2) for a copy.

        Raises:
            TypeError, ValueError: it is another one, or was changed in place.
        """
        ref, seen = self._given
        if ref() is P and seen is not None and version(P) == seen:
            return
        stand.check_shape("alphaedit", "P", P, *self.shape)
        doubts, message = Doubts(), "dropin.alphaedit: P must stay as it was given while a stream goes on"
        for layer, now in zip(self._layers, P, strict=True):
            doubts.projector(now, layer.basis, message)
        doubts.settle()

    def prior(self, index: int) -> Prior:
        """The prior P / L2 of a layer."""
        return self._layers[index].prior

    def __deepcopy__(self, memo: dict[int, Any]) -> ProjectorStack:
        twin = memo[id(self)] = object.__new__(ProjectorStack)
        twin.__dict__ = self.__dict__ | {"_layers": copy.deepcopy(self._layers, memo)}
        return twin

    def __getitem__(self, key: Any) -> _Projector:
        return _Projector(self._layers[stand.layer_of("alphaedit", key, len(self._layers))])

    def __setitem__(self, key: Any, value: object) -> None:
        raise TypeError(
            "dropin.alphaedit: P must stay as it was given while a stream goes on, and this code replaces it (LangEdit "
            "does so where it keeps a null space of its own): there C = P / L2 is no longer what the solve means"
        )

    def health(self) -> list[object]:
        """Reports of the states, layer by layer."""
        return [layer.health() for layer in self._layers]

    def __reduce_ex__(self, protocol: Any) -> Any:
        """A file of it has P, to the rounding of its dtype."""
        parts = [(layer.basis @ layer.basis.mT).to("cpu", self.dtype) for layer in self._layers]
        return torch.stack(parts).__reduce_ex__(protocol)


class CacheStack(Stand):
    """Stands for cache_c (layers, d, d). A file of it has `tensor()`."""

    def __init__(self, partner: ProjectorStack) -> None:
        self.partner = partner
        self.like(partner)

    def clone(self) -> CacheStack:
        """An independent copy, with its own states, that goes with the same P."""
        return copy.deepcopy(self)

    def __deepcopy__(self, memo: dict[int, Any]) -> CacheStack:
        return CacheStack(copy.deepcopy(self.partner, memo))

    def __copy__(self) -> CacheStack:
        return CacheStack(self.partner)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.tensor().__reduce_ex__(protocol)

    def __getitem__(self, key: Any) -> _Cache:
        return _Cache(self.partner._layers[stand.layer_of("alphaedit", key, len(self.partner._layers))])

    def __setitem__(self, key: Any, value: object) -> None:
        layer = self.partner._layers[stand.layer_of("alphaedit", key, len(self.partner._layers))]
        if isinstance(value, _Gram) and value.layer is layer and value.commits == layer.commits:
            layer.commit(value.gram.read("K @ K.T"))  # cache_c[i] = cache_c[i] + K @ K.T
        elif not isinstance(value, _Cache) or value.layer is not layer:
            raise TypeError(f"dropin.alphaedit: cache_c[i] may only grow by K @ K.T, got {type(value).__name__}")

    def tensor(self) -> Tensor:
        """A cache (layers, d, d) float32 on the CPU for the original code to go on with; one dense inversion a layer.

        It is P M P where that code would have M, which the solve cannot tell apart. With `grow` it is M, a copy.
        """
        return torch.stack([layer.gram() for layer in self.partner._layers])


class _Projector(Stand):
    """P[i]."""

    def __init__(self, layer: _Layer) -> None:
        self.layer = layer
        self.like(layer)

    def __matmul__(self, other: object) -> _System | _Columns:
        if isinstance(other, _Gram) and other.layer.is_kin(self.layer):
            return _System(other.layer, other.gram, other.commits)
        if isinstance(other, Tensor):
            keys = stand.check_shape("alphaedit", "K", other, self.shape[0], -1)
            return _Columns(self.layer, Held(keys))
        raise TypeError(f"dropin.alphaedit: P[i] @ {type(other).__name__} is not part of the known solve")


class _Cache(Stand):
    """cache_c[i], as it is now; or what a move or a cast made of it, which may be a copy."""

    def __init__(self, layer: _Layer, *, moved: bool = False) -> None:
        self.layer, self.commits, self._is_moved = layer, layer.commits, moved
        self.like(layer)

    def _moved(self) -> _Cache:
        twin = _Cache(self.layer, moved=True)
        twin.commits = self.commits
        return twin

    def __add__(self, gram: object) -> _Gram:
        if not isinstance(gram, Tensor):
            raise TypeError(f"dropin.alphaedit: cache_c[i] + {type(gram).__name__} is not part of the known solve")
        if self.commits != self.layer.commits:
            raise ValueError("dropin.alphaedit: keys were added to cache_c since this cache_c[i] was taken out of it")
        return _Gram(self.layer, Held(stand.check_shape("alphaedit", "K @ K.T", gram, *self.shape)))

    def __radd__(self, gram: object) -> _Gram:
        return self + gram

    def __iadd__(self, gram: object) -> _Cache:  # type: ignore[misc]
        if self._is_moved:
            raise TypeError(
                "dropin.alphaedit: cache_c[i] grows in its place; whether it does when what was moved or cast grows, as"
                " in c = cache_c[i].cuda(); c += .., depends on where it lies"
            )
        self.layer.commit(stand.check_shape("alphaedit", "K @ K.T", gram, *self.shape))
        self.commits = self.layer.commits
        return self


_Cache.handlers = stand.add(lambda gram, cache: cache + gram)


class _Gram(Stand):
    """K @ K.T + cache_c[i]."""

    def __init__(self, layer: _Layer, gram: Held) -> None:
        self.layer, self.gram, self.commits = layer, gram, layer.commits

    def __rmatmul__(self, _: object) -> object:
        raise TypeError(
            "dropin.alphaedit: a matrix times (K @ K.T + cache_c[i]) where P is no stand-in: outside of the block of "
            "rlsedit.patch give the original code cache_c.tensor()"
        )


class _System(Stand):
    """P[i] @ (K @ K.T + cache_c[i]), and with L2 * eye added."""

    def __init__(self, layer: _Layer, gram: Held, commits: int) -> None:
        self.layer, self.gram, self.commits = layer, gram, commits
        self.ridge: Held | None = None
        self.doubts = Doubts()

    def __add__(self, ridge: object) -> _System:
        if self.ridge is not None or not isinstance(ridge, Tensor):
            raise TypeError("dropin.alphaedit: the system has one term beside P @ (...): L2 * eye")
        stand.check_shape("alphaedit", "L2 * eye", ridge, *self.layer.shape)
        found = _System(self.layer, self.gram, self.commits)
        found.ridge = Held(ridge)
        found.doubts.multiple_of_identity("alphaedit", "L2", ridge, self.layer.l2)
        return found

    def __radd__(self, ridge: object) -> _System:
        return self + ridge


class _Columns(Stand):
    """P[i] @ K, and P[i] @ K @ R.T."""

    def __init__(self, layer: _Layer, keys: Held, residual: Held | None = None) -> None:
        self.layer, self.keys, self.residual = layer, keys, residual

    def __matmul__(self, residual: object) -> _Columns:
        if self.residual is not None or not isinstance(residual, Tensor):
            raise TypeError("dropin.alphaedit: the right-hand side is P[i] @ K @ R.T")
        count = self.keys.read("K").shape[1]
        return _Columns(self.layer, self.keys, Held(stand.check_shape("alphaedit", "R.T", residual, count, -1)))


def _solve(A: object, B: object) -> Tensor:
    if not isinstance(A, _System) or not isinstance(B, _Columns) or not A.layer.is_kin(B.layer):
        raise TypeError("dropin.alphaedit: both sides of the solve must be made from P of one layer")
    if A.ridge is None or B.residual is None:
        raise TypeError("dropin.alphaedit: the solve lacks L2 * eye, or the residuals")
    keys = B.keys.read("K")
    for name, held in (("K @ K.T", A.gram), ("L2 * eye", A.ridge), ("R.T", B.residual)):
        stand.check_on("alphaedit", name, held.read(name), keys.device)
    return A.layer.solve(A, B)


_System.handlers = {torch.linalg.solve: _solve, **stand.add(lambda ridge, system: system + ridge)}
_Columns.handlers = {torch.linalg.solve: _solve}
