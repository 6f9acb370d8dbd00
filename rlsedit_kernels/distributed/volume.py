"""Bytes that a rank receives: formulas for every form, and a counter that measures them.

What is counted: the payload that a rank takes from the others in a collective, padding of uneven shards included. Of
an all-gather of shards of b bytes each, and of an all-to-all of such parts, that is (size - 1) b; of a broadcast b on
every rank but the source. What a collective costs beyond that on the wire (headers, retries, a tree's detours) is the
library's business. The sum over ranks in their order is an all-to-all and an all-gather.
The square-root state's are in `square_root_volume.py`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from rlsedit_kernels.distributed.ranks import _NUMBERS, bounds
from rlsedit_kernels.states.health import PROBES

__all__ = ["Received", "batch_bytes", "check_bytes", "confirm_bytes"]

FORMS = ("plain", "whitened", "inverse_root")
_WIDE = 8


def batch_bytes(
    form: str,
    d: int,
    u: int,
    size: int,
    dtype: torch.dtype = torch.float32,
    *,
    storage: torch.dtype | None = None,
    rank: int | None = None,
    prior_root: bool = False,
    mapped: bool = False,
    keys_sharded: bool = True,
    careful: bool = False,
) -> int:
    """Bytes that each rank receives in one `update` of a sharded covariance; a check of the guard is `check_bytes`.

    With s bytes a number, P ranks and r the rank of the prior, to leading order and without the small exchanges:

    | form | prior | received |
    |---|---|---|
    | plain | any | (P - 1) / P s d u for Y, and as much for K where it comes sharded over d |
    | whitened | ridge | the same |
    | whitened | with a root | 3 (P - 1) / P s r u: the sum K T, and Y |
    | inverse root | ridge, or a root that is not kept (`mapped` false) | 2 (P - 1) / P s r u: the sum F = A'K' |
    | inverse root | with a root that is kept (`mapped`) | 4 (P - 1) / P s r u: rows of T'K', F, and Y |

    Args:
        form: "plain", "whitened" or "inverse_root".
        d: dimension of a key.
        u: keys of the batch.
        size: ranks.
        dtype: of keys and gains.
        storage: in which the covariance is kept; None for `dtype`.
        rank: r, columns of the prior's root; None for d.
        prior_root: whether the prior has a root other than a number: every prior but a ridge.
        mapped: of an inverse root of such a prior, whether it is kept in whitened coordinates
            (`states/inverse_root.py`).
        keys_sharded: whether keys come sharded over d, or every rank has them.
        careful: whether the batch had to be worked out in float64: its products are made twice. Without what a root
            that is kept in whitened coordinates sends where such a batch is factored from F (`states/batch.py`).

    Raises:
        ValueError: an unknown form.
    """
    _known(form, "batch_bytes")
    r, item = rank or d, (storage or dtype).itemsize
    total = 2 * confirm_bytes(size) + _sum(u * (1 + min(PROBES, r)), size, _WIDE)
    if keys_sharded and (form == "plain" or (form == "whitened" and not prior_root)):
        total += _gather(d, u, size, dtype.itemsize)
    if form == "inverse_root" and prior_root and mapped:
        total += _sum(u, size, _WIDE)
    widths = (item, _WIDE) if careful else (item,)
    return total + sum(_products(form, r, u, size, width, prior_root, mapped) for width in widths)


def _products(form: str, r: int, u: int, size: int, item: int, prior_root: bool, mapped: bool) -> int:
    if form == "plain" or (form == "whitened" and not prior_root):
        return _gather(r, u, size, item)
    if form == "whitened":
        return _sum(u * r, size, item) + _gather(r, u, size, item)
    if not (prior_root and mapped):
        return _sum(u * r, size, item)
    rows = (size - 1) * bounds(r, size)[1] * u * item if size > 1 else 0
    return rows + _sum(u * r, size, item) + _gather(r, u, size, item)


def check_bytes(
    form: str, d: int, size: int, *, rank: int | None = None, prior_root: bool = False, mapped: bool = False
) -> int:
    """Bytes that each rank receives in one check of the guard: before batches 2, 3, 5, 9, 17, 33, then every 64.

    Arguments as those of `batch_bytes`. Products of a few probe vectors in float64; nothing depends on u.
    """
    _known(form, "check_bytes")
    r = rank or d
    p = min(PROBES, r)
    inner = _sum(r * p, size, _WIDE) if prior_root else _gather(r, p, size, _WIDE)
    both = _sum(r * 2 * p, size, _WIDE) if prior_root else _gather(r, 2 * p, size, _WIDE)
    if form == "plain":
        return _gather(d, p, size, _WIDE) + both
    if form == "whitened":
        return inner + inner + _gather(r, p, size, _WIDE)
    if mapped or not prior_root:
        return inner + _sum(r * p, size, _WIDE) + _gather(r, p, size, _WIDE) + _sum(p, size, _WIDE)
    return _gather(d, p, size, _WIDE) + _sum(r * p, size, _WIDE) + _sum(2 * p, size, _WIDE)


def _known(form: str, what: str) -> None:
    if form not in FORMS:
        raise ValueError(f"{what}: form must be one of {', '.join(map(repr, FORMS))}, got {form!r}")


def confirm_bytes(size: int) -> int:
    """Bytes of one exchange of numbers that must agree (`Ranks.confirmed`)."""
    return (size - 1) * 8 * (_NUMBERS + 2)


def _gather(n: int, width: int, size: int, item: int) -> int:
    """An all-gather of n rows of `width` numbers."""
    return (size - 1) * bounds(n, size)[1] * width * item


def _sum(n: int, size: int, item: int) -> int:
    """A sum of n numbers in the order of the ranks."""
    return 2 * (size - 1) * -(-n // size) * item


class Received(TorchDispatchMode):
    """Counts what this process receives in the collectives of `torch.distributed` within the block.

    Attributes:
        bytes: received from other ranks.
        calls: collectives by their name in `torch.ops.c10d`.
    """

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0
        self.calls: dict[str, int] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func.namespace == "c10d":
            name = func._schema.name.removeprefix("c10d::")
            self.calls[name] = self.calls.get(name, 0) + 1
            self.bytes += _received(name, args)
        return func(*args, **(kwargs or {}))


def _received(name: str, args: tuple[Any, ...]) -> int:
    if name in ("_allgather_base_", "alltoall_base_"):  # (output, input, group, ...)
        return args[0].nbytes - args[0].nbytes // torch.distributed.ProcessGroup.unbox(args[2]).size()
    if name == "broadcast_":  # (tensors, group, root, ...)
        group = torch.distributed.ProcessGroup.unbox(args[1])
        return 0 if group.rank() == args[2] else sum(tensor.nbytes for tensor in args[0])
    if name == "recv_":
        return sum(tensor.nbytes for tensor in args[0])
    if name in ("send", "barrier"):
        return 0
    raise NotImplementedError(f"Received: c10d::{name} is not counted; add it to volume.py")
