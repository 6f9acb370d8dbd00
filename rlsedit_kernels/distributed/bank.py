"""StateBank: the states of many layers or experts, each whole on one rank, updated together where they are alike."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch.distributed.device_mesh import DeviceMesh

from rlsedit_kernels.distributed import bank_stack
from rlsedit_kernels.distributed.agreement import digest, digest_of_text
from rlsedit_kernels.distributed.bank_stack import Entry, Run, Stack, naming, unchanged
from rlsedit_kernels.distributed.placement import Placement, place
from rlsedit_kernels.distributed.ranks import Ranks
from rlsedit_kernels.distributed.volume import confirm_bytes
from rlsedit_kernels.ops import _checks
from rlsedit_kernels.priors import Prior
from rlsedit_kernels.states.covariance import CovarianceState
from rlsedit_kernels.states.forms import FORMS
from rlsedit_kernels.states.health import Health
from rlsedit_kernels.states.keys import located, shaped_keys
from rlsedit_kernels.states.modes import normal_mode
from rlsedit_kernels.states.prepared import Prepared

__all__ = ["PreparedBatches", "StateBank"]

Key = TypeVar("Key", bound=Hashable)
Batches = Mapping[Any, tuple[torch.Tensor | None, float]]

VERSION = 1


@dataclass(frozen=True)
class PreparedBatches:
    """Batches of which all that can fail has been computed on every rank, and nothing written on any.

    Attributes:
        gains: (d, u) of the states that this rank keeps, by key.
        sizes: u of every batch, by key, on all ranks.
        states: what `CovarianceState.prepare` gives, by key.
    """

    gains: dict[Any, torch.Tensor]
    sizes: dict[Any, int]
    states: dict[Any, Prepared]
    entries: tuple[Entry, ...]
    runs: tuple[Run, ...]


class StateBank:
    """States of many layers or experts, placed on ranks by size, updated in one call for all that a batch touches.

    Each state lives whole on one rank (`placement`), so an update sends nothing but a few numbers by which the ranks
    check that they are doing the same. States of one shape on a rank lie in one tensor; those that are touched and lie
    side by side are updated through the leading dimension of the ops, the others keep their bits.

    All ranks call the same methods in the same order and name the same states; keys K are needed on the rank that
    keeps the state alone (None elsewhere), and are compared where several ranks have them.

    Args:
        priors: by key (any hashable with a text of its own: a layer, a pair (layer, expert)), the same on all ranks,
            in the same order; states that share a `Prior` object share its factor.
        ranks: processes that share the states, or their one-dimensional mesh; None for this process alone, without
            torch.distributed.
        form, dtype, guard: as for `CovarianceState`, for every state. "plain" and "whitened" are batched, the latter
            always as a matrix; "auto" chooses for each state at its first batch, and an inverse root is updated by
            itself.
        device: where the states live; None for that of the ranks, or the CPU.
        history: gives the pairs (K, noise) of all batches of a state, by its key.
        work: by key, what is to be balanced; None for the bytes.
        memory: bytes that a rank has for states; None for no limit.

    Attributes:
        placement: which rank keeps which state.
        keys: of all states, in order.

    Raises:
        TypeError, ValueError: wrong arguments, a prior that is not positive definite, or a state that no rank can keep
            whole (`ShardedCovarianceState` can).
    """

    @normal_mode()
    def __init__(
        self,
        priors: Mapping[Key, Prior],
        ranks: Ranks | DeviceMesh | None = None,
        *,
        form: str = "auto",
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
        guard: str = "auto",
        history: Callable[[Key], Iterable[tuple[torch.Tensor, float]]] | None = None,
        work: Mapping[Key, float] | None = None,
        memory: float | None = None,
    ) -> None:
        self._ranks = Ranks(ranks) if isinstance(ranks, DeviceMesh) else ranks
        self.dtype = dtype
        self.device = located(device or (self._ranks.device if self._ranks is not None else "cpu"))
        with self._confirmed("StateBank") as agreed:
            self.keys: tuple[Any, ...] = tuple(priors)
            self._check(priors, form, dtype, work)
            self.placement = self._placed(priors, work, memory)
            agreed["states"] = digest_of_text(self._description(priors, form))
        self._position = {key: i for i, key in enumerate(self.keys)}
        self._dims = tuple(prior.d for prior in priors.values())
        self._calls = 0
        with self._confirmed("StateBank"):
            self._states: dict[Any, CovarianceState] = {}
            for i in self.placement.of(self.rank):
                key = self.keys[i]
                of_key = None if history is None else _history(history, key)
                with naming(key):
                    self._states[key] = CovarianceState(
                        priors[key], form=form, dtype=dtype, device=self.device, guard=guard, history=of_key
                    )
            self._places = self._stacked()
            for key, state in self._states.items():
                self._adopt(key, state)

    @property
    def rank(self) -> int:
        """Of this process."""
        return 0 if self._ranks is None else self._ranks.rank

    def owner(self, key: Hashable) -> int:
        """The rank that keeps a state."""
        owner = self.placement.owners[self._at("owner", key)]
        assert owner is not None
        return owner

    def state(self, key: Hashable) -> CovarianceState | None:
        """The state on the rank that keeps it, None on the others; ask again after `remove` and `load_state_dict`."""
        self._at("state", key)
        return self._states.get(key)

    def update(self, batches: Batches, forget: float = 1.0, *, gather: bool = False) -> dict[Any, torch.Tensor]:
        """Write a batch into each of the states named, on all ranks or on none.

        Args:
            batches: by key, keys K (u, d) and noise >= 0 as for `CovarianceState.update`; u may differ. The states
                named must be the same on all ranks; K may be None where the state is not kept.
            forget: forgetting factor in (0, 1] of the states named.
            gather: give the gains to all ranks: u d numbers of each state are broadcast by its owner.

        Returns:
            Gains (d, u) by key: of the states that this rank keeps, or of all with `gather`.

        Raises:
            TypeError, ValueError, BreakdownError: as `CovarianceState.update`, with the key, on the rank that found it.
            ValueError: ranks differ in the states named, u, noise, forget or K.
            RankError: on the other ranks. Nothing was written on any of them.
        """
        prepared = self._prepared("update", batches, forget, gather)
        gains = self._everywhere(prepared) if gather else prepared.gains
        self.write(prepared)
        return gains

    def commit(self, batches: Batches, forget: float = 1.0) -> None:
        """`update` without its gains."""
        self.update(batches, forget)

    def gain(self, batches: Batches, *, gather: bool = False) -> dict[Any, torch.Tensor]:
        """Gains of batches, nothing changed; arguments, returns and errors as for `update`."""
        prepared = self._prepared("gain", batches, 1.0, gather)
        return self._everywhere(prepared) if gather else prepared.gains

    def prepare(self, batches: Batches, forget: float = 1.0) -> PreparedBatches:
        """First half of `update`: everything that can fail on any rank, nothing written.

        Raises:
            As `update`.
        """
        return self._prepared("update", batches, forget, False)

    @normal_mode()
    def _prepared(self, op: str, batches: Batches, forget: float, gather: bool) -> PreparedBatches:
        with contextlib.ExitStack() as unmoved:
            with self._confirmed(op) as agreed:
                forget = _checks.forget(op, forget)
                noises = self._noises(op, batches)
                agreed.update(self._header(noises, gather), forget=forget)
                entries = self._entries(op, batches, noises)
                for entry in entries:
                    unmoved.enter_context(entry.state._unmoved_by_errors(blamed=False))
                states, runs = bank_stack.prepare(entries, forget)
            sizes = self._compared(op, batches, noises)
        return PreparedBatches(
            {key: one.gain for key, one in states.items()}, sizes, states, tuple(entries), tuple(runs)
        )

    @normal_mode()
    def write(self, prepared: PreparedBatches) -> None:
        """Second half of `update`; nothing is sent.

        Raises:
            ValueError: a state has changed since `prepare`.
        """
        unchanged(prepared.entries, prepared.states)
        with contextlib.nullcontext() if self._ranks is None else self._ranks.guarded("update"):
            bank_stack.write(prepared.entries, prepared.states, prepared.runs)
        self._calls += 1

    @normal_mode()
    def remove(
        self,
        batches: Batches,
        *,
        remaining: Mapping[Any, Iterable[tuple[torch.Tensor, float]]] | None = None,
        gather: bool = False,
    ) -> dict[Any, torch.Tensor]:
        """Take back a batch from each of the states named, on all ranks or on none.

        The states named are copied first: room for them once more is needed.

        Args:
            batches: as for `update`, with the noise > 0 that each was written with.
            remaining: by key, as for `CovarianceState.remove`.
            gather: as for `update`.

        Returns:
            As `update`, the gains of `CovarianceState.remove`.

        Raises:
            As `update`, and LeverageError.
        """
        with self._confirmed("remove") as agreed:
            noises = self._noises("remove", batches)
            agreed.update(self._header(noises, gather))
            twins: dict[Any, CovarianceState] = {}
            gains: dict[Any, torch.Tensor] = {}
            for entry in self._entries("remove", batches, noises):
                twin = twins[entry.key] = entry.state.clone()
                twin.history = entry.state.history
                stay = None if remaining is None else remaining.get(entry.key)
                with naming(entry.key):
                    gains[entry.key] = twin.remove(entry.K, entry.noise, remaining=stay)
        sizes = self._compared("remove", batches, noises)
        found = self._everywhere(PreparedBatches(gains, sizes, {}, (), ())) if gather else gains
        self._replace(twins)
        return found

    def named(self) -> dict[str, CovarianceState]:
        """The states of this rank by name ("3.17" for the key (3, 17)), as `distributed.checkpoint` takes them.

        A checkpoint that was written at one number of ranks can be loaded into the states of another.
        """
        return {name_of(key): state for key, state in self._states.items()}

    def covariance(self, key: Hashable) -> torch.Tensor | None:
        """C (d, d) of a state, a copy, on the rank that keeps it; None on the others: nothing is sent."""
        state = self.state(key)
        return None if state is None else state.covariance()

    def health(self, key: Hashable, *, thorough: bool = False) -> Health | None:
        """`CovarianceState.health` on the rank that keeps a state; None on the others: nothing is sent."""
        state = self.state(key)
        return None if state is None else state.health(thorough=thorough)

    def state_dict(self) -> dict[str, object]:
        """The states of this rank by name, each as `CovarianceState.state_dict` gives it, tensors copied.

        The union over the ranks can be loaded at any number of ranks.
        """
        return {"version": VERSION, "states": {name: state.state_dict() for name, state in self.named().items()}}

    @normal_mode()
    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Restore every state to the bit, on all ranks or on none.

        Args:
            saved: what `state_dict` gave; states of other ranks in it are passed over, so that the union of all ranks
                serves each of them.

        Raises:
            ValueError: a state of this rank is missing, or does not fit its prior and dtype.
            RankError: on the other ranks. Nothing was changed on any of them.
        """
        with self._confirmed("load_state_dict"):
            states = saved.get("states") if isinstance(saved, Mapping) else None
            if not isinstance(states, Mapping) or saved.get("version") != VERSION:
                raise ValueError(f"load_state_dict: saved must be the state_dict of a StateBank, version {VERSION}")
            missing = [name_of(key) for key in self._states if name_of(key) not in states]
            if missing:
                raise ValueError(f"load_state_dict: the saved states lack {', '.join(missing[:8])}")
            twins = {}
            for key, state in self._states.items():
                twin = twins[key] = copy.copy(state)  # what is loaded takes the place of all that changes
                twin._watch = state._watch.copy(state.history)
                with naming(key):
                    twin.load_state_dict(states[name_of(key)])
        self._replace(twins)

    def nbytes(self) -> int:
        """Bytes of the matrices and roots of this rank's states; what states share is counted once."""
        kept = [x for stack, _ in self._places.values() for x in (stack.matrices, stack.roots) if x is not None]
        for state in self._states.values():
            form = state._form
            kept.extend(value for value in ([] if form is None else vars(form).values())
                        if isinstance(value, torch.Tensor))  # fmt: skip
        storages = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in kept}
        return sum(storages.values())

    def update_bytes(self, sizes: Mapping[Any, int], *, gather: bool = False) -> int:
        """Bytes that this rank receives in one `update`; `volume.Received` counts them.

        With P ranks and n states named 16 (P - 1) n for u and a digest of each, 8 (P - 1) for each number that must
        agree, and with `gather` s d u for each state of another rank, s bytes a number.

        Args:
            sizes: u of the batch of every state named.
            gather: as for `update`.
        """
        ranks = self.placement.ranks
        total = confirm_bytes(ranks) + (ranks - 1) * 16 * len(sizes)
        if gather and ranks > 1:
            others = [key for key in sizes if self.owner(key) != self.rank]
            total += sum(self._dims[self._position[key]] * sizes[key] for key in others) * self.dtype.itemsize
        return total

    def __repr__(self) -> str:
        return (
            f"StateBank({len(self.keys)} states, {len(self._states)} of them on rank {self.rank} of "
            f"{self.placement.ranks}, dtype={self.dtype}, device={str(self.device)!r})"
        )

    def _check(
        self, priors: Mapping[Any, Prior], form: str, dtype: torch.dtype, work: Mapping[Any, float] | None
    ) -> None:
        if not priors:
            raise ValueError("StateBank: priors must have at least one state, got none")
        for key, prior in priors.items():
            if not isinstance(prior, Prior):
                raise TypeError(f"StateBank: priors[{key!r}] must be a Prior, got {type(prior).__name__}")
        names: dict[str, Any] = {}
        for key in priors:
            if names.setdefault(name_of(key), key) != key:
                raise ValueError(f"StateBank: keys {key!r} and {names[name_of(key)]!r} have the same name")
        if form not in FORMS:
            raise ValueError(f"StateBank: form must be one of {', '.join(map(repr, FORMS))}, got {form!r}")
        if dtype not in _checks.DTYPES:
            raise TypeError(f"StateBank: dtype must be torch.float32 or torch.float64, got {dtype}")
        if work is not None and set(work) != set(priors):
            raise ValueError("StateBank: work must have an entry for every state")

    def _placed(self, priors: Mapping[Any, Prior], work: Mapping[Any, float] | None, memory: float | None) -> Placement:
        shapes = [_shape(priors[key]) for key in self.keys]
        found = place(
            [float(rank * rank * self.dtype.itemsize) for _, rank in shapes],
            1 if self._ranks is None else self._ranks.size,
            work=None if work is None else [work[key] for key in self.keys],
            groups=shapes,
            memory=memory,
        )
        if found.sharded:
            names = ", ".join(name_of(self.keys[i]) for i in found.sharded[:8])
            raise ValueError(
                f"StateBank: no rank can keep {names} whole within memory = {memory} bytes: use "
                "ShardedCovarianceState for them, or more memory"
            )
        return found

    def _description(self, priors: Mapping[Any, Prior], form: str) -> str:
        rows = [(name_of(key), p.kind, p.d, p.lam, p.mu, p.l2) for key, p in priors.items()]
        return repr((form, str(self.dtype), self.placement.owners, rows))

    def _stacked(self) -> dict[Any, tuple[Stack, int]]:
        """A stack for the states of each shape, and their places in it."""
        shapes: dict[tuple[int, int], list[Any]] = {}
        for key, state in self._states.items():
            shapes.setdefault(_shape(state.prior), []).append(key)
        places = {}
        for keys in shapes.values():
            owners = [id(self._states[key].prior) for key in keys]
            stack = Stack(len(keys), [owners.count(owner) > 1 for owner in owners])
            places.update({key: (stack, i) for i, key in enumerate(keys)})
        return places

    def _adopt(self, key: Any, state: CovarianceState) -> None:
        stack, i = self._places[key]
        stack.adopt(i, state)

    def _replace(self, twins: Mapping[Any, CovarianceState]) -> None:
        for key, twin in twins.items():
            self._states[key]._writes += 1  # what was prepared before is void
            self._states[key] = twin
            self._adopt(key, twin)
        self._calls += 1

    def _at(self, op: str, key: Hashable) -> int:
        position = self._position.get(key)
        if position is None:
            raise ValueError(f"{op}: there is no state {key!r} among the {len(self.keys)} of this bank")
        return position

    def _noises(self, op: str, batches: Batches) -> dict[Any, float]:
        """Noise of each batch, in the order of the states."""
        if not isinstance(batches, Mapping):
            raise TypeError(f"{op}: batches must be a mapping of key to (K, noise), got {type(batches).__name__}")
        noises = {}
        for key in sorted(batches, key=lambda key: self._at(op, key)):
            batch = batches[key]
            if not (isinstance(batch, tuple) and len(batch) == 2):
                raise TypeError(f"{op}: batches[{key!r}] must be a pair (K, noise), got {type(batch).__name__}")
            with naming(key):
                noises[key] = _checks.noise(op, batch[1])
        return noises

    def _entries(self, op: str, batches: Batches, noises: Mapping[Any, float]) -> list[Entry]:
        """Checked batches of the states of this rank; what is given for others fits as well."""
        entries = []
        for key, noise in noises.items():
            state, K = self._states.get(key), batches[key][0]
            if state is None:
                if K is not None:  # it is compared with the owner's, on whatever device it is
                    at, d = getattr(K, "device", self.device), self._dims[self._position[key]]
                    shaped_keys(f"state {key!r}: {op}", K, d, self.dtype, at)
                continue
            if K is None:
                raise ValueError(f"{op}: K of state {key!r} must be given on rank {self.rank}, which keeps it")
            with naming(key):
                entries.append(Entry(key, state, *self._places[key], state._keys(op, K), noise))
        return entries

    def _header(self, noises: Mapping[Any, float], gather: bool) -> dict[str, float]:
        """What all ranks must be about to do alike."""
        positions = torch.tensor([self._position[key] for key in noises], dtype=torch.int64)
        values = torch.tensor(list(noises.values()), dtype=torch.float64)
        named = {"states_named": digest(positions), "noises": digest(values)}
        return {"calls": self._calls, **named, "whether gains go to all ranks": bool(gather)}

    def _compared(self, op: str, batches: Batches, noises: Mapping[Any, float]) -> dict[Any, int]:
        """Check that ranks that have the keys of a batch have the same; u of every batch."""
        if not noises or self._ranks is None or self._ranks.size == 1:
            return {key: _rows_of(batches[key][0]) for key in noises}
        mine = torch.zeros(len(noises), 2, dtype=torch.float64)
        for i, key in enumerate(noises):
            K = batches[key][0]
            if K is not None:
                mine[i] = torch.tensor([float(K.shape[0]), digest(K.to(self.dtype))], dtype=torch.float64)
        every = self._ranks.gather(mine[None].to(self._ranks.device), self._ranks.size).cpu()
        for i, key in enumerate(noises):
            given = every[every[:, i, 0] > 0.0, i]
            for column, what in enumerate(("u", "a digest of K")):
                if not bool((given[:, column] == given[0, column]).all()):
                    shown = ", ".join(f"{float(value):.17g}" for value in given[:, column])
                    raise ValueError(f"{op}: {what} of state {key!r} must be the same on all ranks that have K, got "
                                     f"{shown}; nothing was changed")  # fmt: skip
        return {key: int(every[:, i, 0].max()) for i, key in enumerate(noises)}

    def _everywhere(self, prepared: PreparedBatches) -> dict[Any, torch.Tensor]:
        """All gains on all ranks: a broadcast by every rank that has some."""
        if self._ranks is None or self._ranks.size == 1:
            return prepared.gains
        gains = {}
        for rank in range(self._ranks.size):
            keys = [key for key in prepared.sizes if self.owner(key) == rank]
            if not keys:
                continue
            shapes = [(self._dims[self._position[key]], prepared.sizes[key]) for key in keys]
            value = torch.empty(sum(d * u for d, u in shapes), dtype=self.dtype, device=self.device)
            if rank == self.rank:
                value = torch.cat([prepared.gains[key].reshape(-1) for key in keys])
            self._ranks.broadcast(value, rank)
            parts = value.split([d * u for d, u in shapes])
            gains.update({key: part.view(shape) for key, part, shape in zip(keys, parts, shapes, strict=True)})
        return {key: gains[key] for key in prepared.sizes}

    @contextlib.contextmanager
    def _confirmed(self, what: str) -> Iterator[dict[str, float]]:
        """`Ranks.confirmed`; for a process alone a block like any other."""
        if self._ranks is None:
            yield {}
            return
        with self._ranks.confirmed(what) as numbers:
            yield numbers


def name_of(key: Hashable) -> str:
    """The text of a key: (3, 17) is "3.17"."""
    return ".".join(str(part) for part in key) if isinstance(key, tuple) else str(key)


def _rows_of(K: torch.Tensor | None) -> int:
    assert K is not None
    return K.shape[0]


def _shape(prior: Prior) -> tuple[int, int]:
    """d and the rank of the prior, known without factoring it."""
    return prior.d, prior.arrays["basis"].shape[1] if prior.kind == "null_space" else prior.d


def _history(
    history: Callable[[Any], Iterable[tuple[torch.Tensor, float]]], key: Any
) -> Callable[[], Iterable[tuple[torch.Tensor, float]]]:
    return lambda: history(key)
