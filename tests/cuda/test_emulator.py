"""The emulator of CUDA's execution model: what it has to notice, it notices; the engines multiply what they should."""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support import emulated


@pytest.fixture(scope="module")
def library() -> Any:
    source = Path(__file__).with_name("emulator.cpp")
    try:
        path = emulated.compile_for_cpu([source], emulated.ROOT / "build" / "emulated" / "emulator", with_torch=False)
    except emulated.CannotEmulate as error:
        pytest.skip(f"CUDA kernels on the CPU: {error}")
    loaded = ctypes.CDLL(str(path))
    for name in ("neighbour", "divergent", "beyond", "too_much", "copied", "chained"):
        getattr(loaded, name).restype = ctypes.c_char_p
    return loaded


def pointer(array: np.ndarray) -> ctypes.c_void_p:
    return ctypes.c_void_p(array.ctypes.data)


@pytest.mark.parametrize("waits", [0, 1])
def test_a_missing_barrier_shows_in_the_order_of_warps(waits, library) -> None:
    outputs = []
    for descending in (0, 1):
        library.descending(descending)
        out = np.zeros(64, dtype=np.float32)
        assert library.neighbour(pointer(out), waits) == b""
        outputs.append(out)
    library.descending(0)
    right = np.concatenate([np.arange(32, 64), np.arange(32)])
    assert all(np.array_equal(out, right) for out in outputs) == bool(waits)
    assert np.isnan(outputs[0]).any() == (not waits)  # shared memory holds NaN until it is written


def test_a_barrier_that_not_all_reach_is_an_error(library) -> None:
    assert b"barrier that not all threads reach" in library.divergent()
    out = np.zeros(64, dtype=np.float32)
    assert library.neighbour(pointer(out), 1) == b""  # and the next launch is not spoiled


def test_memory_behind_the_block_is_guarded(library) -> None:
    assert library.beyond(-1) == b""
    assert b"write behind the shared memory" in library.beyond(0)
    assert b"shared memory" in library.too_much()


def test_a_copy_takes_place_when_it_is_waited_for(library) -> None:
    given, out = np.arange(32, dtype=np.float32), np.zeros(32, dtype=np.float32)
    assert library.copied(pointer(given), pointer(out), 0) == b""
    assert np.array_equal(out, given)
    assert library.copied(pointer(given), pointer(out), 1) == b""
    assert np.isnan(out).all()
    assert b"nobody waited for" in library.copied(pointer(given), pointer(out), 2)


def chained(library: Any, by_ticket: int, waits: int, descending: int, beside: int) -> tuple[bytes, np.ndarray]:
    """Nine blocks, each of which adds to what the one before it has left."""
    counters, sums = np.full(64, 7, np.uint32), np.zeros(9, np.float32)
    library.descending(descending)
    library.beside(beside)
    said = library.chained(pointer(counters), pointer(sums), 9, by_ticket, waits)
    library.descending(0)
    library.beside(1)
    return said, sums


@pytest.mark.parametrize("by_ticket", [0, 1])
@pytest.mark.parametrize("descending", [0, 1])
@pytest.mark.parametrize("beside", [1, 3, 9])
def test_a_block_that_waits_for_a_later_one_is_an_error(beside, descending, by_ticket, library) -> None:
    """Tickets follow the order in which blocks start, whatever it is; the numbers of the blocks do not."""
    said, sums = chained(library, by_ticket, 1, descending, beside)
    if descending and not by_ticket and beside < 9:
        assert b"waits for one that starts after it" in said
        said, sums = chained(library, 1, 1, descending, beside)  # and the next launch is not spoiled
    assert said == b""
    assert np.array_equal(sums, np.arange(9).cumsum())


@pytest.mark.parametrize("beside", [1, 3])
def test_a_block_that_does_not_wait_shows_beside_others(beside, library) -> None:
    said, sums = chained(library, 1, 0, 0, beside)
    assert said == b""
    assert np.array_equal(sums, np.arange(9).cumsum()) == (beside == 1)


@pytest.mark.parametrize("turned", [0, 1])
@pytest.mark.parametrize(("name", "dtype"), [("tf32x3", np.float32), ("float32", np.float32), ("float64", np.float64)])
def test_a_tile_of_every_engine(name, dtype, turned, library) -> None:
    """The fragment layouts of the PTX ISA: a lane's elements of A, of B and of the sums belong together."""
    rng, depth = np.random.default_rng(0), 24
    A, B = rng.standard_normal((16, depth)).astype(dtype), rng.standard_normal((8, depth)).astype(dtype)
    given, out = np.ascontiguousarray(B.T) if turned else B, np.zeros((16, 8), dtype=dtype)
    getattr(library, f"tile_{name}")(pointer(A), pointer(given), pointer(out), depth, turned)
    exact = A.astype(np.float64) @ B.astype(np.float64).T
    assert np.abs(out - exact).max() < 8 * np.finfo(dtype).eps * np.abs(exact).max()


def test_a_product_of_tf32_keeps_what_a_single_pass_loses(library) -> None:
    """1 + 2^-20 squared needs the low parts: a single pass of tf32 gives 1."""
    A, B = np.zeros((16, 8), np.float32), np.zeros((8, 8), np.float32)
    A[3, 5] = B[6, 5] = 1.0 + 2.0**-20
    out = np.zeros((16, 8), np.float32)
    library.tile_tf32x3(pointer(A), pointer(B), pointer(out), 8, 0)
    assert abs(float(out[3, 6]) - (1.0 + 2.0**-20) ** 2) < 2.0**-22
    out[3, 6] = 0.0
    assert not out.any()


@pytest.mark.parametrize("pattern", [0x7FFFFFFF, 0xFFFFFFFF, 0x7FC00000, 0x7F800001, 0x7F800000])
def test_what_is_not_finite_is_not_lost(pattern, library) -> None:
    """A GPU's own NaN has all bits set: added to, it would turn into zero."""
    A, B = np.zeros((16, 8), np.float32), np.ones((8, 8), np.float32)
    A.view(np.uint32)[7, 2] = pattern
    out = np.zeros((16, 8), np.float32)
    library.tile_tf32x3(pointer(A), pointer(B), pointer(out), 8, 0)
    assert not np.isfinite(out[7]).any()
    assert np.isfinite(np.delete(out, 7, axis=0)).all()
