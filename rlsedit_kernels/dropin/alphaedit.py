"""Stand-ins for AlphaEdit's P and cache_c (Fang et al. 2025; also in EasyEdit and LangEdit's base).

The released code solves, for layer i with keys K (d, u) and residuals R (v, u),

    solve(P[i] @ (K @ K.T + cache_c[i]) + L2 * eye, P[i] @ K @ R.T)

and then says cache_c[i] += K @ K.T. Here P[i] @ (..) and P[i] @ K @ R.T stay symbols, the solve is gain @ R.T with the
gain of C = P / L2 (docs/mathematics.md, fact 3), and the addition commits the keys.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rlsedit_kernels.dropin import stand
from rlsedit_kernels.dropin.stand import Stand
from rlsedit_kernels.priors import Prior
from rlsedit_kernels.states import CovarianceState


def alphaedit(
    P: Tensor,
    l2: float,
    cache_c: Tensor | None = None,
    *,
    verify: bool = False,
    device: torch.device | str | None = None,
) -> tuple[ProjectorStack, CacheStack]:
    """Stand-ins for `P` and `cache_c`, to be passed on in their places.

    Args:
        P: (layers, d, d) orthogonal projectors on the null spaces.
        l2: > 0, `hparams.L2`.
        cache_c: (layers, d, d) sums of K K' of batches that were written before; None or zeros for none.
        verify: compare the first solve of each layer with the original one; keeps P until then.
        device: where P is factored, once; None for where it lies.

    Raises:
        TypeError, ValueError: P is no stack of projectors, or l2 is not positive.
    """
    if not isinstance(P, Tensor) or P.dim() != 3 or P.shape[1] != P.shape[2]:
        got = tuple(P.shape) if isinstance(P, Tensor) else type(P).__name__
        raise ValueError(f"dropin.alphaedit: P must be a tensor of shape (layers, d, d), got {got}")
    if cache_c is not None and cache_c.shape != P.shape:
        raise ValueError(
            f"dropin.alphaedit: cache_c must have the shape of P, {tuple(P.shape)}, got {tuple(cache_c.shape)}"
        )
    layers = [
        _Layer(i, P[i].to(device or P.device), float(l2), None if cache_c is None else cache_c[i], verify)
        for i in range(P.shape[0])
    ]
    projectors = ProjectorStack(layers, P)
    return projectors, CacheStack(projectors)


class _Layer:
    """State of one layer, made on the device of the first keys."""

    def __init__(self, index: int, P: Tensor, l2: float, past: Tensor | None, verify: bool) -> None:
        self.index, self.l2 = index, l2
        self.shape, self.dtype, self.device = tuple(P.shape), P.dtype, P.device
        self._prior = Prior.null_space(P, l2)
        self._past = None if past is None or not bool(past.any()) else past.detach().clone()
        self._dense = P.detach().clone() if verify else None
        self._state: CovarianceState | None = None
        self._pending: Tensor | None = None

    def solve(self, keys: Tensor, residual: Tensor, gram: Tensor) -> Tensor:
        """The change (d, v) for keys (d, u), R' (u, v), and K K' (d, d)."""
        stand.check_keys(gram, keys)
        state = self._ready(keys)
        update = state.gain(keys.T).to(residual.dtype) @ residual
        if self._dense is not None:
            P = self._dense.to(keys.device, torch.float64)
            past = 0.0 if self._past is None else self._past.to(P)
            eye = torch.eye(len(P), dtype=torch.float64, device=P.device)
            right = P @ keys.double() @ residual.double()
            stand.verify(update, P @ (gram.double() + past) + self.l2 * eye, right, f"layer {self.index}")
            self._dense = self._past = None
        self._pending = keys.detach().clone()
        return update

    def commit(self, gram: Tensor) -> None:
        """Take K K' (d, d) in: that of the keys of the last solve."""
        if self._pending is None:
            raise ValueError("dropin.alphaedit: cache_c may grow by keys that were solved for only, and once")
        stand.check_keys(gram, self._pending)
        assert self._state is not None
        self._state.commit(self._pending.T)
        self._pending = None

    def health(self) -> object:
        """The state's report, None before the first batch."""
        return None if self._state is None else self._state.health()

    def gram(self) -> Tensor:
        """M (d, d) float32 on the CPU for which P M is that of the batches so far: S - P L2."""
        basis = self._prior.arrays["basis"]
        if self._state is None:
            found = torch.zeros(self._prior.d, self._prior.d) if self._past is None else self._past
        else:
            found = self._state.precision() - self.l2 * (basis @ basis.mT).to(self._state.device)
        return found.to("cpu", torch.float32)

    def _ready(self, keys: Tensor) -> CovarianceState:
        if self._state is None:
            dtype = torch.float64 if keys.dtype == torch.float64 else torch.float32
            self._state = CovarianceState(self._prior, dtype=dtype, device=keys.device)
            if self._past is not None:
                self._state.refactor([(stand.rows_of(self._past.to(keys.device)), 1.0)])
            if self._dense is None:
                self._past = None
        return self._state


def _index(key: Any, count: int) -> int:
    first = key[0] if isinstance(key, tuple) else key
    rest = key[1:] if isinstance(key, tuple) else ()
    if not isinstance(first, int) or not -count <= first < count or any(part != slice(None) for part in rest):
        raise TypeError(f"dropin.alphaedit: P and cache_c are taken layer by layer, as in P[i, :, :], got [{key!r}]")
    return first % count


class ProjectorStack(Stand):
    """Stands for P (layers, d, d)."""

    def __init__(self, layers: list[_Layer], P: Tensor) -> None:
        self._layers = layers
        self.like(P)

    def __getitem__(self, key: Any) -> _Projector:
        return _Projector(self._layers[_index(key, len(self._layers))])

    def __setitem__(self, key: Any, value: object) -> None:
        raise TypeError(
            "dropin.alphaedit: P must stay as it was given while a stream goes on, and this code replaces it (LangEdit "
            "does so where it keeps a null space of its own): there C = P / L2 is no longer what the solve means"
        )

    def health(self) -> list[object]:
        """Reports of the states, layer by layer."""
        return [layer.health() for layer in self._layers]


class CacheStack(Stand):
    """Stands for cache_c (layers, d, d)."""

    def __init__(self, partner: ProjectorStack) -> None:
        self.partner = partner
        self.like(partner)

    def __getitem__(self, key: Any) -> _Cache:
        return _Cache(self.partner._layers[_index(key, len(self.partner._layers))])

    def __setitem__(self, key: Any, value: object) -> None:
        layer = self.partner._layers[_index(key, len(self.partner._layers))]
        if not isinstance(value, _Cache) or value.layer is not layer:
            raise TypeError(f"dropin.alphaedit: cache_c[i] may only grow by K @ K.T, got {type(value).__name__}")

    def tensor(self) -> Tensor:
        """A cache (layers, d, d) float32 for the original code to go on with; one dense inversion a layer.

        It is P M P where that code would have M, which the solve cannot tell apart.
        """
        return torch.stack([layer.gram() for layer in self.partner._layers])


class _Projector(Stand):
    """P[i]."""

    def __init__(self, layer: _Layer) -> None:
        self.layer = layer
        self.like(layer)

    def __matmul__(self, other: object) -> _System | _Columns:
        if isinstance(other, _Gram) and other.layer is self.layer:
            return _System(self.layer, other.gram)
        if isinstance(other, Tensor) and other.dim() == 2:
            return _Columns(self.layer, other)
        raise TypeError(f"dropin.alphaedit: P[i] @ {type(other).__name__} is not part of the known solve")


class _Cache(Stand):
    """cache_c[i]."""

    def __init__(self, layer: _Layer) -> None:
        self.layer = layer
        self.like(layer)

    def __add__(self, gram: object) -> _Gram:
        if not isinstance(gram, Tensor):
            raise TypeError(f"dropin.alphaedit: cache_c[i] + {type(gram).__name__} is not part of the known solve")
        return _Gram(self.layer, gram)

    def __radd__(self, gram: object) -> _Gram:
        return self + gram

    def __iadd__(self, gram: Tensor) -> _Cache:  # type: ignore[misc]
        self.layer.commit(gram)
        return self


_Cache.handlers = stand.add(lambda gram, cache, **_: cache + gram)


class _Gram(Stand):
    """K @ K.T + cache_c[i]."""

    def __init__(self, layer: _Layer, gram: Tensor) -> None:
        self.layer, self.gram = layer, gram

    def __rmatmul__(self, _: object) -> object:
        raise TypeError(
            "dropin.alphaedit: a matrix times (K @ K.T + cache_c[i]) where P is no stand-in: outside of the block of "
            "rlsedit.patch give the original code cache_c.tensor()"
        )


class _System(Stand):
    """P[i] @ (K @ K.T + cache_c[i]), and with L2 * eye added."""

    def __init__(self, layer: _Layer, gram: Tensor, complete: bool = False) -> None:
        self.layer, self.gram, self.complete = layer, gram, complete

    def __add__(self, ridge: object) -> _System:
        if self.complete or not isinstance(ridge, Tensor):
            raise TypeError("dropin.alphaedit: the system has one term beside P @ (...): L2 * eye")
        have = float(ridge[0, 0])
        if abs(have - self.layer.l2) > max(1e-6, torch.finfo(ridge.dtype).eps) * self.layer.l2:
            raise ValueError(f"dropin.alphaedit: L2 must be {self.layer.l2:g} as it was given, got {have:g}")
        return _System(self.layer, self.gram, True)

    def __radd__(self, ridge: object) -> _System:
        return self + ridge


class _Columns(Stand):
    """P[i] @ K, and P[i] @ K @ R.T."""

    def __init__(self, layer: _Layer, keys: Tensor, residual: Tensor | None = None) -> None:
        self.layer, self.keys, self.residual = layer, keys, residual

    def __matmul__(self, residual: object) -> _Columns:
        if self.residual is not None or not isinstance(residual, Tensor):
            raise TypeError("dropin.alphaedit: the right-hand side is P[i] @ K @ R.T")
        return _Columns(self.layer, self.keys, residual)


def _solve(system: object, right: object, **_: object) -> Tensor:
    if not isinstance(system, _System) or not isinstance(right, _Columns) or system.layer is not right.layer:
        raise TypeError("dropin.alphaedit: both sides of the solve must be made from P of one layer")
    if not system.complete or right.residual is None:
        raise TypeError("dropin.alphaedit: the solve lacks L2 * eye, or the residuals")
    return system.layer.solve(right.keys, right.residual, system.gram)


_System.handlers = {torch.linalg.solve: _solve, **stand.add(lambda ridge, system, **_: system + ridge)}
_Columns.handlers = {torch.linalg.solve: _solve}
