"""A sharded covariance from its prior and kept batches, in float64: what one process does by a dense inversion."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch

from rlsedit_kernels.distributed import held
from rlsedit_kernels.distributed.agreement import digest
from rlsedit_kernels.distributed.batch import Batch
from rlsedit_kernels.distributed.batch_keys import BatchKeys, batch_keys
from rlsedit_kernels.distributed.factor import ShardedFactor
from rlsedit_kernels.distributed.forms import FORM_CLASSES
from rlsedit_kernels.distributed.ranks import Ranks
from rlsedit_kernels.distributed.row_probes import RowProbes
from rlsedit_kernels.ops import _checks
from rlsedit_kernels.states import batch as batches
from rlsedit_kernels.states import choice
from rlsedit_kernels.states.counters import Counters, weighted
from rlsedit_kernels.states.covariance import CovarianceState
from rlsedit_kernels.states.keys import pairs

__all__ = ["Replayed", "Replaying"]

_DTYPES = {torch.float64: 0, torch.float32: 1, torch.bfloat16: 2, torch.float16: 3}


@dataclass
class Replayed:
    """What a replay gives: all of a state that depends on its batches."""

    form: Any
    reason: str
    counters: Counters
    probes: RowProbes
    stale: int | None


class Replaying(CovarianceState):
    """What a `ShardedCovarianceState` needs to be made anew from batches."""

    ranks: Ranks
    _form: Any
    _factor: ShardedFactor  # type: ignore[assignment]
    _probes: Any

    def _replayed(self, written: Iterable[tuple[Any, float]], decided: choice.Choice | None) -> Replayed:
        """Replay batches on rows in float64, with the restrictions in force, and round them once; nothing is changed.

        Args:
            written: pairs (K, noise), noise > 0, the same on all ranks.
            decided: the form to take; None for that of the state, or for the choice that the largest key asks for
                where the form is automatic (all batches are then held at once).
        """
        counters, probes = Counters(), RowProbes.start(self._factor)
        stream: Iterable[tuple[Batch, float]] = self._checked(written, probes.z)
        if decided is None:
            name, storage = self._requested, self.dtype
            decided = choice.Choice(name, storage, self._reason)
            if name == "auto":
                stream = list(stream)
                largest = max((weighted(batch.largest, noise) for batch, noise in stream), default=0.0)
                decided = choice.choose(self._factor, self.dtype, largest, dense=True)
        form = FORM_CLASSES[decided.form].start(self._factor, decided.storage, wide=True)
        eps = torch.finfo(torch.float64).eps
        for batch, noise in stream:
            K = form.coordinates(batch, torch.float64)
            products = form.products(K)
            products = replace(products, stack=batches.stacked(products, noise), times=None)
            inner = form.largest(batch, K)
            with self.ranks.confirmed("refactor") as numbers:
                factored = batches.factor(products, noise, eps)
                numbers["the digest of the u x u system"] = digest(factored.G, factored.root)
            form.change_(factored.change, -1.0)
            probes.write(batch, noise, 1.0)
            counters.steps += 1
            counters.see(batch.largest, noise)
            counters.largest_inner = max(counters.largest_inner, inner)
        stale = None
        if self._restriction is not None:
            bare = form
            form, change = held.restricted("refactor", bare, self._factor, self._restriction, probes.z, False)
            if change is not None:
                bare.change_(change, -1.0)
            counters.singular_writes = counters.restrictions = 1
            stale = 20 + counters.singular_writes
        form.to_(decided.storage)
        return Replayed(form, decided.reason, counters, probes, stale)

    def _checked(self, written: Iterable[tuple[Any, float]], z: torch.Tensor) -> Iterator[tuple[Batch, float]]:
        """The batches, each of which all ranks have found to be in order and the same."""
        source = pairs("refactor", written)  # looked at when the first of them is asked for
        while True:
            with self.ranks.confirmed("refactor") as numbers:
                pair = next(source, None)
                numbers["whether there is another batch"] = pair is not None
                if pair is not None:
                    noise = _checks.noise("refactor", pair[1])
                    if noise == 0.0:
                        raise ValueError("refactor: noise must be > 0 for every batch")
                    keys = batch_keys("refactor", pair[0], self.d, self.dtype, self.ranks)
                    numbers.update(self._header(pair[0], keys), noise=noise)
            if pair is None:
                return
            yield Batch(keys, self.ranks, self.d, z), noise

    def _header(self, K: torch.Tensor, keys: BatchKeys) -> dict[str, float]:
        """What all ranks have to find the same of a batch."""
        return {
            "the number of changes so far": self._writes,
            "u": keys.u,
            "the number of the dtype of K": _DTYPES.get(K.dtype, -1),
            "whether K is sharded": keys.full is None,
            "the digest of K": keys.mark,
        }
