"""A model that lies on many processes as one folder that `from_pretrained` loads anywhere."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from rlsedit_kernels.distributed import bounds

from .part import Part
from .processes import Processes

__all__ = ["gathered", "unspread", "whole_weight"]


@torch.no_grad()
def gathered(model: nn.Module, keep: bool) -> dict[str, Tensor]:
    """All weights, gathered one at a time, on the CPU of the processes that `keep` them; all processes call this."""
    found: dict[str, Tensor] = {}
    for name, value in model.state_dict().items():
        whole: Any = value.full_tensor() if isinstance(value, DTensor) else value
        if keep:
            found[name] = whole.detach().cpu().contiguous()
    return found


@contextmanager
def unspread(model: nn.Module) -> Iterator[None]:
    """The configuration without what says how the model is spread, so that one process saves what it is given."""
    config: Any = model.config
    kept = config.__dict__.pop("distributed_config", None)
    try:
        yield
    finally:
        if kept is not None:
            config.distributed_config = kept


def whole_weight(processes: Processes, mine: Tensor, part: Part, holder: int = 0) -> Tensor:
    """The whole weight (d, v) on the CPU of the rank `holder`, sent part by part; an empty one elsewhere."""
    ranks = processes.ranks
    if part.kind == "whole":
        return mine.cpu()
    if processes.rank != holder:
        ranks.send(mine.contiguous(), holder)
        return mine.new_empty(0)
    whole = torch.empty(part.d, part.v, dtype=mine.dtype, device="cpu")
    part.of(whole).copy_(mine)
    edges = bounds(part.d if part.kind == "rows" else part.v, ranks.size)
    for rank in (rank for rank in range(ranks.size) if rank != holder):
        span = slice(edges[rank], edges[rank + 1])
        into = whole[span] if part.kind == "rows" else whole[:, span]
        into.copy_(ranks.receive(torch.empty(into.shape, dtype=mine.dtype, device=mine.device), rank))
    return whole
