"""Stand-ins for the covariances C of the reference code of RLSEdit (arXiv 2601.15686).

That code keeps C (layers, d, d), float32, on the host between batches, and says for layer i with keys K (d, u)

    F = C[i] @ K;  S = eye + K.T @ F;  U = cholesky(S, upper);  G = solve_triangular(U, F, left=False)
    C[i] = C[i] - G @ G.T;  W += (C[i] @ K) @ residual

Here F, S, U and G stay symbols, the assignment commits the keys to a state, and C[i] @ K is the gain.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor

from rlsedit_kernels.dropin import stand
from rlsedit_kernels.dropin.alphaedit import _index
from rlsedit_kernels.dropin.stand import Stand
from rlsedit_kernels.priors import Prior
from rlsedit_kernels.states import CovarianceState


def rls(inverse: Callable[..., Tensor], *, verify: bool = False) -> Callable[..., Covariance]:
    """The inverse that gives C_0 = S_0^-1 in that code, with its result replaced by a stand-in.

    Args:
        inverse: called as (matrix, ...); it is not called any more.
        verify: compare the first gain of each layer with a dense solve.

    A matrix that was given before is not factored again: the evaluation script of that code passes no C on, so that
    every batch begins with the same one.
    """

    known: list[Prior] = []

    @wraps(inverse)
    def make(matrix: Tensor, *_: Any, **__: Any) -> Covariance:
        made = Covariance(matrix, verify=verify)
        made.share(known)
        return made

    return make


class Covariance(Stand):
    """Stands for C (d, d) of one layer.

    Args:
        information: S_0 (d, d); a singular one is lifted and not jittered (`Prior.anchor`).
        verify: compare the first gain with a dense solve.
    """

    def __init__(self, information: Tensor, *, verify: bool = False) -> None:
        self._prior = Prior.anchor(information)
        self._dense = information.detach().clone() if verify else None
        self.like(information)
        self._state: CovarianceState | None = None

    def share(self, known: list[Prior]) -> None:
        """Take the prior with the same S_0 out of a list, factored or not; or add this one to it."""
        mine = self._prior.arrays["second_moment"]
        for other in known:
            theirs = other.arrays["second_moment"]
            if theirs.device == mine.device and torch.equal(theirs, mine):
                self._prior = other
                return
        known.append(self._prior)

    def clone(self) -> Covariance:
        """An independent copy."""
        twin = object.__new__(Covariance)
        twin.__dict__ = dict(self.__dict__)
        twin._state = None if self._state is None else self._state.clone()
        return twin

    def __matmul__(self, keys: object) -> _Pending:
        if not isinstance(keys, Tensor) or keys.dim() != 2:
            raise TypeError(f"dropin.rls: C @ {type(keys).__name__} is not part of the known update")
        return _Pending(self, keys)

    def __sub__(self, change: object) -> _Next:
        if not isinstance(change, _Pending) or change.covariance is not self:
            raise TypeError(f"dropin.rls: C - {type(change).__name__} is not part of the known update")
        return _Next(self, change.keys)

    def update(self, keys: Tensor) -> Tensor:
        """Commit keys (d, u); the gain C_new K (d, u)."""
        if self._state is None:
            dtype = torch.float64 if keys.dtype == torch.float64 else torch.float32
            self._state = CovarianceState(self._prior, dtype=dtype, device=keys.device)
        if self._dense is None:
            return self._state.update(keys.T)
        prepared = self._state.prepare(keys.T)
        system = self._dense.to(keys.device, torch.float64) + keys.double() @ keys.double().T
        stand.verify(prepared.gain, system, keys, "RLSEdit")
        self._state.write(prepared)
        self._dense = None
        return prepared.gain

    def health(self) -> object:
        """The state's report, None before the first batch."""
        return None if self._state is None else self._state.health()


class _Pending(Stand):
    """What stands between C @ K and C - G @ G.T: F, S, its factor, G, G.T and their product."""

    def __init__(self, covariance: Covariance, keys: Tensor) -> None:
        self.covariance, self.keys = covariance, keys

    def __matmul__(self, other: object) -> _Pending:
        if not isinstance(other, _Pending) or other.covariance is not self.covariance:
            raise TypeError(f"dropin.rls: a product with {type(other).__name__} is not part of the known update")
        return self

    @property
    def T(self) -> _Pending:
        """The transpose."""
        return self


def _same(*args: Any, **_: Any) -> Any:
    return next(arg for arg in args if isinstance(arg, _Pending))


_Pending.handlers = {
    **stand.matmul(_same),
    **stand.add(_same),
    torch.linalg.cholesky: _same,
    torch.linalg.solve_triangular: _same,
}


class _Next(Stand):
    """C - G @ G.T: the covariance after the batch, which becomes so when it is stored or multiplied."""

    def __init__(self, covariance: Covariance, keys: Tensor) -> None:
        self.covariance, self.keys = covariance, keys
        self._gain: Tensor | None = None

    def gain(self) -> Tensor:
        """C_new K (d, u); the first call commits."""
        if self._gain is None:
            self._gain = self.covariance.update(self.keys)
        return self._gain

    def __matmul__(self, keys: object) -> Tensor:
        if not isinstance(keys, Tensor) or keys.shape != self.keys.shape or not torch.equal(keys, self.keys):
            raise TypeError("dropin.rls: the new C is multiplied by the keys of its batch")
        return self.gain().to(keys.dtype)


class CovarianceStack(Stand):
    """Stands for C (layers, d, d)."""

    def __init__(self, parts: list[Covariance]) -> None:
        self.parts = parts
        self.like(parts[0])
        self.shape = (len(parts), *parts[0].shape)

    def clone(self) -> CovarianceStack:
        """An independent copy, so that a batch that fails leaves the one that went in as it was."""
        return CovarianceStack([part.clone() for part in self.parts])

    def __getitem__(self, key: Any) -> Covariance:
        return self.parts[_index(key, len(self.parts))]

    def __setitem__(self, key: Any, value: object) -> None:
        part = self.parts[_index(key, len(self.parts))]
        if not isinstance(value, _Next) or value.covariance is not part:
            raise TypeError(f"dropin.rls: C[i] becomes what its own update gives, got {type(value).__name__}")
        value.gain()


def _stack(parts: list[Covariance], dim: int = 0) -> CovarianceStack:
    if dim != 0:
        raise TypeError(f"dropin.rls: covariances are stacked along dimension 0, got {dim}")
    return CovarianceStack(list(parts))


Covariance.handlers = {torch.stack: _stack}
