"""The processes that hold a model: a model that one process has for itself, and what those of many share with it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from .part import Part

__all__ = ["OneProcess", "flat", "row_form"]


class OneProcess:
    """A model that this process holds alone: nothing is exchanged, and every value is everybody's."""

    rank, size = 0, 1
    many = False
    writes = True
    """Whether this process writes files and prints."""

    def part(self, module: nn.Module, layout: str) -> Part:
        """Which part of the weight of an edited module is here: all of it."""
        d, v = row_form(module.weight.shape, layout)  # type: ignore[union-attr, arg-type]
        return Part(d, v, slice(0, d), slice(0, v), "whole")

    def local(self, module: nn.Module) -> Tensor:
        """The tensor that holds this process's part of the weight, as it is stored."""
        weight: Tensor = module.weight.detach()  # type: ignore[operator, union-attr, assignment]
        return weight

    @contextmanager
    def together(self, what: str) -> Iterator[None]:
        """A block without communication that succeeds on all processes or fails on all with the message of one."""
        del what
        yield

    @contextmanager
    def guarded(self, what: str) -> Iterator[None]:
        """A block with communication; what fails in one process makes all fail with its message."""
        del what
        yield

    @contextmanager
    def in_step(self) -> Iterator[None]:
        """A block that fails on all processes or on none, as it sees nothing but what they agree on."""
        yield

    def agree(self, what: str, **values: float) -> None:
        """Refuse numbers that are not the same in all processes."""

    def of_first(self, what: str, work: Callable[[], Any]) -> Any:
        """What `work` gives in the first process, which alone calls it; it fails in all or in none."""
        del what
        return work()

    def same(self, *values: Tensor) -> tuple[Tensor, ...]:
        """The values of the first process."""
        return values

    def total(self, *values: Tensor) -> tuple[Tensor, ...]:
        """The sums over all processes, the same bits everywhere."""
        return values

    def inputs(self, local: Tensor, width: int) -> Tensor:
        """Inputs (..., d) of an edited module, of which a row-parallel one sees its shard; equal bits everywhere."""
        del width
        return local

    def samples(self, parameters: Sequence[Tensor], count: int) -> list[Tensor]:
        """Up to about `count` evenly spaced values of each parameter, float64 on the CPU."""
        return [flat(p)[:: max(1, p.numel() // count)].double().cpu() for p in parameters]

    def awake(self) -> None:
        """Make the weights beside the decoder layers ready to be used."""

    @contextmanager
    def idle(self, layers: Sequence[nn.Module]) -> Iterator[None]:
        """Layers that are called without being run are not made ready inside."""
        del layers
        yield


def row_form(shape: Sequence[int], layout: str) -> tuple[int, int]:
    """(d, v) of a weight that is stored in `layout`."""
    a, b = int(shape[0]), int(shape[1])
    return (a, b) if layout == "in_out" else (b, a)


def flat(value: Tensor) -> Tensor:
    """The values in one dimension."""
    return value.detach().flatten()
