"""Compiled kernels reach memory about as well as they can: no bank conflicts, whole sectors (`pytest --ptx`)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import accesses
import pytest
from support import emulated

# Times the least for the same words. Of a small downdate most tiles are on the diagonal, which are written element by
# element; the kernel that adds the parts of G writes it along and across.
MOST_ROUNDS, MOST_SECTORS, ACROSS = 1.3, 1.7, {"add_gram_kernel<float>"}


@pytest.fixture(scope="module")
def call(kernels: Any) -> Callable[..., object]:
    if not emulated.uses_ptx():
        pytest.skip("about the library that nvcc compiled (--ptx)")
    return accesses.kernels_of("cuda")


@pytest.mark.parametrize("u", [100, 50])
@pytest.mark.parametrize("case", list(accesses.cases(8, 2, 4)))
def test_few_rounds_and_sectors_more_than_the_least(case, u, call) -> None:
    op, given = accesses.cases(256, u, 128)[case]
    rows = accesses.rows_of("cuda", case, u, accesses.counted(call, op, given))
    assert rows
    for row in rows:
        assert row["rounds"] <= MOST_ROUNDS * row["least_rounds"], row
        assert row["kernel"] in ACROSS or row["sectors"] <= MOST_SECTORS * row["least_sectors"], row
