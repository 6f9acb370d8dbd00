"""Programs of one launch that wait for each other's results, in an order that cannot lock.

A program takes a ticket and does the work of that number; it waits only for lower numbers. Who holds one has started,
and the lowest of those that run waits for nobody: some program always moves on, however few fit on the device at once
and in whatever order it starts them.

`publish` makes everything that the program stored visible before the flag; who has seen the flag sees that too. What is
read behind a flag must be loaded after it: such loops are launched with one stage, so that no load is moved ahead.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl


def board(tickets: int, like: torch.Tensor) -> torch.Tensor:
    """A counter and a flag for every ticket, all zero, on the device of `like`."""
    return torch.zeros(1 + tickets, dtype=torch.int32, device=like.device)


@triton.jit
def take_ticket(flags):
    """The number of this program, from 0 on, in the order in which programs start."""
    return tl.atomic_add(flags, 1, sem="relaxed")


@triton.jit
def publish(flags, ticket):
    """What this program has stored is there for all that wait for `ticket`."""
    tl.debug_barrier()  # every thread has stored
    tl.atomic_xchg(flags + 1 + ticket, 1, sem="release")


@triton.jit
def wait_for(flags, ticket):
    """Until `ticket` is published."""
    while tl.atomic_add(flags + 1 + ticket, 0, sem="acquire") == 0:
        pass
