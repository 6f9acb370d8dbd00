"""The CUDA kernels as other GPUs than Hopper's would run them: less shared memory, other numbers of multiprocessors.

What a launch asks of a device is decided on the host (`csrc/cuda/tensors.h`): an RTX 4090 allows a block 99 KiB, an
H200 227. The emulator refuses a launch that asks for more than the GPU has.
"""

from __future__ import annotations

import pytest
import torch
from support import emulated, tolerances
from support.kernel_cases import ENGINES as ENGINE_TABLE
from support.kernel_cases import arguments, results

from rlsedit_kernels.ops.schemas import SCHEMAS

ENGINES = pytest.mark.parametrize(("dtype", "precision"), ENGINE_TABLE.values(), ids=ENGINE_TABLE.keys())
OPS = pytest.mark.parametrize("op", SCHEMAS)
LITTLE = emulated.GPU(99 * 1024, emulated.GPUS["H200"].processors)


@ENGINES
@OPS
@pytest.mark.parametrize(("d", "u"), [(165, 40), (200, 200)], ids=["some keys", "many keys"])
def test_less_shared_memory_changes_no_bit(op, d, u, dtype, precision, emulator) -> None:
    """Two buffers for three; a factor that does not fit goes to global memory (u = 200)."""
    first = results(op, arguments(op, dtype, (2,), d, u), precision)
    with emulated.gpu(LITTLE):
        other = results(op, arguments(op, dtype, (2,), d, u), precision)
    assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True))
    assert all(bool(torch.isfinite(a).all()) for a in first)


@ENGINES
@pytest.mark.parametrize("name", ["A100", "one multiprocessor"])
@OPS
def test_every_gpu_gives_the_same_but_for_rounding(op, name, dtype, precision, emulator) -> None:
    """Sums over d are cut into other parts by other numbers of multiprocessors."""
    expected = results(op, arguments(op, torch.float64, (), 530, 12), "ieee")
    with emulated.gpu(emulated.GPUS[name]):
        outcome = results(op, arguments(op, dtype, (), 530, 12), precision)
    bound = tolerances.solve(12, 1e2, dtype)
    assert all(tolerances.relative_error(a, b) < bound for a, b in zip(outcome, expected, strict=True))


@pytest.mark.parametrize("name", emulated.GPUS)
def test_wgmma_is_for_hopper(name, emulator, monkeypatch) -> None:
    """Asked for on another GPU, products are formed without it."""
    monkeypatch.setenv("RLSEDIT_CUDA_WGMMA", "1")
    with emulated.gpu(emulated.GPUS[name]):
        before = emulated.launches()
        results("gain_products", arguments("gain_products", torch.float32, (), 72, 40), "tf32x3")
    assert emulated.launches() - before == (4 if emulated.GPUS[name].warpgroups else 3)
