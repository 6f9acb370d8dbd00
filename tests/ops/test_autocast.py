"""Autocast reaches no op: each works in the dtype of its tensors, to the same bits."""

from __future__ import annotations

import pytest
import torch
from support.op_arguments import arguments, tensors

import rlsedit_kernels as rk
from rlsedit_kernels.backends.precision import ieee_products
from rlsedit_kernels.ops.schemas import SCHEMAS


def device_type(op: str) -> str:
    return arguments(op, torch.float32)[0].device.type


@pytest.mark.parametrize("op", SCHEMAS)
@pytest.mark.parametrize("lowered", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def test_an_op_works_in_the_dtype_of_its_tensors(op, lowered, dtype, backend) -> None:
    expected_in, given = arguments(op, dtype), arguments(op, dtype)
    expected = tensors(getattr(rk.ops, op)(*expected_in))
    with torch.autocast(device_type(op), dtype=lowered):
        got = tensors(getattr(torch.ops.rlsedit_kernels, op).default(*given))
        got = got or tensors(given[0])
        again = tensors(getattr(rk.ops, op)(*arguments(op, dtype)))
    for a, b in zip(got, expected, strict=False):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)
    for results in (again, expected):
        assert all(t.dtype in (dtype, torch.int32) for t in results)
    for a, b in zip(given, expected_in, strict=True):
        assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def test_ieee_products_leaves_autocast_as_it_was() -> None:
    A = torch.ones(3, 3)
    with torch.autocast(A.device.type, dtype=torch.bfloat16):
        with ieee_products():
            assert (A @ A).dtype == torch.float32
            with ieee_products():
                assert (A @ A).dtype == torch.float32
            assert (A @ A).dtype == torch.float32
        assert (A @ A).dtype == torch.bfloat16
        with pytest.raises(ZeroDivisionError), ieee_products():
            _ = 1 / 0
        assert (A @ A).dtype == torch.bfloat16
