"""Past the public wrappers, by `torch.ops`: every back end and the fakes refuse alike, and nothing is written."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from support import builders, pretended, views
from support.op_arguments import arguments, tensors

import rlsedit_kernels as rk
from rlsedit_kernels.ops.schemas import SCHEMAS, SHAPES, written

on_the_cpu = pytest.mark.skipif(
    pretended.active() or torch.get_default_device().type != "cpu", reason="memory of a GPU is not given by address"
)
TAKES_NOISE = ("gain_solve", "rls_update_")


def call(op: str, given: list[Any]) -> object:
    return getattr(torch.ops.rlsedit_kernels, op).default(*given)


def refused(op: str, given: list[Any], match: str = "") -> None:
    """`op` refuses these arguments and leaves them as they are, and so does its fake."""
    before = [a.clone() if isinstance(a, torch.Tensor) else a for a in given]
    with pytest.raises(RuntimeError, match=f"{op}.*{match}"):
        call(op, given)
    for a, b in zip(given, before, strict=True):
        if isinstance(a, torch.Tensor):
            torch.testing.assert_close(a, b, rtol=0.0, atol=0.0, equal_nan=True)
    with pytest.raises(RuntimeError, match=op):
        call(op, [a.to("meta") if isinstance(a, torch.Tensor) else a for a in given])


def given(op: str, batch: tuple[int, ...] = (2,)) -> list[Any]:
    return list(arguments(op, torch.float32, batch))


def of_tensors() -> list[tuple[str, int]]:
    return [(op, i) for op in SCHEMAS for i in range(len(SHAPES[op].split()))]


CHANGES: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "a row more": lambda t: torch.cat([t, t[..., :1, :]], dim=-2),
    "a column more": lambda t: torch.cat([t, t[..., :1]], dim=-1),
    "one row, to broadcast": lambda t: t[..., :1, :],
    "one column, to broadcast": lambda t: t[..., :1],
    "no row": lambda t: t[..., :0, :],
    "no column": lambda t: t[..., :0],
    "one matrix, to broadcast": lambda t: t[:1],
    "no leading dimension": lambda t: t[0],
}


def fits(op: str, given: list[Any]) -> bool:
    """Whether the shapes of these arguments are those of the table; by its letters, independently of its reader."""
    sizes: dict[str, int] = {}
    shapes = [tuple(a.shape) for a in given if isinstance(a, torch.Tensor)]
    if len({s[:-2] for s in shapes}) > 1 or 0 in [n for s in shapes for n in s[-2:]]:
        return False
    for letters, shape in zip(SHAPES[op].split(), shapes, strict=True):
        for letter, n in zip(letters, shape[-2:], strict=True):
            if sizes.setdefault(letter, n) != n:
                return False
    return True


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize(("op", "index"), of_tensors(), ids=[f"{op}-{i}" for op, i in of_tensors()])
def test_shapes_that_do_not_fit_are_refused(op: str, index: int, change: str, backend: str) -> None:
    """Plain torch broadcast a single row, column or matrix, and gave numbers."""
    wrong = given(op)
    wrong[index] = CHANGES[change](wrong[index]).contiguous()
    if fits(op, wrong):  # so many keys are as good
        for t in tensors(call(op, wrong)):
            assert t.dtype == torch.int32 or t.isfinite().all()
        return
    refused(op, wrong)


@pytest.mark.parametrize("op", TAKES_NOISE)
@pytest.mark.parametrize("noise", [-1.0, -1e-30, float("nan")])
def test_a_noise_below_zero_is_refused(op: str, noise: float, backend: str) -> None:
    wrong = given(op)
    wrong[2] = noise
    refused(op, wrong, "noise must be at least 0")


@pytest.mark.parametrize("forget", [0.0, -0.5, 1.5, float("nan")])
def test_a_forget_outside_of_its_range_is_refused(forget: float, backend: str) -> None:
    wrong = given("rls_update_")
    wrong[3] = forget
    refused("rls_update_", wrong, r"forget must be in \(0, 1\]")


@pytest.mark.parametrize("op", [op for op in SCHEMAS if written(op)])
def test_what_is_written_must_not_overlap_itself(op: str, backend: str) -> None:
    """An expanded tensor, and a window that slides by less than its rows are long."""
    for index in range(written(op)):
        shape = given(op, ())[index].shape
        for strides in ((0, 1), (1, 1), (shape[1] - 1, 1)):
            wrong = given(op, ())
            wrong[index] = torch.zeros(shape.numel()).as_strided(shape, strides)
            with pytest.raises(RuntimeError, match=f"{op}.*written in place and must not"):
                call(op, wrong)


@pytest.mark.parametrize(("op", "index"), of_tensors(), ids=[f"{op}-{i}" for op, i in of_tensors()])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.int64, torch.float64])
def test_dtypes_are_not_mixed(op: str, index: int, dtype: torch.dtype, backend: str) -> None:
    wrong = given(op)
    wrong[index] = wrong[index].to(dtype)
    if len(SHAPES[op].split()) == 1 and dtype == torch.float64:
        return
    refused(op, wrong, "")


@on_the_cpu
@pytest.mark.parametrize(("op", "index"), of_tensors(), ids=[f"{op}-{i}" for op, i in of_tensors()])
def test_memory_that_no_kernel_may_read_is_refused(op: str, index: int, backend: str) -> None:
    """It was read element by element all the same, which C++ leaves undefined and a GPU does not survive."""
    good = given(op, ())
    expected = tensors(call(op, [a.clone() if isinstance(a, torch.Tensor) else a for a in good]))
    wrong = [views.at_an_odd_address(a) if i == index else a for i, a in enumerate(good)]
    before = [a.clone() if isinstance(a, torch.Tensor) else a for a in wrong]
    with pytest.raises(RuntimeError, match=rf"{op}: \w+ must lie at an address that is a multiple of"):
        call(op, wrong)
    with pytest.raises(ValueError, match=rf"{op}: \w+ must lie at an address that is a multiple of .*: clone\(\) it"):
        getattr(rk.ops, op)(*wrong)
    for a, b in zip(wrong, before, strict=True):
        assert not isinstance(a, torch.Tensor) or torch.equal(a, b)
    wrong[index] = wrong[index].clone()
    for a, b in zip(tensors(call(op, wrong)), expected, strict=True):
        assert torch.equal(a, b)


@on_the_cpu
@pytest.mark.parametrize("state", ["covariance", "square_root"])
def test_a_filter_takes_keys_and_targets_wherever_they_lie(state: str, backend: str) -> None:
    K, V = builders.key_batch((), 3, 8, torch.float32, 1), builders.key_batch((), 3, 2, torch.float32, 2)
    weights = []
    for place in (torch.clone, views.at_an_odd_address):
        found = rk.RLSFilter(torch.zeros(8, 2), rk.Prior.ridge(8, 1.0), state, layout="in_out")
        found.update(place(K), place(V))
        found.remove(place(K), place(V))
        found.update(place(K), place(V))
        weights.append(found.weight)
    assert torch.equal(*weights)
    W = views.at_an_odd_address(torch.zeros(8, 2))
    with pytest.raises(ValueError, match="inplace needs a weight at an address that is a multiple of"):
        rk.RLSFilter(W, rk.Prior.ridge(8, 1.0), layout="in_out", inplace=True)


D = 12
SHARING = {
    "downdate_, columns of C": lambda C: rk.ops.downdate_(C, C[:, :3]),
    "downdate_gain_products_, Z": lambda C: rk.ops.downdate_gain_products_(C, C[:, 2:4], torch.ones(2, D)),
    "downdate_gain_products_, K": lambda C: rk.ops.downdate_gain_products_(C, torch.ones(D, 2), C[:2]),
    "weight_update_": lambda C: rk.ops.weight_update_(C, torch.ones(2, D), torch.ones(2, D), C[:, :2]),
    "qr_append_": lambda C: rk.ops.qr_append_(C, C[1:3]),
    "qr_append_rhs_, B": lambda C: rk.ops.qr_append_rhs_(C, C[:, :4], torch.ones(2, D), torch.ones(2, 4)),
    "qr_append_rhs_, V": lambda C: rk.ops.qr_append_rhs_(torch.eye(D), C, torch.ones(2, D), C[:2]),
}


@pytest.mark.skipif(pretended.active(), reason="a pretended GPU's memory is not given by address")
@pytest.mark.parametrize("case", SHARING)
def test_what_is_read_while_another_argument_is_written_lies_elsewhere(case) -> None:
    """In silence, what came out would depend on the order in which tiles are written: on a GPU on time."""
    C = torch.eye(D)
    with pytest.raises(ValueError, match=r"must not lie in the memory of \w, which is written in place; give "):
        SHARING[case](C)
    assert torch.equal(C, torch.eye(D))


def test_parts_of_one_buffer_side_by_side_are_taken() -> None:
    buffer = torch.cat([torch.eye(D), 0.1 * torch.ones(D, 3)], dim=1)
    C, Z = buffer[:, :D], buffer[:, D:]
    rk.ops.downdate_(C, Z)
    torch.testing.assert_close(C, torch.eye(D) - Z @ Z.mT)
