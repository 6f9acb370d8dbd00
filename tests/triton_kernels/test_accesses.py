"""What Triton compiles reaches shared memory without bank conflicts (`pytest --device cuda --pretend-cuda --ptx`)."""

from __future__ import annotations

import accesses
import pytest
import triton as triton_compiler
from support import emulated

from rlsedit_kernels import triton_kernels
from rlsedit_kernels.backends import triton

# Products of the Cholesky factor are IEEE: Triton forms them without tensor cores. One right operand of `gain_solve`
# has its terms one below the other. Triton 3.6 sums over warps with conflicts that 3.9 has not.
MOST = {"cholesky_kernel": 2.5, "gain_solve_kernel": 1.5}
if triton_compiler.__version__.split(".")[:2] < ["3", "7"]:
    MOST |= {"cholesky_kernel": 2.9, "solve_kernel": 3.4}


@pytest.mark.skipif(not emulated.uses_ptx() or triton.interpreted(), reason="about what Triton compiles (--ptx)")
@pytest.mark.parametrize("u", [100, 50])
@pytest.mark.parametrize("case", list(accesses.cases(8, 2, 4)))
def test_no_bank_conflicts(case, u) -> None:
    """Of batches whose keys are multiples of 16 bytes, and of others."""
    d = 1024 if case.startswith("weight_update_") else 256  # K W in parts, and their sum
    op, given = accesses.cases(d, u, 128)[case]

    def call(name: str, *arguments: object) -> object:
        return triton_kernels.KERNELS[name](*arguments, input_precision="tf32x3")

    rows = accesses.rows_of("triton", case, u, accesses.counted(call, op, given))
    assert rows
    for row in rows:
        assert row["rounds"] <= MOST.get(row["kernel"], 1.1) * row["least_rounds"], row
        assert row["sectors"] <= 1.8 * row["least_sectors"], row
