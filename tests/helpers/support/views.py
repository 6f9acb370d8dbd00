"""Hostile memory layouts around a tensor, with sentinels that catch a write outside of it."""

from __future__ import annotations

import torch

SENTINEL = 12345.0
LAYOUTS = ("contiguous", "transposed", "sliced", "stepped")


class View:
    """A view with the values of `value` inside a larger buffer of sentinels.

    Attributes:
        tensor: the view to hand to an op.
    """

    def __init__(self, value: torch.Tensor, layout: str) -> None:
        *batch, rows, cols = value.shape
        if layout == "contiguous":
            shape, index = (rows, cols), (slice(None), slice(None))
        elif layout == "transposed":
            shape, index = (cols, rows), (slice(None), slice(None))
        elif layout == "sliced":
            shape, index = (rows + 5, cols + 3), (slice(2, 2 + rows), slice(1, 1 + cols))
        elif layout == "stepped":
            shape, index = (2 * rows + 1, 3 * cols + 1), (slice(1, 1 + 2 * rows, 2), slice(1, 1 + 3 * cols, 3))
        else:
            raise ValueError(layout)
        self.buffer = torch.full((*batch, *shape), SENTINEL, dtype=value.dtype)
        view = self.buffer[(..., *index)]
        self.tensor = view.mT if layout == "transposed" else view
        assert self.tensor.shape == value.shape
        self.tensor.copy_(value)
        self.outside = torch.ones_like(self.buffer, dtype=torch.bool)
        self.outside[(..., *index)] = False

    def untouched_outside(self) -> bool:
        """Whether every sentinel is still there."""
        return bool((self.buffer[self.outside] == SENTINEL).all())


def at_an_odd_address(value: torch.Tensor) -> torch.Tensor:
    """A contiguous copy on the CPU that begins one byte behind a multiple of its element size."""
    memory = bytearray((value.numel() + 1) * value.element_size())
    for offset in range(1, value.element_size() + 1):
        copy = torch.frombuffer(memory, dtype=value.dtype, count=value.numel(), offset=offset).view(value.shape)
        if copy.data_ptr() % value.element_size() == 1:
            break
    return copy.copy_(value)
