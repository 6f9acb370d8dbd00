"""Runs of a decoder layer, and of the whole model, on a few tokens that show what the tables cannot promise."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer, LinearAttentionCacheLayerMixin

from ..parallel import plain_class
from .parts import Parts
from .replay import capture, frozen_cache, outputs_of


class _Stop(Exception):
    pass


@torch.no_grad()
def probe(adapter: Parts, edit: bool = True, layer: int = 0) -> tuple[bool, float | None]:
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
    post = adapter.behind(layer)
    whole = post is None or not adapter.processes.many
    wanted = (adapter.shifted(layer, plain, inner[0], shift[0]) if whole else plain + shift[0]).float() - plain.float()
    found = moved.float() - plain.float()
    if not bool(found.isfinite().all()):
        raise ValueError(f"Adapter.for_model: model must have finite activations, got NaN or Inf in layer {layer}")
    return seen[0][0], _factor(found, wanted, post is None)


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


def same_factor(adapter: Parts, layers: Sequence[int], factor: float) -> float | None:
    """The factor of layer 0 if these layers have it too, as the configuration has it where it names it; else None."""
    for n in layers:
        other = probe(adapter, False, n)[1]
        if other is None or abs(other - factor) > ALIKE * factor:
            return None
    config = adapter.model.config.get_text_config()  # type: ignore[operator, union-attr]
    named = getattr(config, "residual_multiplier", None)
    return float(named) if isinstance(named, float) and abs(named - factor) <= ALIKE * factor else factor


def unlike(adapter: Parts) -> frozenset[int]:
    """Layers in which the hidden state does not move with the edited module as in layer 0, where it does so there.

    Layers that are made of the same parts are taken to be alike: the first of each kind is looked at. One without the
    edited module is refused when it is edited.
    """
    kinds: dict[tuple[object, ...], list[int]] = {}
    for n, layer in enumerate(adapter.layers):
        parts = tuple((name, plain_class(part)) for name, part in layer.named_modules())
        kinds.setdefault(parts, []).append(n)
    found: set[int] = set()
    for first, *others in list(kinds.values())[1:] if adapter.direct else ():
        try:
            adapter.edited(first)
        except ValueError:
            continue
        if adapter.processes.many and adapter.behind(first) is not None:
            continue  # no norm in one piece there
        factor = probe(adapter, False, first)[1]
        if factor is None or abs(factor - adapter.factor) > ALIKE * adapter.factor:
            found |= {first, *others}
    return frozenset(found)


@torch.no_grad()
def check_logits(adapter: Parts) -> None:
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
    if not bool(error <= _bound(adapter)):
        raise ValueError(
            "Adapter.for_model: head= of norm= of the last of layers= must be the logits of the model; they differ by "
            f"{error:.2g} of their norm (a factor or a map in front of or behind the head?)"
        )


@torch.no_grad()
def check_replay(adapter: Parts) -> bool:
    """Whether layers give the model's logits when they are run one by one on a cache of keys and values.

    Two rows of four and two tokens are lined up at their third and first; what stands before goes into the cache, the
    rest is read on top of it. A layer that carries another state (a state space, a linear attention, a convolution)
    cannot be run so: then whole rows, padded on the right, have to give the logits of each row alone, each layer with
    arguments of its own, since the editor runs those above the last edited one without the others; and the logits may
    not depend on what follows. Where several processes hold the model, the configuration alone says which it is.

    Raises:
        ValueError: neither does; the message says why not.
    """
    if adapter.processes.many:
        return not other_states(adapter.model.config)
    device = adapter.device
    rows = [torch.arange(1, 5, device=device), torch.arange(5, 7, device=device)]
    with adapter.frozen():
        alone = [getattr(adapter.model(input_ids=row[None], use_cache=False), "logits", None) for row in rows]
        if alone[0] is None or alone[1] is None:
            return True
        first, second = alone[0][0], alone[1][0]
        cached = _differs(lambda: _on_cache(adapter, rows), torch.cat([first[None, 2:], second[None]]), adapter)
        if cached is None:
            return True
        wanted = torch.cat([first, second, first[:2]])
        whole = _differs(lambda: _on_rows(adapter, [*rows, rows[0][:2]]), wanted, adapter)
    if whole is None:
        return False
    raise ValueError(
        f"Adapter.for_model: the layers of {type(adapter.model).__name__} cannot be run one by one, neither on a cache "
        f"of keys and values ({cached}) nor on whole rows ({whole})"
    )


def _differs(run: Callable[[], Tensor], wanted: Tensor, adapter: Parts) -> str | None:
    """How logits that are run differ from the wanted ones, None where they do not."""
    try:
        found = run().float()
    except torch.OutOfMemoryError:
        raise
    except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
        return f"{type(error).__name__}: {error}"
    wanted = wanted.to(found.device, torch.float32)
    apart = (found - wanted).norm() / wanted.norm()
    return None if bool(apart <= _bound(adapter)) else f"the logits differ by {apart:.2g} of their norm"


def _on_cache(adapter: Parts, rows: Sequence[Tensor]) -> Tensor:
    """Logits (2, 2, vocabulary) of the last two tokens of two rows, run on a cache of what stands before."""
    count = adapter.num_layers
    ids, mask, positions = torch.zeros(3, 2, 4, dtype=torch.long, device=adapter.device)
    for n, row in enumerate(rows):
        part = slice(2 * n, 2 * n + len(row))
        ids[n, part], mask[n, part], positions[n, part] = row, 1, torch.arange(len(row), device=adapter.device)
    cache = DynamicCache()
    first = capture(adapter, ids[:, :2], mask[:, :2], positions[:, :2], cache)
    first.run(adapter, first.hidden, 0, count)
    if empty := [n for n in range(count) if not _holds(cache, n, 2)]:
        raise ValueError(f"layers {empty} keep no keys and values")
    second = capture(adapter, ids[:, 2:], mask, positions[:, 2:], frozen_cache(cache, 2, count))
    return adapter.logits(second.run(adapter, second.hidden, 0, count))


def _on_rows(adapter: Parts, rows: Sequence[Tensor]) -> Tensor:
    """Logits (tokens, vocabulary) of all tokens of rows that are padded on the right, layer by layer."""
    mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
    ids = torch.nn.utils.rnn.pad_sequence(list(rows), batch_first=True)
    positions = torch.arange(mask.shape[1], device=mask.device) * mask
    hidden: Tensor | None = None
    for n in range(adapter.num_layers):
        calls = capture(adapter, ids, mask, positions)
        hidden = calls.run(adapter, calls.hidden if hidden is None else hidden, n, n + 1)
    assert hidden is not None
    real = mask.bool().to(hidden.device)
    return adapter.logits(hidden[real])


def other_states(config: Any) -> bool:
    """Whether a layer keeps another state than keys and values, as far as a configuration tells."""
    try:
        layers = DynamicCache(config=config).layers
    except (AttributeError, KeyError, TypeError, ValueError):  # it tells nothing of its layers
        return False
    return any(isinstance(n, LinearAttentionCacheLayerMixin) or not isinstance(n, DynamicLayer) for n in layers)


def _bound(adapter: Parts) -> float:
    """Relative difference of logits that rounding explains."""
    return TOLERANCE if adapter.edited(0).weight.element_size() == 2 else 1e-3  # type: ignore[operator]


def _holds(cache: DynamicCache, layer: int, length: int) -> bool:
    """Whether a layer of a cache has keys (B, heads, length, head size)."""
    keys = getattr(cache.layers[layer], "keys", None) if layer < len(cache.layers) else None
    return isinstance(keys, Tensor) and keys.ndim == 4 and keys.shape[-2] == length
