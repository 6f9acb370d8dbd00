"""Products of a model's linear modules on the CPU: of real tokens alone, by the faster of torch's two libraries.

Rows of a batch are padded to one length; what stands where a row has no token is read by nobody, and multiplying it by
weights is most of what it would cost. Float32 matrices torch multiplies by MKL, which leaves AVX-512 unused on
processors of other makers than Intel; oneDNN, which torch carries too, uses it, with the same sums in another order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers.pytorch_utils import Conv1D

__all__ = ["Tokens", "linear_products", "onednn_is_faster"]

WORTH = 0.1
"""Share of padding from which on taking tokens out of it costs less than multiplying it."""


@dataclass(frozen=True)
class Tokens:
    """Places of the tokens of a padded batch.

    Attributes:
        shape: (B, T) of the batch.
        real: (n,) int64, places of tokens in the flattened batch.
        source: (B T,) int64, for each place the token whose product stands there: its own, where padded any.
    """

    shape: tuple[int, int]
    real: Tensor
    source: Tensor

    @classmethod
    def of(cls, mask: Tensor) -> Tokens | None:
        """Those of a mask (B, T), None where leaving out the padding is not worth it or it is not on the CPU."""
        if mask.device.type != "cpu":
            return None
        flat = mask.reshape(-1).bool()
        real = flat.nonzero().flatten()
        if not 0 < len(real) <= (1 - WORTH) * len(flat):
            return None
        source = torch.where(flat, flat.cumsum(0) - 1, 0)
        return cls((mask.shape[0], mask.shape[1]), real, source)


@cache
def onednn_is_faster() -> bool:
    """Whether oneDNN uses instructions of this processor that MKL does not."""
    if not (torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()):
        return False
    ask = getattr(torch.cpu, "get_capabilities", dict)  # newer than the oldest torch that serves
    here: Mapping[str, object] = ask()
    if not here.get("avx512_f") or "intel" in str(here.get("cpu_name", "")).lower():
        return False
    try:  # an op that torch keeps for its own compiler
        return _product(torch.ones(1, 2), torch.ones(3, 2), None, fast=True).tolist() == [[2.0, 2.0, 2.0]]
    except (AttributeError, RuntimeError):
        return False


@contextmanager
def linear_products(modules: Iterable[nn.Module], tokens: Tokens | None = None) -> Iterator[None]:
    """Products on the CPU, inside, of `tokens` alone and by oneDNN where that is faster.

    A module with a `forward` of its own is left alone, and so is one whose weight or bias is trained.
    `torch.backends.mkldnn.flags(enabled=False)` leaves products to MKL.
    """
    onednn = onednn_is_faster() and bool(torch.backends.mkldnn.enabled)  # type: ignore[attr-defined]
    changed: list[tuple[dict[str, Any], str, Any]] = []
    for module in modules if onednn or tokens is not None else ():
        own = module.__dict__
        name = "_old_forward" if "_old_forward" in own else "forward"  # which accelerate's hooks call
        usual = getattr(module, name)
        if type(module) in (nn.Linear, Conv1D) and getattr(usual, "__func__", None) is type(module).forward:
            changed.append((own, name, own.get(name)))
            own[name] = _forward(module, usual, tokens, onednn)
    try:
        yield
    finally:
        for own, name, before in changed:
            own.pop(name) if before is None else own.update({name: before})


def _forward(
    module: nn.Module, usual: Callable[[Tensor], Tensor], tokens: Tokens | None, onednn: bool
) -> Callable[[Tensor], Tensor]:
    turned = type(module) is Conv1D

    def forward(states: Tensor) -> Tensor:
        weight: Any = module.weight
        trained = weight.requires_grad or (module.bias is not None and module.bias.requires_grad)
        fits = type(weight) in (nn.Parameter, Tensor) and not trained and states.dtype == weight.dtype
        fits = fits and states.device.type == weight.device.type == "cpu" and not torch.is_autocast_enabled("cpu")
        fast = onednn and states.dtype == torch.float32
        some = tokens if tokens is not None and states.ndim == 3 and states.shape[:2] == tokens.shape else None
        if not fits or not (fast or some is not None):
            result: Tensor = usual(states)
            return result
        product: Tensor = _Product.apply(states, weight.T if turned else weight, module.bias, some, fast)
        return product

    return forward


def _product(states: Tensor, weight: Tensor, bias: Tensor | None, fast: bool) -> Tensor:
    if fast:
        product: Tensor = torch.ops.mkldnn._linear_pointwise(states, weight, bias, "none", [], "")
        return product
    return nn.functional.linear(states, weight, bias)


class _Product(torch.autograd.Function):
    """states (..., d) times weight (v, d) transposed, plus bias; differentiable in the states alone."""

    @staticmethod
    def forward(
        ctx: Any, states: Tensor, weight: Tensor, bias: Tensor | None, tokens: Tokens | None, fast: bool
    ) -> Tensor:
        ctx.save_for_backward(weight)
        ctx.tokens, ctx.fast = tokens, fast
        if tokens is None:
            return _product(states, weight, bias, fast)
        product = _product(states.reshape(-1, states.shape[-1])[tokens.real], weight, bias, fast)
        return product[tokens.source].view(*states.shape[:-1], -1)  # finite where padded, whatever comes behind

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        (weight,), tokens = ctx.saved_tensors, ctx.tokens
        if tokens is None:
            return _product(gradient.contiguous(), weight.T, None, ctx.fast), None, None, None, None
        some = _product(gradient.reshape(-1, gradient.shape[-1])[tokens.real], weight.T, None, ctx.fast)
        whole = some.new_zeros(len(tokens.source), some.shape[-1]).index_copy_(0, tokens.real, some)
        return whole.view(*gradient.shape[:-1], -1), None, None, None, None
