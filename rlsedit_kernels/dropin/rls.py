"""Stand-ins for the covariances C of the reference code of RLSEdit (arXiv 2601.15686).

That code keeps C (layers, d, d), float32, on the host between batches, and says for layer i with keys K (d, u)

    F = C[i] @ K;  S = eye + K.T @ F;  U = cholesky(S, upper);  G = solve_triangular(U, F, left=False)
    C[i] = C[i] - G @ G.T;  W += (C[i] @ K) @ residual

Here F, S, U and G stay symbols that know which step they are, the assignment commits the keys to a state, and C[i] @ K
is the gain. K.T and eye are compared with what they have to be (`doubts`).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor

from rlsedit_kernels.backends.precision import ieee_products
from rlsedit_kernels.dropin import stand
from rlsedit_kernels.dropin.doubts import Doubts
from rlsedit_kernels.dropin.stand import Held, Stand
from rlsedit_kernels.priors import Prior
from rlsedit_kernels.states import CovarianceState
from rlsedit_kernels.states.covariance import Prepared


def rls(inverse: Callable[..., Tensor], *, verify: bool = False) -> Callable[..., Covariance]:
    """The inverse that gives C_0 = S_0^-1 in that code, with its result replaced by a stand-in.

    Args:
        inverse: called as (matrix, ...); it is not called any more.
        verify: compare the first gain of each layer with a dense solve.

    A matrix that was given before is not factored again: the evaluation script of that code passes no C on, so that
    every batch begins with the same one.
    """
    stand.require_function("rls: inverse", inverse)
    known: list[tuple[Tensor, Prior]] = []

    @wraps(inverse)
    def make(matrix: Tensor, *_: Any, **__: Any) -> Covariance:
        return Covariance(matrix, verify=verify, known=known)

    return make


class Covariance(Stand):
    """Stands for C (d, d) of one layer.

    Args:
        information: S_0 (d, d), any floating dtype, factored in float64 as it is; one that is not positive definite to
            its rounding is lifted and not jittered (`Prior.anchor`).
        verify: compare the first gain with a dense solve of the matrices that were given.
        known: S_0 and priors of others; one with this S_0 is used again, and a new one is added.

    A product of the new covariance with the keys (d, u) of its batch has the dtype of the keys, under `torch.autocast`
    too. It, and the assignment to `C[i]`, raise ValueError with nothing written where another matrix stands in the
    place of K.T or of the identity, or where C got another batch in between.
    """

    def __init__(
        self, information: Tensor, *, verify: bool = False, known: list[tuple[Tensor, Prior]] | None = None
    ) -> None:
        self._prior = _prior(information, [] if known is None else known)
        self._dense = information.detach().clone() if verify else None
        self.like(information)
        self._state: CovarianceState | None = None
        self.commits = 0

    def clone(self) -> Covariance:
        """An independent copy."""
        twin = object.__new__(Covariance)
        twin.__dict__ = dict(self.__dict__)
        twin._state = None if self._state is None else self._state.clone()
        return twin

    def __deepcopy__(self, memo: dict[int, Any]) -> Covariance:
        return self.clone()

    def tensor(self) -> Tensor:
        """C (d, d) in its dtype, on the CPU; a copy."""
        dtype = torch.float64 if self.dtype == torch.float64 else torch.float32
        state = CovarianceState(self._prior, dtype=dtype) if self._state is None else self._state
        return state.covariance().to("cpu", self.dtype)

    def __matmul__(self, keys: object) -> _Pending:
        return _Taken(self) @ keys

    def __sub__(self, change: object) -> _Next:
        return _Taken(self) - change

    def update(self, keys: Tensor) -> Tensor:
        """Commit keys (d, u), any floating dtype; the gain C_new K (d, u), float64 for such keys and float32 else."""
        batch = _Batch(self, keys)
        prepared = self.prepare(batch)
        self.write(batch, prepared)
        return prepared.gain

    def prepare(self, batch: _Batch) -> Prepared:
        """Everything about a batch that can fail; nothing is written."""
        keys = batch.keys.read("K")
        if batch.commits != self.commits:
            raise ValueError("dropin.rls: C has got another batch since the product C @ K of this one")
        with ieee_products():
            if self._state is None:
                dtype = torch.float64 if keys.dtype == torch.float64 else torch.float32
                self._state = CovarianceState(self._prior, dtype=dtype, device=keys.device)
            prepared = self._state.prepare(keys.T)
            batch.doubts.settle()  # behind the gain, for which a GPU was waited for already
            if self._dense is not None:
                system = self._dense.to(keys.device, torch.float64) + batch.added()
                stand.verify(prepared.gain, system, keys, "RLSEdit")
        return prepared

    def write(self, batch: _Batch, prepared: Prepared) -> None:
        """Commit it, unless C has got another batch since."""
        if batch.commits != self.commits:
            raise ValueError("dropin.rls: C has got another batch since the product C @ K of this one")
        assert self._state is not None
        with ieee_products():
            self._state.write(prepared)
        self.commits += 1
        self._dense = None

    def health(self) -> object:
        """The state's report, None before the first batch."""
        return None if self._state is None else self._state.health()


def _prior(information: Tensor, known: list[tuple[Tensor, Prior]]) -> Prior:
    """The prior of S_0 (d, d), factored: out of the list, or new and added to it."""
    prior = Prior.precision(information)
    mine = prior.arrays["S0"]
    for theirs, other in known:
        if theirs.device == mine.device and torch.equal(theirs, mine):
            return other
    try:
        _ = prior.factor
    except ValueError:
        prior = Prior.anchor(information)
    known.append((mine, prior))
    return prior


class _Taken(Stand):
    """C[i] as it was taken out of the stack: behind the next batch it is not what it was."""

    def __init__(self, covariance: Covariance) -> None:
        self.covariance, self.commits = covariance, covariance.commits
        self.like(covariance)

    def __matmul__(self, keys: object) -> _Pending:
        if not isinstance(keys, Tensor):
            raise TypeError(f"dropin.rls: C @ {type(keys).__name__} is not part of the known update")
        if self.commits != self.covariance.commits:
            raise ValueError("dropin.rls: C has got another batch since it was taken out of the stack")
        return _Pending("F", _Batch(self.covariance, stand.check_shape("rls", "K", keys, self.shape[0], -1)))

    def __sub__(self, change: object) -> _Next:
        if not isinstance(change, _Pending) or change.batch.covariance is not self.covariance or change.step != "G G'":
            raise TypeError(f"dropin.rls: C - {_name(change)} is not part of the known update")
        return _Next(change.batch)

    def health(self) -> object:
        """The state's report, None before the first batch."""
        return self.covariance.health()


class _Batch:
    """Keys (d, u) of a batch, and what else was handed over with them."""

    def __init__(self, covariance: Covariance, keys: Tensor) -> None:
        self.covariance, self.commits, self.keys = covariance, covariance.commits, Held(keys)
        self.transposed: Held | None = None
        self.identity: Held | None = None
        self.doubts = Doubts()

    def added(self) -> Tensor:
        """K E^-1 K' (d, d) float64 of the E and K' that were handed over: what the update adds to C^-1."""
        keys = self.keys.read("K").double()
        right = keys.T if self.transposed is None else self.transposed.read("K.T").double()
        if self.identity is None:
            return keys @ right
        return keys @ torch.linalg.solve(self.identity.read("eye").double(), right)


_TRANSPOSED = {"F": "F'", "F'": "F", "G": "G'", "G'": "G", "U": "L", "L": "U"}
"""Steps by their transpose; the others are symmetric."""


class _Pending(Stand):
    """A step between C @ K and C - G @ G.T: F, K'F, S, its factor U (U'U = S) or L = U', G, or G G'."""

    def __init__(self, step: str, batch: _Batch) -> None:
        self.step, self.batch = step, batch

    def __matmul__(self, other: object) -> _Pending:
        if not isinstance(other, _Pending) or other.batch is not self.batch or (self.step, other.step) != ("G", "G'"):
            raise TypeError(f"dropin.rls: {_name(self)} @ {_name(other)} is not part of the known update")
        return _Pending("G G'", self.batch)

    @property
    def T(self) -> _Pending:
        """The transpose."""
        return _Pending(_TRANSPOSED.get(self.step, self.step), self.batch)

    mT = T


def _name(symbol: object) -> str:
    return symbol.step if isinstance(symbol, _Pending) else type(symbol).__name__


def _gram(left: object, right: object) -> _Pending:
    if not isinstance(left, Tensor) or not isinstance(right, _Pending) or right.step != "F":
        raise TypeError(f"dropin.rls: {_name(left)} @ {_name(right)} is not part of the known update")
    batch = right.batch
    keys = batch.keys.read("K")
    stand.check_shape("rls", "K.T", left, *keys.T.shape)
    stand.check_on("rls", "K.T", left, keys.device)
    batch.doubts.equal("rls", "K.T", left, keys.T)
    batch.transposed = Held(left)
    return _Pending("K'F", batch)


def _sum(one: object, other: object) -> _Pending:
    gram, eye = (one, other) if isinstance(one, _Pending) else (other, one)
    if not isinstance(gram, _Pending) or gram.step != "K'F" or not isinstance(eye, Tensor):
        raise TypeError(f"dropin.rls: {_name(one)} + {_name(other)} is not part of the known update")
    batch = gram.batch
    keys = batch.keys.read("K")
    stand.check_shape("rls", "eye", eye, keys.shape[1], keys.shape[1])
    stand.check_on("rls", "eye", eye, keys.device)
    batch.doubts.multiple_of_identity("rls", "what is added to K' C K", eye, 1.0)
    batch.identity = Held(eye)
    return _Pending("S", batch)


def _cholesky(system: object, upper: bool = False) -> _Pending:
    if not isinstance(system, _Pending) or system.step != "S":
        raise TypeError(f"dropin.rls: the factor of {_name(system)} is not part of the known update")
    return _Pending("U" if upper else "L", system.batch)


def _solve_triangular(factor: object, F: object, *, upper: bool, left: bool = True) -> _Pending:
    known = isinstance(factor, _Pending) and isinstance(F, _Pending) and factor.batch is F.batch
    if not known or (_name(factor), _name(F), upper, left) not in _GAINS:
        raise TypeError(
            f"dropin.rls: solve_triangular({_name(factor)}, {_name(F)}, upper={upper}, left={left}) is not part of the "
            "known update"
        )
    assert isinstance(F, _Pending)
    return _Pending("G" if F.step == "F" else "G'", F.batch)


_GAINS = {("U", "F", True, False), ("L", "F'", False, True)}
"""F U^-1, and its transpose."""

_Pending.handlers = {
    **stand.matmul(_gram),
    **stand.add(_sum),
    torch.linalg.cholesky: _cholesky,
    torch.linalg.solve_triangular: _solve_triangular,
}


class _Next(Stand):
    """C - G @ G.T: the covariance after the batch. Multiplied it gives the gain; stored, it becomes C."""

    def __init__(self, batch: _Batch) -> None:
        self.batch = batch
        self._prepared: Prepared | None = None
        self._is_stored = False

    def _gain(self) -> Prepared:
        if self._prepared is None:
            self._prepared = self.batch.covariance.prepare(self.batch)
        return self._prepared

    def store(self) -> None:
        """Commit the batch, once."""
        if not self._is_stored:
            self.batch.covariance.write(self.batch, self._gain())
            self._is_stored = True

    def __matmul__(self, keys: object) -> Tensor:
        """C_new K (d, u)."""
        own = self.batch.keys.read("K")
        if not isinstance(keys, Tensor) or keys.shape != own.shape:
            raise TypeError("dropin.rls: the new C is multiplied by the keys of its batch")
        stand.check_on("rls", "K", keys, own.device)
        doubts = Doubts()
        doubts.equal("rls", "K of the new C @ K", keys, own)
        gain = self._gain().gain
        doubts.settle()
        return gain.to(keys.dtype)


class CovarianceStack(Stand):
    """Stands for C (layers, d, d)."""

    def __init__(self, parts: list[Covariance]) -> None:
        self.parts = parts
        self.like(parts[0])
        self.shape = (len(parts), *parts[0].shape)

    def clone(self) -> CovarianceStack:
        """An independent copy, so that a batch that fails leaves the one that went in as it was."""
        return CovarianceStack([part.clone() for part in self.parts])

    def tensor(self) -> Tensor:
        """C (layers, d, d) in its dtype, on the CPU; a copy. A file of the stand-in has it too."""
        return torch.stack([part.tensor() for part in self.parts])

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.tensor().__reduce_ex__(protocol)

    def __deepcopy__(self, memo: dict[int, Any]) -> CovarianceStack:
        return self.clone()

    def __copy__(self) -> CovarianceStack:
        return CovarianceStack(self.parts)

    def __getitem__(self, key: Any) -> _Taken:
        return _Taken(self.parts[stand.layer_of("rls", key, len(self.parts))])

    def __setitem__(self, key: Any, value: object) -> None:
        part = self.parts[stand.layer_of("rls", key, len(self.parts))]
        if not isinstance(value, _Next) or value.batch.covariance is not part:
            raise TypeError(f"dropin.rls: C[i] becomes what its own update gives, got {type(value).__name__}")
        value.store()


def _stack(parts: list[Covariance], dim: int = 0) -> CovarianceStack:
    if dim != 0:
        raise TypeError(f"dropin.rls: covariances are stacked along dimension 0, got {dim}")
    return CovarianceStack(list(parts))


Covariance.handlers = {torch.stack: _stack}
