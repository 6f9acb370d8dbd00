"""A model that lies on many processes as one folder that `from_pretrained` loads anywhere."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

__all__ = ["gathered", "unspread"]


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
