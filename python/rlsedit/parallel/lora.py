"""The factors of a LoRA adapter of a model that lies on many processes: each takes some layers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from torch import Tensor

from ..export.changes import UNCHANGED, change_of_layer
from ..export.factors import Factors, factorise
from ..export.lowrank import LowRank
from ..models.adapter import Adapter
from .processes import Processes
from .saving import whole_weight

__all__ = ["factors_of_parts"]


def factors_of_parts(
    adapter: Adapter, before: Mapping[int, Tensor], after: Mapping[int, Tensor], rank: int | None
) -> Factors:
    """What `factorise(changes_of_model(...))` gives, on all processes; a `Change` has the part of the weight here.

    As many layers as there are processes are taken at once: each comes whole, W_0 and W, to one of them.

    Args:
        adapter: the model.
        before, after: parts of W_0 and W of each edited layer, row form.
        rank: largest rank; None for what is exact to rounding.

    Raises:
        ValueError, RankError: no layer has changed, a rank out of range.
    """
    processes = adapter.processes
    assert isinstance(processes, Processes)
    layers, size = sorted(after), processes.size
    found: Factors = []
    for start in range(0, len(layers), size):
        taken = layers[start : start + size]
        mine: dict[int, tuple[Tensor, Tensor]] = {}
        for holder, n in enumerate(taken):
            first, last = (whole_weight(processes, value[n], adapter.part(n), holder) for value in (before, after))
            if holder == processes.rank:
                mine[n] = first.to(after[n].device), last.to(after[n].device)
        own: LowRank | None = None
        with processes.together("Editor.export_lora"):
            for n, (first, last) in mine.items():
                change = change_of_layer(adapter, n, first, last)
                if not change.is_nothing():
                    ((_, factors),) = factorise([change], rank)
                    own = replace(factors, left=factors.left.cpu(), right=factors.right.cpu())
        for holder, n in enumerate(taken):
            part: LowRank | None = processes.shared(own, holder)
            if part is not None:
                found.append((change_of_layer(adapter, n, before[n], after[n]), part))
    with processes.in_step():
        if not found:
            raise ValueError(UNCHANGED)
    return found
