"""What ranks compare before anything changes: the numbers of a call, and digests of tensors that all of them have."""

from __future__ import annotations

import torch

from rlsedit_kernels.distributed.ranks import Ranks
from rlsedit_kernels.priors import Prior
from rlsedit_kernels.priors.prior import KINDS

__all__ = ["agree_on_batch", "agree_on_prior", "digest"]

OPERATIONS = (
    "gain",
    "commit",
    "update",
    "append_with",
    "half",
    "solve",
    "remove",
    "remove_with",
    "restrict",
    "refactor",
)

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


def agree_on_batch(
    ranks: Ranks, op: str, *, steps: int, u: int, dtype: torch.dtype, noise: float, forget: float, keys: float
) -> None:
    """Check that all ranks are about to do the same with the same batch.

    Args:
        op: one of `OPERATIONS`.
        steps: batches in the state.
        u: keys of the batch.
        dtype: of the state.
        noise, forget: of the batch.
        keys: `digest` of what all ranks must have alike.

    Raises:
        ValueError: they differ; the text has the first difference.
    """
    ranks.agree(
        op,
        operation=OPERATIONS.index(op),
        steps=steps,
        u=u,
        itemsize=dtype.itemsize,
        noise=noise,
        forget=forget,
        digest_of_K=keys,
    )


def agree_on_prior(ranks: Ranks, what: str, prior: Prior, dtype: torch.dtype, *derived: torch.Tensor | None) -> None:
    """Check that all ranks start from the same prior, to the bit, and that what they derived from it is the same too.

    Raises:
        ValueError: they differ. A basis that was derived on machines of two kinds may: read it from one file.
    """
    scalars = {name: -1.0 if (value := getattr(prior, name)) is None else value for name in ("lam", "mu", "l2")}
    ranks.agree(
        what,
        prior=KINDS.index(prior.kind),
        d=prior.d,
        itemsize=dtype.itemsize,
        **scalars,
        digest_of_prior=digest(*(array for _, array in sorted(prior.arrays.items()))),
        digest_of_basis=digest(*(tensor for tensor in derived if tensor is not None)),
    )
