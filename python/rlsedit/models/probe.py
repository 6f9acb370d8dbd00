"""A run of one decoder layer on one token that shows what the tables cannot promise."""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .adapter import Adapter


class _Stop(Exception):
    pass


@torch.no_grad()
def probe(adapter: Adapter, edit: bool = True) -> bool:
    """Whether layers return tuples; checks on the way that the hidden state is linear in the edited module's output.

    A residual (z* - h) is handed to the edited weight as if h moved one for one with its output. A shift of that output
    by `e` must then shift the layer's output by `e`; with a norm behind the MLP it does not, and `adapter.post` has to
    name that norm.

    Raises:
        ValueError: the layer's output does not follow its edited module.
    """
    module = adapter.edited(0)
    shift: list[Tensor] = []
    seen: list[tuple[bool, Tensor]] = []

    def push(_module: Any, _args: Any, output: Tensor) -> Tensor:
        return output + shift[0] if shift else output

    def stop(_module: Any, _args: Any, output: Any) -> None:
        seen.append((isinstance(output, tuple), output[0] if isinstance(output, tuple) else output))
        if not adapter.processes.many:  # the hooks of FSDP2 want to come to their end
            raise _Stop

    training = adapter.model.training
    adapter.model.eval()
    handles = [module.register_forward_hook(push), adapter.layers[0].register_forward_hook(stop)]
    try:
        token = torch.zeros(1, 1, dtype=torch.long, device=adapter.device)
        for _ in range(2):
            adapter.processes.awake()
            with suppress(_Stop):
                adapter.base(input_ids=token, use_cache=False)
            plain = seen[0][1]
            size = plain.float().abs().max().clamp(min=1e-3)
            shift.append((torch.linspace(-1, 1, plain.shape[-1], device=plain.device) * size).to(plain.dtype))
    finally:
        for handle in handles:
            handle.remove()
        adapter.model.train(training)
    moved = (seen[1][1].float() - seen[0][1].float()).flatten()
    error = (moved - shift[0].float()).norm() / shift[0].float().norm()
    if not bool(error.isfinite()):
        raise ValueError("Adapter.for_model: model must have finite activations, got NaN or Inf in layer 0")
    if edit and adapter.post is None and error > 0.05:
        raise ValueError(
            f"Adapter.for_model: the output of a layer does not move one for one with {adapter.module!r} (relative "
            f"difference {error:.2g}; a norm or a gate behind it?), so a residual cannot be handed to that module"
        )
    return seen[0][0]
