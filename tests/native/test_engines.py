"""Every op on every engine of the native CPU library that this processor has: baseline, AVX2, AVX-512.

A process has one engine, chosen when it starts (`RLSEDIT_CPU_ENGINE`): each runs in its own.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support import builders, tolerances
from support.kernel_cases import arguments

import rlsedit_kernels as rk
from rlsedit_kernels.backends import cpu
from rlsedit_kernels.ops.schemas import SCHEMAS
from rlsedit_kernels.states import adding

ENGINES = ("baseline", "avx2", "avx512")
SIZES = ((5, 1), (33, 3), (97, 12), (130, 17), (195, 37), (260, 100), (300, 150))
"""d and u around the edges of blocks, panels, slabs and of what counts as few keys."""

available, reason = cpu.load()
pytestmark = pytest.mark.skipif(not available, reason=f"the native CPU library is not here: {reason}")


def outcome(op: str, backend: str, dtype: torch.dtype, d: int, u: int) -> list[torch.Tensor]:
    """What an op returns, and its arguments as it leaves them."""
    batch = () if op in cpu.HELPERS else (2,)
    given = tuple(a.to(dtype) if isinstance(a, torch.Tensor) else a for a in arguments(op, torch.float64, batch, d, u))
    with rk.use_backend(backend):
        returned = getattr(adding if op in cpu.HELPERS else rk.ops, op)(*given)
    outputs = returned if isinstance(returned, tuple) else () if returned is None else (returned,)
    return [*outputs, *(value for value in given if isinstance(value, torch.Tensor))]


def large_downdate(d: int, offset: int, dtype: torch.dtype) -> dict[str, object]:
    """A matrix that no cache holds, whose mirrored tiles are written past it: where aligned, or one by one."""
    storage = torch.full((d * d + offset,), float("nan"), dtype=dtype)
    C, Z = storage[offset:].view(d, d), builders.columns((), d, 3, dtype, 1)
    C.copy_(torch.eye(d, dtype=dtype))
    with rk.use_backend("cpu"):
        rk.ops.downdate_(C, Z, -0.5)
    expected = torch.eye(d, dtype=torch.float64).addmm_(Z.double(), Z.double().mT, alpha=-0.5)
    error = float((C.double() - expected).norm() / expected.norm()) / torch.finfo(dtype).eps
    return {"symmetric": torch.equal(C, C.mT), "error": error}


def trial() -> dict[str, object]:
    """Largest errors, in units of eps, of the engine that this process has."""
    worst: dict[str, float] = {}
    for dtype in (torch.float32, torch.float64):
        for op in (*SCHEMAS, *cpu.HELPERS):
            for d, u in SIZES:
                mine, exact = outcome(op, "cpu", dtype, d, u), outcome(op, "torch", torch.float64, d, u)
                error = max(tolerances.relative_error(a, b) for a, b in zip(mine, exact, strict=True))
                worst[f"{op} {d} {u} {dtype}"] = error / (torch.finfo(dtype).eps * d**0.5)
    large = [
        large_downdate(*case) for case in ((3072, 0, torch.float32), (3001, 3, torch.float32), (2112, 0, torch.float64))
    ]
    return {"engine": rk.build_info()["float32"]["in_use"]["name"], "worst": worst, "large": large}


@pytest.mark.parametrize("engine", ENGINES)
def test_every_op_on_every_engine(engine: str) -> None:
    helpers = str(Path(__file__).resolve().parents[1] / "helpers")
    code = (
        f"import sys, json; sys.path[:0] = [{helpers!r}, {str(Path(__file__).parent)!r}];"
        "import test_engines; json.dump(test_engines.trial(), sys.stdout)"
    )
    environment = {**os.environ, "RLSEDIT_CPU_ENGINE": engine}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout)
    if found["engine"] != engine:
        pytest.skip(f"this processor has no {engine}")
    too_large = {case: error for case, error in found["worst"].items() if not error < 4.0}
    assert not too_large
    for large in found["large"]:
        assert large["symmetric"]
        assert large["error"] < 4.0
