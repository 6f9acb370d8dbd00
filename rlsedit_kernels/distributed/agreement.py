"""What ranks compare before anything changes: digests of tensors that all of them have."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch.distributed.tensor import DTensor, Shard

from rlsedit_kernels.priors import Prior
from rlsedit_kernels.priors.prior import KINDS

__all__ = ["digest", "digest_of_prior", "digest_of_saved", "digest_of_text"]

_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_ODD = (-7046029254386353131, 6364136223846793005)
_CHUNK = 1 << 20
_LARGEST = (1 << 52) - 1


def digest(*tensors: torch.Tensor) -> float:
    """A whole number below 2^52 made of every bit of dense tensors: other bits, in all likelihood another number.

    Sums of integers modulo 2^64, so that no order of summation matters and no rounding.
    """
    total = 0
    for tensor in tensors:
        bits = tensor.detach().contiguous().view(_INTEGERS[tensor.element_size()]).reshape(-1)
        for start in range(0, bits.numel(), _CHUNK):
            part = bits[start : start + _CHUNK].to(torch.int64)
            place = torch.arange(start, start + part.numel(), device=part.device)
            mixed = (part ^ (part >> 17)) * (2 * place + 1) * _ODD[0]
            total = total * _ODD[1] + int((mixed ^ (mixed >> 29)).sum())
        total += bits.numel()
    total &= (1 << 64) - 1
    return float((total ^ (total >> 13)) & _LARGEST)


def digest_of_prior(prior: Prior) -> float:
    """`digest` of everything that a prior was made from."""
    scalars = [-1.0 if (value := getattr(prior, name)) is None else value for name in ("lam", "mu", "l2")]
    numbers = torch.tensor([KINDS.index(prior.kind), prior.d, *scalars], dtype=torch.float64)
    return digest(numbers, *(array for _, array in sorted(prior.arrays.items())))


def digest_of_text(text: str) -> float:
    """`digest` of a text."""
    return digest(torch.tensor(list(text.encode()), dtype=torch.uint8))


def digest_of_saved(saved: object) -> float:
    """`digest` of all in a `state_dict` that is the same on all ranks: of what is sharded that is shape and dtype."""
    return digest_of_text(_text(saved))


def _text(value: object) -> str:
    if isinstance(value, Mapping):
        return repr(sorted((str(name), _text(entry)) for name, entry in value.items()))
    if isinstance(value, (list, tuple)):
        return repr([_text(entry) for entry in value])
    if isinstance(value, DTensor) and any(isinstance(place, Shard) for place in value.placements):
        return repr((tuple(value.shape), value.dtype, value.placements))
    if isinstance(value, torch.Tensor):
        local = value.to_local() if isinstance(value, DTensor) else value
        return repr((tuple(value.shape), value.dtype, digest(local)))
    return repr(value)
