"""Editing a model that lies on many processes: what each holds, what they exchange, and what they agree on."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

from .one import OneProcess
from .part import Part, digest

if TYPE_CHECKING:
    from rlsedit_kernels.distributed import Ranks

__all__ = ["OneProcess", "Part", "digest", "holders", "plain_class"]


def holders(model: nn.Module, layers: nn.ModuleList, module: nn.Module, ranks: Ranks | None = None) -> OneProcess:
    """The processes that hold a model; see `processes.spread`, which needs `torch.distributed` to be initialised."""
    if not _initialised():
        if ranks is not None:
            raise ValueError("Adapter.for_model: ranks need torch.distributed to be initialised")
        return OneProcess()
    from .processes import spread

    return spread(model, layers, module, ranks)


def plain_class(module: nn.Module) -> type:
    """The class of a module, before `fully_shard` where that was called on it."""
    if not _initialised():
        return type(module)
    from .fsdp import plain_class

    return plain_class(module)


def _initialised() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()
