"""A run of one decoder layer on one token, and of the whole model, that shows what the tables cannot promise."""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .replay import outputs_of

if TYPE_CHECKING:
    from .adapter import Adapter


class _Stop(Exception):
    pass


@torch.no_grad()
def probe(adapter: Adapter, edit: bool = True) -> tuple[bool, bool]:
    """Whether layers return tuples, and whether the hidden state moves one for one with the edited module's output.

    A residual (z* - h) is handed to the edited weight as if it did. A shift of that output by `e` must then shift the
    layer's output by `e`; with a norm behind the MLP it does not, and `adapter.post` has to name that norm.

    Raises:
        ValueError: activations that are not finite; a module to be edited whose input has no place for rows and tokens.
    """
    module = adapter.edited(0)
    shift: list[Tensor] = []
    inner: list[Tensor] = []
    seen: list[tuple[bool, Tensor]] = []

    def push(_module: Any, _args: Any, output: Tensor) -> Tensor:
        inner.append(output)
        return output + shift[0] if shift else output

    def stop(_module: Any, _args: Any, output: Any) -> None:
        seen.append((isinstance(output, tuple), output[0] if isinstance(output, tuple) else output))
        if not adapter.processes.many:  # the hooks of FSDP2 want to come to their end
            raise _Stop

    handles = [module.register_forward_hook(push), adapter.layers[0].register_forward_hook(stop)]
    try:
        token = torch.zeros(1, 1, dtype=torch.long, device=adapter.device)
        for _ in range(2):
            adapter.processes.awake()
            with suppress(_Stop), adapter.frozen():
                adapter.base(input_ids=token, use_cache=False)
            plain = seen[0][1]
            shape = tuple(inner[0].shape) if inner else ()
            if edit and shape[:-1] != tuple(plain.shape[:-1]):
                raise ValueError(
                    f"Adapter.for_model: module={adapter.module!r} must be called with inputs of shape (rows, tokens, "
                    f"d), got an output of shape {shape} for (1, 1) tokens (rows run together, or an expert?)"
                )
            if shape[-1:] != tuple(plain.shape[-1:]):
                return seen[0][0], False
            size = plain.float().abs().max().clamp(min=1e-3)
            shift.append((torch.linspace(-1, 1, plain.shape[-1], device=plain.device) * size).to(plain.dtype))
    finally:
        for handle in handles:
            handle.remove()
    moved = (seen[1][1].float() - seen[0][1].float()).flatten()
    error = (moved - shift[0].float()).norm() / shift[0].float().norm()
    if not bool(error.isfinite()):
        raise ValueError("Adapter.for_model: model must have finite activations, got NaN or Inf in layer 0")
    return seen[0][0], bool(error <= TOLERANCE)


TOLERANCE = 0.05
"""Relative difference that rounding to 16 bits explains."""


@torch.no_grad()
def check_logits(adapter: Adapter) -> None:
    """Refuse parts that do not give the model's own logits: a factor or a map behind the head would be left out.

    A model whose output has no logits is not looked at.

    Raises:
        ValueError: they differ.
    """
    ids = torch.arange(4, device=adapter.device)[None]  # one of them may be the padding, whose embedding is zero
    adapter.processes.awake()
    with adapter.frozen():
        with outputs_of(adapter.layers[-1]) as last:
            wanted = getattr(adapter.model(input_ids=ids, use_cache=False), "logits", None)
        if wanted is None:
            return
        found, wanted = adapter.logits(last[0]).float().to(wanted.device), wanted.float()
    same = found.shape == wanted.shape
    error = (found - wanted).norm() / wanted.norm() if same else torch.tensor(torch.inf)
    if not bool(error <= TOLERANCE):
        raise ValueError(
            "Adapter.for_model: head= of norm= of the last of layers= must be the logits of the model; they differ by "
            f"{error:.2g} of their norm (a factor or a map in front of or behind the head?)"
        )
