"""Which part of an edited weight a process holds."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Part", "digest"]


@dataclass(frozen=True)
class Part:
    """The rows or the columns of a weight in row form W (d, v) that lie here.

    Attributes:
        d, v: shape of the whole weight.
        rows, columns: what is here; one of them is everything.
        kind: "rows" (tensor parallel: the layer is row-parallel, its input is sharded), "columns" (FSDP2: the layer's
            outputs are sharded) or "whole".
    """

    d: int
    v: int
    rows: slice
    columns: slice
    kind: str

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns that are here."""
        return self.rows.stop - self.rows.start, self.columns.stop - self.columns.start

    def of(self, whole: Tensor) -> Tensor:
        """This part of a (d, v) matrix; a view."""
        return whole[self.rows, self.columns]

    def product(self, gain: Tensor, residual: Tensor) -> Tensor:
        """This part of gain (d, u) @ residual (u, v)."""
        return gain[self.rows] @ residual[:, self.columns]


def digest(*values: Tensor) -> float:
    """A number of 48 bits that stands for the bits of tensors of one process, small enough to compare everywhere."""
    import hashlib

    found = hashlib.blake2b(digest_size=6)
    for value in values:
        found.update(f"{tuple(value.shape)}{value.dtype}".encode())
        found.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return float(int.from_bytes(found.digest(), "big"))
