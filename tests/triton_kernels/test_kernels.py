"""What the Triton kernels have beyond the ops: a visible precision, the weight update, views without copies."""

from __future__ import annotations

import contextlib
import sys

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from support import builders, interleaved, tolerances
from support.cases import sized
from support.views import LAYOUTS, View

import rlsedit_kernels as rk
from rlsedit_kernels import triton_kernels
from rlsedit_kernels.triton_kernels import dataflow, launch, tuning


@pytest.mark.parametrize("op", triton_kernels.KERNELS)
def test_an_unknown_precision_is_refused(op) -> None:
    C, K = builders.symmetric((), 9, torch.float32, 0), builders.key_batch((), 3, 9, torch.float32, 1)
    Z, B, V = K.mT.contiguous(), torch.zeros(9, 2), torch.zeros(3, 2)
    arguments = {
        "cholesky": (C,),
        "key_products": (C, K),
        "gain_solve": (Z, torch.eye(3), 1.0),
        "downdate_": (C, Z),
        "downdate_gain_products_": (C, Z, K),
        "weight_update_": (B, K, V, Z),
        "qr_append_rhs_": (C, B, K, V),
    }.get(op, (C, K))
    with pytest.raises(ValueError, match=r"input_precision must be one of 'ieee', 'tf32x3', 'tf32', got 'bf16'"):
        triton_kernels.KERNELS[op](*arguments, input_precision="bf16")


def test_the_precision_that_is_taken() -> None:
    single, double = torch.ones(1, device="cpu"), torch.ones(1, dtype=torch.float64, device="cpu")
    assert launch.precision(single, "tf32x3") == "tf32x3"
    assert launch.precision(double, "tf32x3") == "ieee"
    assert launch.precision(single, None) == "ieee"  # no tensor cores on a CPU


@pytest.mark.parametrize("layout", LAYOUTS)
def test_weight_update(layout, dtype) -> None:
    rng = np.random.default_rng(0)
    W, K, V, gain = (builders.tensor(rng.standard_normal(s), dtype) for s in ((37, 41), (9, 37), (9, 41), (37, 9)))
    view = View(W, layout)
    innovation = V.double() - K.double() @ W.double()
    E = triton_kernels.weight_update_(view.tensor, K, V, gain)
    assert tolerances.relative_error(E, innovation) < tolerances.product(37, dtype)
    expected = W.double() + gain.double() @ innovation
    assert tolerances.relative_error(view.tensor, expected) < tolerances.product(37, dtype)
    assert view.untouched_outside()


def test_weight_update_of_a_long_shared_dimension(dtype) -> None:
    """K W in parts of d, the last one shorter, added in order: the same bits from run to run."""
    rng = np.random.default_rng(1)
    d, u, v = 1100, 3, 5
    W, K, V, gain = (builders.tensor(rng.standard_normal(s), dtype) for s in ((d, v), (u, d), (u, v), (d, u)))
    innovation = V.double() - K.double() @ W.double()
    again = W.clone()
    expected = W.double() + gain.double() @ innovation
    E = triton_kernels.weight_update_(W, K, V, gain)
    assert tolerances.relative_error(E, innovation) < tolerances.product(d, dtype)
    assert tolerances.relative_error(W, expected) < tolerances.product(d, dtype)
    assert torch.equal(triton_kernels.weight_update_(again, K, V, gain), E)
    assert torch.equal(again, W)


def test_a_batch_whose_partial_sums_would_fill_the_memory(dtype, monkeypatch, poisoned_memory) -> None:
    C, K = builders.symmetric((2,), 37, dtype, 0), builders.key_batch((2,), 50, 37, dtype, 1)
    expected_Y, expected_G = rk.reference.gain_products(C, K)
    monkeypatch.setattr(sys.modules["rlsedit_kernels.triton_kernels.gain_products"], "MOST_PARTS", 0)
    Y, G = triton_kernels.gain_products(C, K)
    assert tolerances.relative_error(Y, expected_Y) < tolerances.product(37, dtype)
    assert tolerances.relative_error(G, expected_G) < tolerances.product(37, dtype)
    assert torch.equal(G, G.mT)


def test_scalars_keep_all_digits() -> None:
    """Triton hands floats over as float32; 0.1 must not arrive as 0.10000000149."""
    C, Z = torch.zeros(20, 20, dtype=torch.float64), torch.ones(20, 3, dtype=torch.float64)
    triton_kernels.downdate_(C, Z, 0.1)
    assert torch.equal(C, torch.full_like(C, 0.1 * 3.0))


def test_leading_dimensions_that_no_view_can_join() -> None:
    base = builders.symmetric((3, 2), 18, torch.float32, 1)
    C = base.transpose(0, 1)  # (2, 3, 18, 18), strides that do not collapse
    Z = builders.columns((2, 3), 18, 4, torch.float32, 2) * 0.1
    expected = C.double() - Z.double() @ Z.double().mT
    parts = list(launch.views(C, Z))
    assert len(parts) == 2
    assert parts[0][0].data_ptr() == base.data_ptr()
    triton_kernels.downdate_(C, Z)
    assert tolerances.relative_error(base.transpose(0, 1), expected) < 1e-6


def test_a_batch_beyond_the_limit_of_a_grid_is_split(monkeypatch) -> None:
    monkeypatch.setattr(launch, "MOST_BATCH", 2)
    C, Z = builders.symmetric((5,), 9, torch.float32, 3), builders.columns((5,), 9, 4, torch.float32, 4) * 0.1
    expected = C.double() - Z.double() @ Z.double().mT
    assert [part.shape[0] for (part,) in launch.views(C)] == [2, 2, 1]
    assert [part.shape[0] for (part,) in launch.views(C.view(5, 1, 9, 9))] == [2, 2, 1]
    triton_kernels.downdate_(C, Z)
    assert tolerances.relative_error(C, expected) < 1e-6


def test_kernels_run_on_the_device_of_their_tensors(monkeypatch) -> None:
    """Triton launches on the current device, wherever the tensors are."""
    entered: list[int] = []

    class There(torch.Tensor):
        is_cuda = True

        def get_device(self) -> int:
            return 1

    def device(index: int) -> contextlib.AbstractContextManager[None]:
        entered.append(index)
        return contextlib.nullcontext()

    monkeypatch.setattr(torch.cuda, "device", device)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    A = torch.eye(3, device="cpu")
    launch.on_its_device(lambda first: None)(A)
    assert entered == []
    launch.on_its_device(lambda first: None)(A.as_subclass(There))
    assert entered == [1]
    assert all(hasattr(function, "__wrapped__") for function in triton_kernels.KERNELS.values())


@triton.jit
def _chain(board_of, out):
    """out[t] = out[t - 1] + 1, each by a program of its own, more of them than a device holds at once."""
    t = dataflow.take_ticket(board_of)
    before = 0
    if t > 0:
        dataflow.wait_for(board_of, t - 1)
        before = tl.load(out + t - 1)
    tl.store(out + t, before + 1)
    dataflow.publish(board_of, t)


def test_programs_wait_for_lower_tickets() -> None:
    count = sized(20_000, 50)
    out = torch.full((count,), -7, dtype=torch.int32)
    _chain[(count,)](dataflow.board(count, out), out)
    assert torch.equal(out, torch.arange(1, count + 1, dtype=torch.int32))


def _gain() -> tuple[torch.Tensor, ...]:
    """Two matrices of three block columns, two groups of keys."""
    R, K = builders.triangular((2,), 70, torch.float32, 0), builders.key_batch((2,), 70, 70, torch.float32, 1)
    return (triton_kernels.qr_gain(R, K),)


def _appended() -> tuple[torch.Tensor, ...]:
    """Two matrices of five panels, two blocks of a right-hand side."""
    R, K = builders.triangular((2,), 70, torch.float32, 0), builders.key_batch((2,), 20, 70, torch.float32, 1)
    B, V = builders.columns((2,), 70, 20, torch.float32, 2), builders.key_batch((2,), 20, 20, torch.float32, 3)
    triton_kernels.qr_append_rhs_(R, B, K, V)
    return R, B


in_turn = pytest.mark.skipif(not launch.INTERPRETED, reason="the order of programs is the GPU's")


@in_turn
@pytest.mark.parametrize(("call", "launches"), [(_gain, 2), (_appended, 1)])
def test_the_order_in_which_programs_run_does_not_matter(call, launches, poisoned_memory) -> None:
    """What is read before it was waited for is NaN here."""
    expected = call()
    with interleaved.latest_first() as waits:
        found = call()
    assert len(waits) == launches
    assert all(count > 0 for count in waits)
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


def _no_wait(flags, ticket):
    tl.debug_barrier()


@in_turn
@pytest.mark.parametrize(("call", "module"), [(_gain, "qr_gain"), (_appended, "qr_append_rhs_")])
def test_a_wait_that_is_left_out_shows(call, module, monkeypatch, poisoned_memory) -> None:
    """In the test above."""
    expected = call()
    monkeypatch.setattr(sys.modules[f"rlsedit_kernels.triton_kernels.{module}"], "wait_for", triton.jit(_no_wait))
    with interleaved.latest_first():
        found = call()
    assert not all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


def test_every_row_of_the_tuning_table_is_there_and_sound() -> None:
    kernels = {kernel for kernel, *_ in tuning._TABLE}
    assert kernels == {"gain_products", "downdate_", "downdate_gain_products_", "gain_solve"}
    for kernel in kernels:
        for architecture in ("cuda", "hip"):
            for dtype in (torch.float32, torch.float64):
                for u in (1, 32, 33, 500):
                    tiles = tuning.tiles(kernel, torch.empty(0, dtype=dtype), u, architecture)
                    for side in (tiles.rows, tiles.keys, tiles.depth):
                        assert side >= 16
                        assert side & (side - 1) == 0
