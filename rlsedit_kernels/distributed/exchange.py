"""Bytes between ranks, and what one process does in the place of several."""

from __future__ import annotations

import contextlib
from contextlib import AbstractContextManager

import torch

from rlsedit_kernels.distributed.ranks import Ranks

__all__ = ["announce", "exchange", "position", "together"]


def position(ranks: Ranks | None) -> tuple[int, int]:
    """Rank and number of ranks; None stands for a process alone."""
    return (0, 1) if ranks is None else (ranks.rank, ranks.size)


def together(ranks: Ranks | None, what: str) -> AbstractContextManager[None]:
    """`Ranks.together`."""
    return contextlib.nullcontext() if ranks is None else ranks.together(what)


def exchange(ranks: Ranks | None, data: bytes) -> list[bytes]:
    """What every rank gives, on every rank: an all-gather of the longest, and one of 8 bytes."""
    if ranks is None or ranks.size == 1:
        return [data]
    lengths = ranks.gather(torch.tensor([len(data)], device=ranks.device), ranks.size).tolist()
    row = torch.zeros(1, max(*lengths, 1), dtype=torch.uint8)
    row[0, : len(data)] = torch.frombuffer(bytearray(data or b"\0"), dtype=torch.uint8)[: len(data)]
    rows = ranks.gather(row.to(ranks.device), ranks.size).cpu()
    return [rows[rank, :length].numpy().tobytes() for rank, length in enumerate(lengths)]


def announce(ranks: Ranks | None, data: bytes) -> bytes:
    """What rank 0 gives, on every rank."""
    if ranks is None or ranks.size == 1:
        return data
    length = ranks.broadcast(torch.tensor([len(data)], device=ranks.device), 0)
    row = torch.zeros(int(length), dtype=torch.uint8)
    if ranks.rank == 0:
        row.copy_(torch.frombuffer(bytearray(data), dtype=torch.uint8))
    return ranks.broadcast(row.to(ranks.device), 0).cpu().numpy().tobytes()
