"""What FSDP2 needs when parts of a model are called by themselves.

Its hooks gather the weights of a decoder layer when the layer is called. Embedding, final norm and head belong to the
root, whose forward the editor does not call: they are gathered by hand. A weight is written where it is sharded.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from torch import nn
from torch.distributed.fsdp import FSDPModule

__all__ = ["Units", "plain_class"]


class Units:
    """The modules of a model that `fully_shard` was called on.

    Args:
        model: the causal LM.
        layers: its decoder layers.
    """

    def __init__(self, model: nn.Module, layers: nn.ModuleList) -> None:
        self._model = model
        inside = {id(part) for layer in layers for part in layer.modules()}
        units = [part for part in model.modules() if isinstance(part, FSDPModule)]
        self._beside = [unit for unit in units if id(unit) not in inside]
        self.any = bool(units)
        self._owners: dict[int, FSDPModule | None] = {}

    def rest(self, module: nn.Module) -> None:
        """The weight of `module` lies sharded, where it is read and written."""
        if not self.any:
            return
        if id(module) not in self._owners:
            name = next(name for name, part in self._model.named_modules() if part is module)
            steps = name.split(".")
            above = [self._model.get_submodule(".".join(steps[:n])) for n in range(len(steps) + 1)]
            units = [part for part in above if isinstance(part, FSDPModule)]
            self._owners[id(module)] = units[-1] if units else None
        owner = self._owners[id(module)]
        if owner is not None:
            owner.reshard()

    def awake(self) -> None:
        """Gather the weights beside the decoder layers; nothing where they are there already."""
        for unit in self._beside:
            unit.unshard()

    @contextmanager
    def idle(self, layers: Sequence[nn.Module]) -> Iterator[None]:
        """No hooks of `layers` inside."""
        if not self.any:
            yield
            return
        kept = [(layer._forward_pre_hooks, layer._forward_hooks) for layer in layers]
        for layer in layers:
            layer._forward_pre_hooks, layer._forward_hooks = OrderedDict(), OrderedDict()
        try:
            yield
        finally:
            for layer, (before, behind) in zip(layers, kept, strict=True):
                layer._forward_pre_hooks, layer._forward_hooks = before, behind


def plain_class(module: nn.Module) -> type:
    """The class of a module before `fully_shard`."""
    kind = type(module)
    return kind.__bases__[1] if isinstance(module, FSDPModule) and len(kind.__bases__) == 2 else kind
