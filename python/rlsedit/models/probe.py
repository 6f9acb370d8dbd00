"""Runs of a decoder layer, and of the whole model, on a few tokens that show what the tables cannot promise."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache

from .replay import capture, frozen_cache, outputs_of

if TYPE_CHECKING:
    from .adapter import Adapter


class _Stop(Exception):
    pass


@torch.no_grad()
def probe(adapter: Adapter, edit: bool = True, layer: int = 0) -> tuple[bool, float | None]:
    """Whether layers return tuples, and by how much the hidden state moves with the edited module's output.

    A residual (z* - h) is handed to the edited weight. A shift of that module's output by `e` must then shift the
    layer's output by `factor e`, with one factor for all tokens: 1 in most models. With a norm behind the MLP, which
    `adapter.post` has to name, it must shift it as `adapter.shifted` says, and the factor is 1.

    Returns:
        The first, and the factor, None where there is none.

    Raises:
        ValueError: activations that are not finite; a module to be edited whose input has no place for rows and tokens.
    """
    module = adapter.edited(layer)
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

    handles = [module.register_forward_hook(push), adapter.layers[layer].register_forward_hook(stop)]
    try:
        tokens = torch.arange(4, device=adapter.device)[None]
        for _ in range(2):
            adapter.processes.awake()
            with suppress(_Stop), adapter.frozen():
                adapter.base(input_ids=tokens, use_cache=False)
            plain = seen[0][1]
            shape = tuple(inner[0].shape) if inner else ()
            if edit and shape[:-1] != tuple(plain.shape[:-1]):
                raise ValueError(
                    f"Adapter.for_model: module={adapter.module!r} must be called with inputs of shape (rows, tokens, "
                    f"d), got an output of shape {shape} for (1, 4) tokens (rows run together, or an expert?)"
                )
            if shape[-1:] != tuple(plain.shape[-1:]):
                return seen[0][0], None
            size = plain.float().abs().max().clamp(min=1e-3)
            shift.append((torch.linspace(-1, 1, plain.shape[-1], device=plain.device) * size).to(plain.dtype))
    finally:
        for handle in handles:
            handle.remove()
    plain, moved = seen[0][1], seen[1][1]
    whole = adapter.post is None or not adapter.processes.many
    wanted = (adapter.shifted(layer, plain, inner[0], shift[0]) if whole else plain + shift[0]).float() - plain.float()
    found = moved.float() - plain.float()
    if not bool(found.isfinite().all()):
        raise ValueError(f"Adapter.for_model: model must have finite activations, got NaN or Inf in layer {layer}")
    return seen[0][0], _factor(found, wanted, adapter.post is None)


def _factor(found: Tensor, wanted: Tensor, free: bool) -> float | None:
    """c with found = c wanted (rows, tokens, d) for all tokens alike, 1 unless `free`; None where there is none."""
    each = (found * wanted).sum(-1) / (wanted * wanted).sum(-1)
    factor = float(each.mean())
    if abs(factor - 1) <= ALIKE or not free:
        factor = 1.0
    alike = factor > 0 and bool(((each - factor).abs() <= ALIKE * factor).all())
    return factor if alike and bool((found - factor * wanted).norm() <= TOLERANCE * factor * wanted.norm()) else None


TOLERANCE = 0.05
"""Relative difference that rounding to 16 bits explains."""

ALIKE = 0.02
"""The same of a mean over the entries of a hidden state."""


def same_factor(adapter: Adapter, layers: Sequence[int], factor: float) -> float | None:
    """The factor of layer 0 if these layers have it too, as the configuration has it where it names it; else None."""
    for n in layers:
        other = probe(adapter, False, n)[1]
        if other is None or abs(other - factor) > ALIKE * factor:
            return None
    config = adapter.model.config.get_text_config()  # type: ignore[operator, union-attr]
    named = getattr(config, "residual_multiplier", None)
    return float(named) if isinstance(named, float) and abs(named - factor) <= ALIKE * factor else factor


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


@torch.no_grad()
def check_replay(adapter: Adapter) -> None:
    """Refuse layers that do not give the model's logits when they are run one by one, as the editor runs them.

    Two rows of four and two tokens are lined up at their third and first; what stands before goes into a cache of
    keys and values, the rest is read on top of it. A layer that carries another state (a state space, a linear
    attention) cannot be run so. Not looked at where several processes hold the model.

    Raises:
        ValueError: the logits differ from those of each row alone, or the layers cannot be run so.
    """
    if adapter.processes.many:
        return
    device, count = adapter.device, adapter.num_layers
    rows = [torch.arange(1, 5, device=device), torch.arange(5, 7, device=device)]
    ids, mask, positions = torch.zeros(3, 2, 4, dtype=torch.long, device=device)
    for n, row in enumerate(rows):
        part = slice(2 * n, 2 * n + len(row))
        ids[n, part], mask[n, part], positions[n, part] = row, 1, torch.arange(len(row), device=device)
    cause: Exception | None = None
    error = torch.tensor(torch.inf)
    with adapter.frozen():
        alone = [getattr(adapter.model(input_ids=row[None], use_cache=False), "logits", None) for row in rows]
        if alone[0] is None or alone[1] is None:
            return
        try:
            cache = DynamicCache()
            first = capture(adapter, ids[:, :2], mask[:, :2], positions[:, :2], cache)
            first.run(adapter, first.hidden, 0, count)
            if empty := [n for n in range(count) if not _holds(cache, n, 2)]:
                raise ValueError(f"layers {empty} keep no keys and values")
            second = capture(adapter, ids[:, 2:], mask, positions[:, 2:], frozen_cache(cache, 2, count))
            found = adapter.logits(second.run(adapter, second.hidden, 0, count)).float()
            wanted = torch.cat([alone[0][:, 2:], alone[1]]).to(found.device, torch.float32)
            error = (found - wanted).norm() / wanted.norm()
        except torch.OutOfMemoryError:
            raise
        except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as reason:
            cause = reason
    bound = TOLERANCE if adapter.edited(0).weight.element_size() == 2 else 1e-3  # type: ignore[operator]
    if not bool(error <= bound):
        what = f"{type(cause).__name__}: {cause}" if cause else f"the logits differ by {error:.2g} of their norm"
        raise ValueError(
            f"Adapter.for_model: the layers of {type(adapter.model).__name__} cannot be run one by one on a cache of "
            f"keys and values (a state of another kind, as of a state space or a linear attention?): {what}"
        ) from cause


def _holds(cache: DynamicCache, layer: int, length: int) -> bool:
    """Whether a layer of a cache has keys (B, heads, length, head size)."""
    keys = getattr(cache.layers[layer], "keys", None) if layer < len(cache.layers) else None
    return isinstance(keys, Tensor) and keys.ndim == 4 and keys.shape[-2] == length
