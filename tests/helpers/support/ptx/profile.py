"""What compiled kernels do, counted on the emulator: instructions by kind, and how warps reach memory.

Rounds are those in which the 32 banks of shared memory serve the words of a warp, sectors the 32 bytes that global
memory is read and written by; both beside the fewest that would do for the same words. The first and only look at bank
conflicts and coalescing that needs no GPU; it knows nothing of time.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from support.ptx import library

KINDS = (
    "mma", "shared", "global", "copy", "shuffle", "barrier", "special", "parameter", "float", "jump", "integer",
)  # fmt: skip
"""Of instructions, as `instructions.h` numbers them."""


@dataclass(frozen=True)
class Site:
    """A place of a kernel that reaches memory."""

    instruction: str
    line: str
    """Of the source; behind "<" where it was inlined."""
    space: str
    """"shared" or "global"."""
    accesses: int
    """Of warps."""
    lanes: int
    cost: int
    """Rounds of shared memory, or sectors of global memory."""
    least: int


@dataclass(frozen=True)
class Counted:
    """A kernel in a profile."""

    name: str
    launches: int
    blocks: int
    threads: int
    instructions: dict[str, int]
    """Of threads, by kind."""
    sites: tuple[Site, ...]


class Profile:
    """What was counted; complete behind the `with` block of `counted`."""

    def __init__(self) -> None:
        self.kernels: list[Counted] = []


@contextmanager
def counted() -> Iterator[Profile]:
    """Count what kernels do that are launched inside: they are compiled for it."""
    machine, profile = library.machine(), Profile()
    machine.ptx_profile_report.restype = ctypes.c_char_p
    machine.ptx_profile(1)
    machine.ptx_forget()
    library.counting = True
    try:
        yield profile
        profile.kernels = _parsed(machine.ptx_profile_report().decode())
    finally:
        library.counting = False
        machine.ptx_forget()
        machine.ptx_profile(0)


def _parsed(report: str) -> list[Counted]:
    kernels: list[Counted] = []
    for line in report.splitlines():
        name, *fields = line.split("\t")
        if name:
            launches, blocks, threads, *counts = map(int, fields)
            kernels.append(Counted(name, launches, blocks, threads, dict(zip(KINDS, counts, strict=True)), ()))
            continue
        place, space, *numbers = fields
        instruction, _, source = place.partition(" ")
        site = Site(instruction, source, {"s": "shared", "g": "global"}[space], *map(int, numbers))
        last = kernels[-1]
        kernels[-1] = Counted(
            *(getattr(last, name) for name in last.__dataclass_fields__ if name != "sites"), (*last.sites, site)
        )
    return kernels
