"""Ops under autograd: what is written is seen, and a gradient that is not there is an error, never zero."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from support import pretended
from support.op_arguments import arguments, tensors

import rlsedit_kernels as rk
from rlsedit_kernels.ops.schemas import SCHEMAS, is_in_place, written

WRITING = [op for op in SCHEMAS if is_in_place(op)]
RETURNING = [op for op in SCHEMAS if not is_in_place(op)]
NO_GRADIENT = r"has no gradient: the recursion is a closed form, call it under torch.no_grad\(\)"

on_a_true_device = pytest.mark.skipif(
    pretended.active(), reason="transforms want tensors of torch's own, not pretended ones"
)


def public(op: str) -> Callable[..., Any]:
    return getattr(rk.ops, op)


def private(op: str) -> Callable[..., Any]:
    return getattr(torch.ops.rlsedit_kernels, op).default


doors = pytest.mark.parametrize("door", [public, private], ids=["checked", "torch.ops"])


def key_index(op: str) -> int:
    """The first argument that `op` does not write to."""
    return written(op)


@pytest.mark.parametrize("op", WRITING)
@doors
@pytest.mark.parametrize("grad_mode", [True, False], ids=["grad", "no_grad"])
def test_the_version_counter_of_what_is_written_moves(op, door, grad_mode, backend) -> None:
    given = arguments(op, torch.float64)
    before = [t._version for t in given if isinstance(t, torch.Tensor)]
    with torch.set_grad_enabled(grad_mode):
        door(op)(*given)
    after = [t._version for t in given if isinstance(t, torch.Tensor)]
    for i, (old, new) in enumerate(zip(before, after, strict=True)):
        assert (new > old) == (i < written(op))


@pytest.mark.parametrize("op", WRITING)
def test_a_view_moves_the_counter_of_its_base(op, backend) -> None:
    first, *rest = arguments(op, torch.float64)
    base = first.mT.contiguous()
    before = base._version
    public(op)(base.mT, *rest)
    assert base._version > before


@pytest.mark.parametrize("op", WRITING)
def test_autograd_notices_that_a_saved_tensor_was_written(op, backend) -> None:
    first, *rest = arguments(op, torch.float64)
    x = torch.ones(3, first.shape[0], dtype=torch.float64, requires_grad=True)
    y = x @ first
    public(op)(first, *rest)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.parametrize("op", WRITING)
@doors
def test_an_inference_tensor_is_refused_outside_before_it_is_written(op, door, backend) -> None:
    for place in range(written(op)):
        given = list(arguments(op, torch.float64))
        before = [t.clone() for t in given[: written(op)]]
        with torch.inference_mode():
            given[place] = given[place].clone()
        with pytest.raises(RuntimeError, match="Inplace update to inference tensor outside InferenceMode"):
            door(op)(*given)
        assert all(torch.equal(a, b) for a, b in zip(given, before, strict=False))


@pytest.mark.parametrize("op", SCHEMAS)
def test_inference_mode_computes_the_same(op, backend) -> None:
    arguments_before = arguments(op, torch.float64)
    expected_in = arguments(op, torch.float64)
    expected = tensors(public(op)(*expected_in))
    with torch.inference_mode():
        made_there = [a.clone() if isinstance(a, torch.Tensor) else a for a in arguments_before]
        got = tensors(public(op)(*made_there))
    for a, b in zip([*got, made_there[0]], [*expected, expected_in[0]], strict=True):
        assert torch.equal(a, b)
    normal = arguments(op, torch.float64)
    before = normal[0]._version
    with torch.inference_mode():
        public(op)(*normal)
    assert torch.equal(normal[0], expected_in[0])
    assert (normal[0]._version > before) == is_in_place(op)


@pytest.mark.parametrize("op", WRITING)
def test_a_parameter_is_written_under_no_grad(op, backend) -> None:
    first, *rest = arguments(op, torch.float64)
    expected = first.clone()
    public(op)(expected, *rest)
    parameter = torch.nn.Parameter(first.clone())
    before = parameter._version
    with torch.no_grad():
        public(op)(parameter, *arguments(op, torch.float64)[1:])
    assert torch.equal(parameter, expected)
    assert parameter._version > before
    assert parameter.is_leaf
    assert parameter.requires_grad


@pytest.mark.parametrize("op", WRITING)
def test_a_leaf_that_needs_a_gradient_is_not_written(op, backend) -> None:
    for place in range(written(op)):
        given = list(arguments(op, torch.float64))
        before = [t.clone() for t in given[: written(op)]]
        given[place].requires_grad_()
        with pytest.raises(ValueError, match="must not require a gradient"):
            public(op)(*given)
        with pytest.raises(RuntimeError, match="a leaf Variable that requires grad is being used in an in-place"):
            private(op)(*given)
        assert all(torch.equal(a.detach(), b) for a, b in zip(given, before, strict=False))


@pytest.mark.parametrize("op", RETURNING)
@doors
def test_backward_raises(op, door, backend) -> None:
    first, *rest = arguments(op, torch.float64)
    out = tensors(door(op)(first.requires_grad_(), *rest))[0]
    with pytest.raises(NotImplementedError, match=NO_GRADIENT):
        out.sum().backward()


@pytest.mark.parametrize("op", WRITING)
@doors
def test_what_would_need_a_gradient_is_refused_before_anything_is_written(op, door, backend) -> None:
    given = list(arguments(op, torch.float64))
    before = [t.clone() for t in given[: written(op)]]
    given[key_index(op)].requires_grad_()
    with pytest.raises(NotImplementedError, match=f"rlsedit_kernels::{op} {NO_GRADIENT}"):
        door(op)(*given)
    assert all(torch.equal(a, b) for a, b in zip(given, before, strict=False))
    with torch.no_grad():
        door(op)(*given)


@on_a_true_device
@pytest.mark.parametrize("op", SCHEMAS)
@doors
def test_transforms_of_torch_func_raise(op, door, backend) -> None:
    given = list(arguments(op, torch.float64))
    place = min(key_index(op), sum(isinstance(a, torch.Tensor) for a in given) - 1)

    def value(x: torch.Tensor) -> torch.Tensor:
        changed = [*given[:place], x, *given[place + 1 :]]
        out = tensors(door(op)(*changed))
        return (out or changed)[0].sum()

    x = given[place]
    for transform in (
        lambda: torch.func.grad(value)(x),
        lambda: torch.func.jvp(value, (x,), (torch.ones_like(x),)),
        lambda: torch.func.jacrev(value)(x),
        lambda: torch.func.jacfwd(value)(x),
    ):
        with pytest.raises(NotImplementedError, match=NO_GRADIENT):
            transform()


@on_a_true_device
@pytest.mark.parametrize("op", SCHEMAS)
@pytest.mark.parametrize("grad_mode", [True, False], ids=["grad", "no_grad"])
def test_forward_mode_raises(op, grad_mode, backend) -> None:
    given = list(arguments(op, torch.float64))
    with torch.autograd.forward_ad.dual_level(), torch.set_grad_enabled(grad_mode):
        for place in range(sum(isinstance(a, torch.Tensor) for a in given)):
            dual = torch.autograd.forward_ad.make_dual(given[place], torch.ones_like(given[place]))
            with pytest.raises(NotImplementedError, match=NO_GRADIENT):
                public(op)(*given[:place], dual, *given[place + 1 :])
        public(op)(*given)


@on_a_true_device
@pytest.mark.parametrize("op", WRITING)
def test_a_compiled_graph_writes_a_parameter_and_moves_its_counter(op, backend) -> None:
    first, *rest = arguments(op, torch.float64)
    expected = first.clone()
    public(op)(expected, *rest)
    parameter = torch.nn.Parameter(first.clone())
    before = parameter._version

    def write(p: torch.Tensor, *others: Any) -> torch.Tensor:
        with torch.no_grad():
            public(op)(p, *others)
        return others[0] + 1.0

    torch._dynamo.reset()
    torch.compile(write, fullgraph=True, backend="aot_eager")(parameter, *arguments(op, torch.float64)[1:])
    assert torch.equal(parameter, expected)
    assert parameter._version > before
