"""Many states of one shape that take their batches together, through the leading dimension of the ops.

Every state stays a `CovarianceState` with its own counters, probes and guard; only the matrix of its form is a view of
one tensor (n, m, m). States that lie side by side and were given batches of alike size are then one call of each op on
a slice of that tensor, without a copy; the others are not touched and keep their bits.

Batches of unlike size share a call: keys are filled up with rows of zeros. That is exact. A key of zeros makes a column
of Y = C K' zero, and a row and a column of G = K Y; noise I + G is then block diagonal with noise in the new places, so
that its factor has sqrt(noise) there and zeros beside it, and the columns of the gain and of Z that belong to such a
key are zero: nothing is added to C, and the leading columns are those of the batch alone. To how many rows a batch is
filled up depends on its own size alone, so that its bits do not depend on the company.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from rlsedit_kernels import ops
from rlsedit_kernels.errors import BreakdownError
from rlsedit_kernels.states import batch as batches
from rlsedit_kernels.states import scaled
from rlsedit_kernels.states.batch import BatchFactor
from rlsedit_kernels.states.covariance import CovarianceState, Prepared
from rlsedit_kernels.states.keys import Keys
from rlsedit_kernels.states.modes import normal_mode
from rlsedit_kernels.states.plain import PlainForm
from rlsedit_kernels.states.products import Change
from rlsedit_kernels.states.whitened import WhitenedForm

__all__ = ["Entry", "Run", "Stack", "naming", "prepare", "rows_of", "unchanged", "write"]

_STEP = {"cpu": 8, "cuda": 16}
_ALIGNMENT = 64


def rows_of(u: int, device: str = "cpu") -> int:
    """Rows to which u keys are filled up: on a CPU 1, 2, 4, then multiples of 8; on a GPU multiples of 16.

    Up to about 40 keys a GPU is waiting for its memory, so that rows cost nothing and one size more is one launch more.
    """
    step = _STEP.get(device, 16)
    return 1 << (u - 1).bit_length() if device == "cpu" and u < step else -(-u // step) * step


class Stack:
    """Room for the matrices of n states of one shape, taken when the first of them is there.

    The first state decides form and dtype of the matrices; a state of another form or dtype keeps a matrix of its own.

    Args:
        n: states.
        shared: for each, whether its prior belongs to others too: these keep one root between them.
    """

    def __init__(self, n: int, shared: Sequence[bool]) -> None:
        self.n = n
        self.matrices: torch.Tensor | None = None
        self.roots: torch.Tensor | None = None
        self._kind: tuple[str, torch.dtype] | None = None
        self._views: list[torch.Tensor] = []
        self._shared = tuple(shared)
        self._of_prior: dict[int, torch.Tensor] = {}
        self._of_place: dict[int, torch.Tensor] = {}

    def adopt(self, i: int, state: CovarianceState) -> None:
        """Make the matrix of the i-th state a view of the stack, where its form has one; values stay what they are."""
        form = state._form
        if not isinstance(form, (PlainForm, WhitenedForm)):
            return
        if isinstance(form, WhitenedForm) and form.matrix is None:
            form._densify()
        matrix = _matrix(form)
        if self._kind is None:
            self._kind = form.name, form.dtype
            self.matrices = matrix.new_empty(self.n, *matrix.shape)
            self._views = list(self.matrices.unbind())
        if self._kind != (form.name, form.dtype):
            return
        if matrix is not self._views[i]:
            self._views[i].copy_(matrix)
            if isinstance(form, PlainForm):
                form.C = self._views[i]
            else:
                form.matrix = self._views[i]
        if isinstance(form, WhitenedForm) and form.root is not None:
            form.root = self._root(i, state, form.root)

    def holds(self, i: int, state: CovarianceState) -> bool:
        """Whether the matrix of the i-th state is the view."""
        return bool(self._views) and _matrix(state._form) is self._views[i]

    def continues(self, i: int, state: CovarianceState, last: CovarianceState) -> bool:
        """Whether the i-th state can be taken together with the one before it."""
        if not (self.holds(i, state) and self.holds(i - 1, last)):
            return False
        root, before = _root_of(state), _root_of(last)
        if root is None or before is None:
            return root is before
        return root is before or not (self._shared[i] or self._shared[i - 1])

    def slice(self, i: int, n: int, first: CovarianceState) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Matrices (n, m, m) and roots (n, d, m) of n states that continue each other, as views; n = 1 for any."""
        root = _root_of(first)
        if not self.holds(i, first):
            return _matrix(first._form)[None], None if root is None else root[None]
        assert self.matrices is not None
        if root is not None:
            at = self._unshared_before(i)
            root = root.expand(n, *root.shape) if self._shared[i] or self.roots is None else self.roots[at : at + n]
        return self.matrices[i : i + n], root

    def _root(self, i: int, state: CovarianceState, root: torch.Tensor) -> torch.Tensor:
        if self._shared[i]:
            return self._of_prior.setdefault(id(state.prior), root)
        if self.roots is None:
            self.roots = root.new_empty(self.n - sum(self._shared), *root.shape)
        if i not in self._of_place:
            self._of_place[i] = self.roots[self._unshared_before(i)].copy_(root)
        return self._of_place[i]

    def _unshared_before(self, i: int) -> int:
        return sum(not shared for shared in self._shared[:i])


@dataclass(frozen=True)
class Entry:
    """A batch for one state: its place, the checked keys (u, d) and their noise."""

    key: Hashable
    state: CovarianceState
    stack: Stack
    place: int
    K: Keys
    noise: float


@dataclass(frozen=True)
class Run:
    """What one call writes: matrices (n, m, m) of states side by side, and the columns (n, m, u) of their change."""

    C: torch.Tensor
    Z: torch.Tensor
    entries: tuple[Entry, ...]
    prepared: tuple[Prepared, ...]


@contextmanager
def naming(key: Hashable) -> Iterator[None]:
    """Errors of a state with the key that they belong to."""
    try:
        yield
    except (ValueError, TypeError, BreakdownError) as error:
        raise type(error)(f"state {key!r}: {error}") from error


def prepare(entries: Sequence[Entry], forget: float) -> tuple[dict[Hashable, Prepared], list[Run]]:
    """All that can fail, for every entry; nothing is written.

    Returns:
        By key what `CovarianceState.write` takes, and the runs: those that are written together. What is in no run
        (an inverse root, a hard write, a batch that needs float64 or other units) is written by itself.

    Raises:
        As `CovarianceState.prepare`, with the key.
    """
    buckets: dict[tuple[object, ...], list[Entry]] = {}
    single: list[Entry] = []
    for entry in entries:
        with naming(entry.key):
            entry.state.look()
            form = entry.state._choose(entry.K, entry.noise)
        entry.stack.adopt(entry.place, entry.state)
        unscaled = not scaled.needed(entry.K.rows.dtype, entry.K.largest, forget * entry.noise)
        if not (unscaled and isinstance(form, (PlainForm, WhitenedForm))):
            single.append(entry)
            continue
        shape = form.name, form.dtype, tuple(_matrix(form).shape), entry.state.d
        buckets.setdefault(
            (id(entry.stack), shape, rows_of(len(entry.K), entry.K.rows.device.type), entry.noise), []
        ).append(entry)
    prepared: dict[Hashable, Prepared] = {}
    runs: list[Run] = []
    with normal_mode():
        for bucket in buckets.values():
            for together in _side_by_side(bucket):
                _run(together, forget, prepared, runs, single)
    for entry in single:
        with naming(entry.key):
            prepared[entry.key] = entry.state.prepare(entry.K, entry.noise, forget)
    return {entry.key: prepared[entry.key] for entry in entries}, runs


def unchanged(entries: Sequence[Entry], prepared: dict[Hashable, Prepared]) -> None:
    """Raises:
    ValueError: a state has changed since its batch was prepared.
    """
    for entry in entries:
        if not entry.state._is_at(prepared[entry.key].moment):
            raise ValueError(f"write: state {entry.key!r} has changed since its batch was prepared; prepare it again")


def write(entries: Sequence[Entry], prepared: dict[Hashable, Prepared], runs: Sequence[Run]) -> None:
    """What `prepare` has prepared."""
    done = set()
    with normal_mode():
        for run in runs:
            for entry in run.entries:
                entry.state._settle()
            ops.downdate_(run.C, run.Z)
            if run.prepared[0].forget != 1.0:
                run.C.mul_(1.0 / run.prepared[0].forget)
                for entry in run.entries:
                    entry.state._bound.changed(entry.state._form, 1.0 / run.prepared[0].forget)
            for entry, one in zip(run.entries, run.prepared, strict=True):
                entry.state._record(one)
                done.add(entry.key)
    for entry in entries:
        if entry.key not in done:
            entry.state.write(prepared[entry.key])


def _matrix(form: object) -> torch.Tensor:
    assert isinstance(form, (PlainForm, WhitenedForm))
    matrix = form.C if isinstance(form, PlainForm) else form.matrix
    assert matrix is not None
    return matrix


def _root_of(state: CovarianceState) -> torch.Tensor | None:
    return state._form.root if isinstance(state._form, WhitenedForm) else None


def _side_by_side(bucket: Sequence[Entry]) -> Iterator[list[Entry]]:
    """Entries that continue each other in their stack; those that are elsewhere one by one."""
    run: list[Entry] = []
    for entry in sorted(bucket, key=lambda entry: entry.place):
        last = run[-1] if run else None
        if last is not None and not entry.stack.continues(entry.place, entry.state, last.state):
            yield run
            run = []
        run.append(entry)
    if run:
        yield run


def _run(
    run: list[Entry], forget: float, prepared: dict[Hashable, Prepared], runs: list[Run], single: list[Entry]
) -> None:
    """Prepare a run; entries that need more than the plain course of things go to `single`."""
    form, noise, dtype = run[0].state._form, forget * run[0].noise, run[0].state.dtype
    assert isinstance(form, (PlainForm, WhitenedForm))
    C, roots = run[0].stack.slice(run[0].place, len(run), run[0].state)
    scale = form.root_scale if isinstance(form, WhitenedForm) else 1.0
    sizes = [len(entry.K) for entry in run]
    K = C.new_zeros(len(run), rows_of(sizes[0], C.device.type), run[0].state.d)
    for i, entry in enumerate(run):
        K[i, : sizes[i]] = entry.K.rows
    inner = K * scale if roots is None else _products(K, roots)
    Y, G = ops.gain_products(C, inner)
    shifted = G.clone()
    shifted.diagonal(dim1=-2, dim2=-1).add_(noise)
    L, info = ops.cholesky(shifted)
    gain, Z, _ = ops.gain_solve(Y, G, noise)
    eye = torch.eye(K.shape[1], dtype=K.dtype, device=K.device)
    root = torch.linalg.solve_triangular(L.mT, eye.expand_as(L), upper=True)
    back = (gain * scale if roots is None else _products(roots, gain)).to(dtype)
    figures = _figures(G, L, info, back, inner, sizes)
    good: list[int] = []
    eps = torch.finfo(form.dtype).eps
    for i, (entry, u) in enumerate(zip(run, sizes, strict=True)):
        finite, largest, pivot, key, size = (float(x) for x in figures[i])
        careful = form.dtype == torch.float32 and 0.5 * eps * largest > batches.CAREFUL_FROM * noise
        if not finite or careful or not pivot >= noise - batches.PIVOT_SLACK * u * eps * largest:
            single.append(entry)
            continue
        if forget != 1.0:
            state = entry.state
            with naming(entry.key):
                state._bound.check_covariance("update", state._form, state._factor, state.dtype, forget)
        factored = BatchFactor(gain[i, :, :u], Change(Z[i, :, :u]), G[i, :u, :u], root[i, :u, :u], pivot / noise, u)
        prepared[entry.key] = Prepared(
            back[i, :, :u].contiguous(), size, factored, key, entry.K, entry.noise, forget, entry.state._moment
        )
        good.append(i)
    while good:
        n = next((j for j in range(1, len(good)) if good[j] != good[0] + j), len(good))
        part = slice(good[0], good[0] + n)
        entries = tuple(run[part])
        runs.append(Run(C[part], Z[part], entries, tuple(prepared[entry.key] for entry in entries)))
        good = good[n:]


def _products(A: torch.Tensor, B: torch.Tensor) -> torch.Tensor:
    """A_i B_i of each of a run.

    On a CPU one by one, from memory that is aligned: products round otherwise in a batch, or at another alignment.
    """
    if A.is_cuda:
        return torch.bmm(A, B)
    return torch.stack([_aligned(a) @ _aligned(b) for a, b in zip(A, B, strict=True)])


def _aligned(A: torch.Tensor) -> torch.Tensor:
    return A if A.data_ptr() % _ALIGNMENT == 0 else A.clone()


def _figures(
    G: torch.Tensor, L: torch.Tensor, info: torch.Tensor, back: torch.Tensor, inner: torch.Tensor, sizes: list[int]
) -> list[list[float]]:
    """Of each of a run, brought over at once: whether all is finite, max G, smallest pivot, largest |k~|^2, |gain|."""
    largest = G.diagonal(dim1=-2, dim2=-1).amax(dim=-1)
    pivots = L.diagonal(dim1=-2, dim2=-1).square()
    filled = torch.arange(L.shape[-1], device=L.device) >= torch.tensor(sizes, device=L.device)[:, None]
    pivot = torch.where(filled, math.inf, pivots).amin(dim=-1)
    size = torch.linalg.vector_norm(back, dim=(1, 2))
    finite = (info == 0) & torch.isfinite(G).flatten(1).all(dim=1) & torch.isfinite(size)
    norm = torch.linalg.vector_norm(inner, dim=2).amax(dim=1).square()
    return torch.stack([row.to(torch.float64) for row in (finite, largest, pivot, norm, size)], dim=1).tolist()
