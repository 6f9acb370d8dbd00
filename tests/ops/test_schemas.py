"""The schema table is the contract: every op has all its parts, and each part agrees with the schema."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support import pretended
from support.op_arguments import arguments

import rlsedit_kernels as rk
from rlsedit_kernels.ops.schemas import SCHEMAS, written

ROOT = Path(__file__).resolve().parents[2]
PARTS = {
    "wrapper": "rlsedit_kernels/ops/{op}.py",
    "reference": "rlsedit_kernels/reference/{op}.py",
    "native CPU kernel": "csrc/cpu/{op}.cpp",
    "CUDA kernel": "csrc/cuda/{op}.cu",
    "Triton kernel": "rlsedit_kernels/triton_kernels/{op}.py",
    "test": "tests/ops/test_{op}.py",
    "benchmark": "bench/ops/bench_{op}.py",
}

on_a_true_device = pytest.mark.skipif(
    pretended.active(), reason="torch.compile wants a device that is there, not a pretended one"
)
torchs_own = pytest.mark.skipif(pretended.active(), reason="what torch knows of a tensor of its own")


@pytest.mark.parametrize("op", SCHEMAS)
@pytest.mark.parametrize("part", PARTS)
def test_every_op_has_every_part(op: str, part: str) -> None:
    path = ROOT / PARTS[part].format(op=op)
    assert path.is_file(), f"{op} has no {part}: {path.relative_to(ROOT)} is missing"


@pytest.mark.parametrize("op", SCHEMAS)
def test_wrapper_and_reference_are_public(op: str) -> None:
    assert callable(getattr(rk.ops, op))
    assert callable(getattr(rk.reference, op))
    assert (getattr(rk.ops, op).__doc__ or "").count("Args:") == 1


@pytest.mark.parametrize("op", SCHEMAS)
def test_registered_schema_is_the_table(op: str) -> None:
    schema = getattr(torch.ops.rlsedit_kernels, op).default._schema
    assert schema == torch._C.parse_schema(f"rlsedit_kernels::{op}{SCHEMAS[op]}")


@pytest.mark.parametrize("op", SCHEMAS)
def test_what_is_written_comes_first(op: str) -> None:
    schema = getattr(torch.ops.rlsedit_kernels, op).default._schema
    marks = [a.alias_info is not None and a.alias_info.is_write for a in schema.arguments]
    assert marks == sorted(marks, reverse=True)
    assert sum(marks) == written(op)


@pytest.mark.parametrize("op", SCHEMAS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("batch", [(), (2,)], ids=["single", "batched"])
def test_opcheck(op: str, dtype: torch.dtype, batch: tuple[int, ...], backend: str) -> None:
    checks = ["test_schema", "test_autograd_registration", "test_faketensor"]
    if not pretended.active():
        checks.append("test_aot_dispatch_dynamic")
    function = getattr(torch.ops.rlsedit_kernels, op).default
    torch.library.opcheck(function, arguments(op, dtype, batch), test_utils=checks)


@torchs_own
@pytest.mark.parametrize("op", [op for op in SCHEMAS if op != "cholesky"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: a.to("meta"), "one device"),
        (lambda a: a.double(), "one dtype"),
        (lambda a: a[:1], "leading dimensions"),
        (lambda a: a[0], "leading dimensions"),
    ],
    ids=["device", "dtype", "batch", "dimensions"],
)
def test_the_fake_refuses_what_kernels_refuse(op: str, change, message: str) -> None:
    """Past the wrappers: with one tensor on "meta" an op gave memory that nobody had written."""
    first, *rest = arguments(op, torch.float32, (2,))
    assert isinstance(first, torch.Tensor)
    changed = [change(a) if isinstance(a, torch.Tensor) else a for a in rest]
    if message != "one device":
        first, changed = first.to("meta"), [a.to("meta") if isinstance(a, torch.Tensor) else a for a in changed]
    with pytest.raises(RuntimeError, match=f"{op}: .*{message}"):
        getattr(torch.ops.rlsedit_kernels, op)(first, *changed)


@torchs_own
@pytest.mark.parametrize("op", [op for op in SCHEMAS if written(op)])
def test_a_negated_view_is_not_written_to(op: str) -> None:
    """torch gives the kernel a copy of it, and raised that it had got None."""
    first, *rest = arguments(op, torch.float32)
    assert isinstance(first, torch.Tensor)
    before = first.clone()
    with pytest.raises(ValueError, match=f"{op}: . is written in place and must not be a negated view"):
        getattr(rk.ops, op)(torch._neg_view(first), *rest)
    assert torch.equal(first, before)


@on_a_true_device
@pytest.mark.parametrize("op", SCHEMAS)
def test_compiles_without_a_break(op: str, backend: str) -> None:
    function = getattr(rk.ops, op)
    eager_in, compiled_in = arguments(op, torch.float64), arguments(op, torch.float64)
    expected = function(*eager_in)
    torch._dynamo.reset()
    got = torch.compile(function, fullgraph=True, backend="aot_eager")(*compiled_in)
    torch.testing.assert_close(got, expected, rtol=0.0, atol=0.0)
    torch.testing.assert_close(compiled_in, eager_in, rtol=0.0, atol=0.0)


@pytest.mark.parametrize("op", SCHEMAS)
def test_results_are_the_same_bits_from_run_to_run(op: str, backend: str) -> None:
    outputs = []
    for _ in range(3):
        first, *rest = arguments(op, torch.float32, (2,))
        assert isinstance(first, torch.Tensor)
        result = getattr(rk.ops, op)(first, *rest)
        outputs.append((first, *(result if isinstance(result, tuple) else (result,))))
    for other in outputs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(outputs[0], other, strict=True))
