"""Tile sizes, warps and stages of every kernel, in one place: by kernel, architecture, element size and size class.

Nothing is tuned at import or inside a stream: a launch looks its row up. `bench/tune_triton.py` times candidates on a
GPU and prints rows for this table; rows that were not measured say so.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch

from rlsedit_kernels.triton_kernels.launch import INTERPRETED


@dataclass(frozen=True)
class Tiles:
    """Rows of C (or Y) of a program, keys and depth of a step, warps, and stages of the software pipeline."""

    rows: int
    keys: int
    depth: int
    warps: int = 4
    stages: int = 3


# (kernel, architecture, bytes of an element, "few" up to 32 keys or "many") -> tiles. None of these was measured on a
# GPU yet: they follow from shared memory (228 KB on sm_90, 164 on sm_80, 64 on gfx942) and from two programs on each
# multiprocessor. Two rows of float32 on CUDA follow from the compiled code: with 8 warps the warp groups of
# `gain_products` form the same 64 rows twice, and `downdate_gain_products_` of 128 keys spills registers, so that it is
# the two ops beyond 32 keys.
_TABLE: dict[tuple[str, str, int, str], Tiles] = {
    ("gain_products", "cuda", 4, "few"): Tiles(64, 32, 64, 4, 4),
    ("gain_products", "cuda", 4, "many"): Tiles(64, 128, 32, 4, 3),
    ("gain_products", "cuda", 8, "few"): Tiles(64, 32, 32, 4, 3),
    ("gain_products", "cuda", 8, "many"): Tiles(64, 64, 16, 8, 3),
    ("gain_products", "hip", 4, "few"): Tiles(64, 32, 32, 4, 2),
    ("gain_products", "hip", 4, "many"): Tiles(64, 64, 32, 8, 2),
    ("gain_products", "hip", 8, "few"): Tiles(32, 32, 32, 4, 2),
    ("gain_products", "hip", 8, "many"): Tiles(32, 64, 16, 8, 2),
    ("downdate_", "cuda", 4, "few"): Tiles(64, 32, 32, 4, 2),
    ("downdate_", "cuda", 4, "many"): Tiles(64, 32, 32, 4, 3),
    ("downdate_", "cuda", 8, "few"): Tiles(32, 32, 32, 4, 2),
    ("downdate_", "cuda", 8, "many"): Tiles(64, 16, 16, 8, 2),
    ("downdate_", "hip", 4, "few"): Tiles(32, 32, 32, 4, 2),
    ("downdate_", "hip", 4, "many"): Tiles(64, 32, 32, 8, 2),
    ("downdate_", "hip", 8, "few"): Tiles(32, 16, 16, 4, 2),
    ("downdate_", "hip", 8, "many"): Tiles(32, 16, 16, 4, 2),
    ("downdate_gain_products_", "cuda", 4, "few"): Tiles(64, 32, 64, 4, 2),
    ("downdate_gain_products_", "cuda", 4, "many"): Tiles(64, 32, 64, 4, 2),
    ("downdate_gain_products_", "cuda", 8, "few"): Tiles(32, 32, 32, 4, 2),
    ("downdate_gain_products_", "cuda", 8, "many"): Tiles(32, 128, 32, 8, 1),
    ("downdate_gain_products_", "hip", 4, "few"): Tiles(32, 32, 32, 4, 2),
    ("downdate_gain_products_", "hip", 4, "many"): Tiles(32, 128, 32, 8, 1),
    ("downdate_gain_products_", "hip", 8, "few"): Tiles(32, 32, 32, 4, 1),
    ("downdate_gain_products_", "hip", 8, "many"): Tiles(16, 64, 16, 4, 1),
    ("gain_solve", "cuda", 4, "few"): Tiles(64, 32, 32, 4, 2),
    ("gain_solve", "cuda", 4, "many"): Tiles(64, 32, 32, 4, 3),
    ("gain_solve", "cuda", 8, "few"): Tiles(32, 32, 32, 4, 2),
    ("gain_solve", "cuda", 8, "many"): Tiles(32, 32, 32, 4, 2),
    ("gain_solve", "hip", 4, "few"): Tiles(32, 32, 32, 4, 2),
    ("gain_solve", "hip", 4, "many"): Tiles(32, 32, 32, 4, 2),
    ("gain_solve", "hip", 8, "few"): Tiles(32, 16, 16, 4, 2),
    ("gain_solve", "hip", 8, "many"): Tiles(32, 16, 16, 4, 2),
}
_SMALL = Tiles(32, 32, 32, 4, 1)  # the interpreter: fewer, larger steps cost less there; small enough to have edges


@cache
def _architecture() -> str:
    return "interpreter" if INTERPRETED else "hip" if torch.version.hip is not None else "cuda"


def tiles(kernel: str, A: torch.Tensor, u: int, architecture: str | None = None) -> Tiles:
    """The row for tensors like A and batches of u keys."""
    name = architecture or _architecture()
    if name == "interpreter":
        return _SMALL
    return _TABLE[kernel, name, A.element_size(), "few" if u <= 32 else "many"]
