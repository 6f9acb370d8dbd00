"""Repeating recorded steps: the same weights and states, to the bit, from the nearest snapshot or from the start."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..config import EditConfig
from ..methods import Method
from ..methods.simie import SimIESolver
from ..weights import EditedWeights
from ..writing import LayerState
from ..writing.job import applied
from .errors import StoreError
from .index import Index
from .journal import Journal
from .packing import RootChanged
from .records import Entry, LayerRows, Record
from .removal import take_out
from .snapshots import Manifest, Snapshots
from .tensors import checksum

__all__ = ["Stream", "finished", "marks", "restore"]

logger = logging.getLogger(__name__)

_SAME = 1e-3
"""Relative difference of |W - W_0|^2 up to which weights in other bits are taken for the same to rounding."""


@dataclass(frozen=True)
class Stream:
    """What does not change while edits come.

    Attributes:
        method, config: what is done.
        weights: the edited weights.
        first: W_0 (d, v) of each layer.
        fresh: gives the state of a layer before the first batch.
    """

    method: Method
    config: EditConfig
    weights: EditedWeights
    first: Mapping[int, Tensor]
    fresh: Callable[[int], LayerState]


def restore(
    stream: Stream, journal: Journal, stack: Sequence[Entry], snapshots: Snapshots | None = None
) -> dict[int, LayerState]:
    """Put the weights where they were behind the steps of `stack`, and give the states; the caller keeps or reverts.

    Raises:
        StoreError: a record that is needed is damaged, or the weights come out as others than were recorded.
    """
    index = Index(stack)
    for manifest in _candidates(snapshots, index):
        try:
            layers = _start(stream, manifest, snapshots)
        except RootChanged:
            logger.warning("the snapshots were taken on another machine: all steps are repeated from the first")
            continue
        except (ValueError, TypeError, KeyError) as error:  # damaged, or of a state of another version
            if manifest is None:
                raise
            logger.warning("%s: cannot be used (%s); the one before it is, or the records", manifest.path, error)
            continue
        break
    depth = 0 if manifest is None else manifest.depth
    done = Index(stack[:depth])
    differs = False
    for entry in stack[depth:]:
        record = journal.load(entry.number, next(iter(stream.first.values())).device)
        layers = _repeat(stream, layers, journal, done, record)
        done.push(entry)
        differs |= not _as_recorded(stream, layers, record)
    if differs:
        logger.warning(
            "weights come out equal to rounding but not to the bit: they were written on another machine, with another "
            "number of threads or another version of torch"
        )
    return layers


def finished(stream: Stream, layers: Mapping[int, LayerState]) -> dict[int, LayerState]:
    """The method's step at the end of a sequence, on all layers."""
    assert stream.method.finish is not None
    following = {}
    for n, state in layers.items():
        shift = state.deviations.shift
        change = stream.method.finish(shift, stream.first[n].to(shift.dtype), stream.config) - shift
        stream.weights.add(n, change)
        following[n] = replace(state, deviations=state.deviations.moved(change))
    return following


def marks(stream: Stream, layers: Mapping[int, LayerState]) -> tuple[dict[int, str], dict[int, float]]:
    """Hash of each weight, unless it lies on many processes, and |W - W_0|^2 of each layer."""
    sums = {n: checksum(stream.weights.wide(n)) for n in layers if stream.weights.whole}
    return sums, {n: state.deviations.parameter for n, state in layers.items()}


def _candidates(snapshots: Snapshots | None, index: Index) -> list[Manifest | None]:
    found: list[Manifest | None] = []
    for manifest, problem in () if snapshots is None else snapshots.manifests():
        if manifest is None:
            logger.warning("%s; the snapshot before it is used", problem)
        elif manifest.fits(index):
            found.append(manifest)
    return [*found, None]


def _start(stream: Stream, manifest: Manifest | None, snapshots: Snapshots | None) -> dict[int, LayerState]:
    layers = {}
    for n in stream.config.layers:
        fresh, wide = stream.fresh(n), stream.weights.wide(n)
        weight = stream.first[n].to(wide.dtype, copy=True)
        if manifest is not None:
            assert snapshots is not None
            weight, fresh = snapshots.load(manifest, n, fresh, wide.device)
        stream.weights.put(n, weight)
        layers[n] = fresh
    return layers


def _repeat(
    stream: Stream, layers: dict[int, LayerState], journal: Journal, index: Index, record: Record
) -> dict[int, LayerState]:
    method, config, weights = stream.method, stream.config, stream.weights
    if record.kind == "finish":
        return finished(stream, layers)
    if record.removed:
        layers = take_out(method, config, weights, layers, journal, index, record.removed)
    if record.kind == "batch":
        layers = {
            n: applied(method, config, weights, _ready(layers[n], rows), n, rows)
            for n, rows in sorted(record.layers.items())
        }
    return layers


def _ready(state: LayerState, rows: LayerRows) -> LayerState:
    """The editor underneath SimIE is not asked again for what it proposed, but has seen its keys."""
    if isinstance(state.solver, SimIESolver) and rows.seen is not None:
        return replace(state, solver=state.solver.seen(rows.seen))
    return state


def _as_recorded(stream: Stream, layers: Mapping[int, LayerState], record: Record) -> bool:
    sums, sizes = marks(stream, layers)
    for n, size in sizes.items():
        wanted = record.sizes.get(n, size)
        if not abs(size - wanted) <= _SAME * max(abs(wanted), torch.finfo(torch.float32).tiny):
            raise StoreError(
                f"record {record.number}: the weight of layer {n} comes out as another, |W - W_0|^2 = {size:.6g} where "
                f"{wanted:.6g} was recorded; the folder belongs to another model or version"
            )
    return all(record.sums.get(n, total) == total for n, total in sums.items())
