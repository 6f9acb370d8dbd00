"""Taking edits back: the weights that the stream without them has, without writing the stream again.

With K, V the rows of the edits and D = W - W_0 (docs/mathematics.md, fact 5):

- a recursion, whose batches all enter the state, is downdated: C <- C + F A^-1 F', W <- W - F A^-1 (V - K W). The
  result minimises the objective without these rows; the recorded targets of all others stay;
- a method that solves every batch against its prior alone adds one change for each batch: the batch is solved again
  without the rows, with the recorded residuals of the others, and the difference is added;
- other methods have no such formula, and are refused with what to do instead.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from rlsedit_kernels.errors import LeverageError

from ..config import EditConfig
from ..methods import Method
from ..methods.solver import Removable
from ..weights import EditedWeights
from ..writing import LayerState
from .index import Index, Place
from .journal import Journal, rows_on
from .records import Entry, LayerRows
from .tensors import plain

__all__ = ["check_removable", "take_out"]


def check_removable(method: Method, config: EditConfig, index: Index) -> None:
    """Refuse a method, or a stream, out of which single edits cannot be taken.

    Raises:
        ValueError: saying why, and what to do instead.
    """
    reason = method.lasting
    if not reason and any(entry.kind == "finish" for entry in index.stack):
        reason = "the step at the end of the sequence has changed all edits together"
    if not reason and method.removal == "downdate" and method.noise(config, 2) == 0:
        reason = "edits were written hard (noise 0), which leaves no trace to remove"
    if reason:
        raise ValueError(
            f"remove: {method.name!r} cannot take single edits back: {reason}; undo takes back the last batches, or "
            "write the facts that shall stay into the first model (`rlsedit log DIR --state applied --json` "
            "lists them)"
        )


def take_out(
    method: Method,
    config: EditConfig,
    weights: EditedWeights,
    layers: Mapping[int, LayerState],
    journal: Journal,
    index: Index,
    names: Sequence[str],
) -> dict[int, LayerState]:
    """Take edits out of the weights (kept or undone by the caller), and give the states that follow.

    Args:
        method, config: of the stream.
        weights: changed.
        layers: states, not changed.
        journal: where the rows are.
        index: stands before the removal.
        names: ids of edits that are in the model.

    Raises:
        ValueError: the method cannot.
        StoreError: a record that is needed is damaged.
    """
    check_removable(method, config, index)
    places = [index.live[name] for name in names]
    work = _downdated if method.removal == "downdate" else _solved_again
    return {n: work(method, config, weights, n, layers[n], journal, index, places) for n in config.layers}


def _downdated(
    method: Method, config: EditConfig, weights: EditedWeights, layer: int, state: LayerState, journal: Journal,
    index: Index, places: Sequence[Place],
) -> LayerState:  # fmt: skip
    """One downdate for all rows; the objective made anew from the rows that stay where that is ill-conditioned."""
    figures = state.deviations
    dtype, device = figures.shift.dtype, figures.shift.device
    solver = state.solver
    if not isinstance(solver, Removable):
        raise TypeError(f"remove: the solver of {method.name!r} has no `removed`")
    parts = [rows for _, rows in _batches(journal, index, layer, device, places)]
    keys = torch.cat([rows.keys for rows in parts if rows.keys is not None])
    target = torch.cat([rows.target for rows in parts if rows.target is not None]).double()
    noise = method.noise(config, len(keys))

    def remaining() -> Iterator[tuple[Tensor, Tensor, float]]:
        for batch_noise, rows in _batches(journal, index, layer, device, None, places):
            if rows.keys is not None and rows.target is not None and len(rows.keys):
                yield rows.keys, rows.target, batch_noise

    try:
        gain, after = solver.removed(keys)
    except LeverageError:
        exact, after = solver.rebuilt(remaining)
        following = figures.at(plain(exact.to(dtype).expand(figures.shift.shape)))
        weights.add(layer, following.shift - figures.shift)
        cost = sum(float((v.double() * following.error(k, v)).sum()) / nu for k, v, nu in remaining())
        innovation = sum(float(v.double().square().sum()) / nu for _, v, nu in remaining())
    else:
        before = figures.error(keys, target)
        change = -figures.product(gain.double(), before).to(dtype)
        weights.add(layer, change)
        following = figures.moved(change, (gain, -before.to(dtype)))
        cost = figures.cost - float((following.error(keys, target) * before).sum()) / noise
        innovation = max(0.0, figures.innovation - float(target.square().sum()) / noise)
    return LayerState(after, replace(following, cost=cost, innovation=innovation))


def _solved_again(
    method: Method, config: EditConfig, weights: EditedWeights, layer: int, state: LayerState, journal: Journal,
    index: Index, places: Sequence[Place],
) -> LayerState:  # fmt: skip
    """Every batch concerned with and without the rows, against the prior."""
    shift = state.deviations.shift
    change = torch.zeros_like(shift)
    products: list[tuple[Tensor, Tensor]] | None = []
    gone: dict[int, set[int]] = {}
    for place in places:
        gone.setdefault(place.number, set()).add(place.position)
    for number, positions in sorted(gone.items()):
        record = journal.load(number, shift.device)
        inside = index.positions(journal.entries[number - 1])
        for sign, kept in ((-1, inside), (1, inside - positions)):
            rows = rows_on(record.layers[layer], record.rows_of(kept))
            if kept:
                assert rows.keys is not None
                assert rows.residual is not None
                proposal = state.solver.propose(rows.keys, rows.residual, rows.bare)[0]
                change += sign * proposal.update
                if proposal.gain is None:
                    products = None
                elif products is not None:
                    products.append((proposal.gain, sign * rows.residual))
    weights.add(layer, change)
    return replace(state, deviations=state.deviations.moved(change, *(products or ())))


def _batches(
    journal: Journal,
    index: Index,
    layer: int,
    device: torch.device,
    places: Sequence[Place] | None,
    without: Sequence[Place] = (),
) -> Iterator[tuple[float, LayerRows]]:
    """Noise and rows of the edits at `places` (None: of all that are in the model), less those `without`, by record."""
    entries: list[Entry] = [entry for entry in index.stack if entry.kind == "batch"]
    left = set(without)
    for entry in entries:
        wanted = index.positions(entry) if places is None else {p.position for p in places if p.number == entry.number}
        wanted -= {place.position for place in left if place.number == entry.number}
        if wanted or entry.damaged:
            if entry.damaged and places is not None and not wanted:
                continue
            record = journal.load(entry.number, device)
            yield record.noise, rows_on(record.layers[layer], record.rows_of(wanted))
