"""The CUDA kernels on a CPU: every op and precision against float64, at the edges of tiles, panels and batches.

`pytest tests/ops --emulate-cuda` runs the whole test suite of the ops on them; this is what the kernels add to it. With
`--device cuda` it runs on a GPU.
"""

from __future__ import annotations

from contextlib import nullcontext

import numpy as np
import pytest
import torch
from support import builders, emulated, tolerances
from support.kernel_cases import ENGINES as ENGINE_TABLE
from support.kernel_cases import arguments, results
from support.op_arguments import tensors
from support.views import LAYOUTS, View, at_an_odd_address

import rlsedit_kernels as rk
from rlsedit_kernels.backends import cuda
from rlsedit_kernels.ops.schemas import SCHEMAS, written

error = tolerances.relative_error
ENGINES = pytest.mark.parametrize(("dtype", "precision"), ENGINE_TABLE.values(), ids=ENGINE_TABLE.keys())


def test_every_op_has_a_kernel(kernels) -> None:
    on_a_gpu = torch.get_default_device().type == "cuda" and not emulated.active()
    assert set(cuda.implemented("CUDA" if on_a_gpu else "CPU")) == set(SCHEMAS)


@ENGINES
@pytest.mark.parametrize("op", SCHEMAS)
def test_the_order_in_which_warps_run_does_not_matter(op, dtype, precision, emulator) -> None:
    """A barrier that is missing shows as a difference between warps in ascending and in descending order."""
    first = results(op, arguments(op, dtype), precision)
    with emulated.descending():
        other = results(op, arguments(op, dtype), precision)
    assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True))
    assert all(bool(torch.isfinite(a).all()) for a in first)


@ENGINES
@pytest.mark.parametrize("u", [15, 16, 17, 33, 64, 65, 112, 113])
def test_products_at_the_edges_of_tiles_of_keys(u, dtype, precision, kernels) -> None:
    C, K = builders.symmetric((), 140, dtype, 0), builders.key_batch((), u, 140, dtype, 1)
    Y, G, *_ = results("gain_products", (C, K), precision)
    expected_Y, expected_G = rk.reference.gain_products(C, K)
    assert error(Y, expected_Y) < 0.2 * tolerances.product(140, dtype)
    assert error(G, expected_G) < 0.2 * tolerances.product(140, dtype)
    assert torch.equal(G, G.mT)


@ENGINES
def test_several_blocks_share_a_walk_along_d(dtype, precision, kernels) -> None:
    """From d = 512 on the pass over C is split, and the parts are added in a fixed order."""
    C, K = builders.symmetric((), 530, dtype, 0), builders.key_batch((), 5, 530, dtype, 1)
    Y, G, *_ = results("gain_products", (C, K), precision)
    expected_Y, expected_G = rk.reference.gain_products(C, K)
    assert error(Y, expected_Y) < 0.2 * tolerances.product(530, dtype)
    assert error(G, expected_G) < 0.2 * tolerances.product(530, dtype)


@ENGINES
@pytest.mark.parametrize("d", [63, 64, 65, 127, 128, 129])
@pytest.mark.parametrize(("w", "u"), [(1, 1), (32, 32), (33, 8)])
def test_the_fused_pass_at_the_edges_of_tiles(d, w, u, dtype, precision, kernels) -> None:
    C, Z = builders.symmetric((), d, dtype, 0), 0.1 * builders.columns((), d, w, dtype, 1)
    K = builders.key_batch((), u, d, dtype, 2)
    expected_C, expected_Y, expected_G = rk.reference.downdate_gain_products_(C, Z, K, -0.5)
    Y, G, *_ = results("downdate_gain_products_", (C, Z, K, -0.5), precision)
    assert torch.equal(C, C.mT)
    assert torch.equal(G, G.mT)
    for got, expected in ((C, expected_C), (Y, expected_Y), (G, expected_G)):
        assert error(got, expected) < 0.5 * tolerances.product(d, dtype)


@ENGINES
@pytest.mark.parametrize("u", [32, 33, 193, 289])
def test_cholesky_in_shared_and_in_global_memory(u, dtype, precision, kernels) -> None:
    A = builders.symmetric((2,), u, dtype, 0, condition=1e3)
    L, info, *_ = results("cholesky", (A,), precision)
    assert not info.any()
    assert error(L.double() @ L.double().mT, A) < 0.2 * u * torch.finfo(dtype).eps
    assert torch.equal(L, L.tril())


@ENGINES
@pytest.mark.parametrize("u", [31, 100, 130])
def test_solve_through_the_inverse(u, dtype, precision, kernels) -> None:
    Y, G = builders.columns((), 70, u, dtype, 0), builders.symmetric((), u, dtype, 1, condition=1e4)
    gain, Z, info, *_ = results("gain_solve", (Y, G, 0.0), precision)
    expected_gain, expected_Z, _ = rk.reference.gain_solve(Y, G, 0.0)
    assert not info.any()
    assert error(gain, expected_gain) < tolerances.solve(u, 1e3, dtype)
    assert error(Z, expected_Z) < tolerances.solve(u, 1e3, dtype)


@ENGINES
@pytest.mark.parametrize("u", [127, 128, 129, 300])
def test_more_rows_than_go_in_at_a_time(u, dtype, precision, kernels) -> None:
    R, K = builders.triangular((), 66, dtype, 0), builders.key_batch((), u, 66, dtype, 1)
    expected = R.double().mT @ R.double() + K.double().mT @ K.double()
    results("qr_append_", (R, K), precision)
    assert error(R.double().mT @ R.double(), expected) < 10 * u * torch.finfo(dtype).eps
    got, *_ = results("qr_gain", (R, K), precision)
    assert error(got, rk.reference.qr_gain(R, K)) < tolerances.solve(8, 1e3, dtype)


@ENGINES
@pytest.mark.parametrize(("op", "launches"), [("qr_append_", 2), ("qr_append_rhs_", 2), ("qr_gain", 2)])
def test_a_sweep_is_one_launch_whatever_the_order_of_its_blocks(op, launches, dtype, precision, emulator) -> None:
    """Up to 128 rows an append, and both ways of a gain: tickets and counts carry the order, not block numbers."""
    outcomes = []
    for order in (nullcontext, emulated.descending, lambda: emulated.beside(16)):
        given, before = arguments(op, dtype, (2,), 165, 131), emulated.launches()
        with order():
            outcomes.append(results(op, given, precision))
        assert emulated.launches() - before == launches
    for other in outcomes[1:]:
        assert all(torch.equal(a, b) for a, b in zip(outcomes[0], other, strict=True))
    assert all(bool(torch.isfinite(a).all()) for a in outcomes[0])


@ENGINES
def test_columns_of_very_different_sizes(dtype, precision, kernels) -> None:
    """Every column is scaled by itself: its error is small beside its own length."""
    d, u, eps = 70, 40, torch.finfo(dtype).eps
    sizes = builders.tensor(np.random.default_rng(3).permutation(np.logspace(-15, 15, d)), torch.float64)
    R = (builders.triangular((), d, torch.float64, 0) * sizes).to(dtype)
    K = (builders.key_batch((), u, d, torch.float64, 1) * sizes).to(dtype)
    scaled = [A.double() / sizes for A in (R, K)]
    expected = sum(A.mT @ A for A in scaled)
    results("qr_append_", (R, K), precision)
    new = R.double() / sizes
    assert error(new.mT @ new, expected) < 20 * u * eps
    assert bool((R.diagonal() >= 0.0).all())


@ENGINES
@pytest.mark.parametrize("size", [1e-20, 1e-25, 1e-35])
def test_rows_too_small_to_matter_leave_a_factor_as_it_is(size, dtype, precision, kernels) -> None:
    R, K = builders.triangular((), 45, dtype, 0), builders.key_batch((), 7, 45, dtype, 1)
    new = R.clone()
    results("qr_append_", (new, size * K), precision)
    assert torch.equal(new, R)


@ENGINES
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_rows_that_are_not_finite_show_in_the_factor(value, dtype, precision, kernels) -> None:
    R, K = builders.triangular((), 70, dtype, 0), builders.key_batch((), 7, 70, dtype, 1)
    K[3, 40] = value
    results("qr_append_", (R, K), precision)
    assert not bool(torch.isfinite(R[40:, 40:].diagonal()).any())
    gain, *_ = results("qr_gain", (builders.triangular((), 70, dtype, 2), K), precision)
    assert not bool(torch.isfinite(gain[:41, 3]).any())
    assert bool(torch.isfinite(gain[:, :3]).all())


@ENGINES
@pytest.mark.parametrize("W_layout", LAYOUTS)
@pytest.mark.parametrize(("u", "d", "v"), [(1, 40, 70), (16, 129, 65), (19, 530, 33), (130, 60, 131)])
def test_update_of_a_weight(u, d, v, W_layout, dtype, precision, kernels) -> None:
    W, K = builders.columns((2,), d, v, dtype, 0), builders.key_batch((2,), u, d, dtype, 1)
    V, gain = builders.key_batch((2,), u, v, dtype, 2), builders.columns((2,), d, u, dtype, 3)
    expected = V.double() - K.double() @ W.double()
    view = View(W, W_layout)
    E, *_ = results("weight_update_", (view.tensor, K, V, gain), precision)
    assert E.is_contiguous()
    assert error(E, expected.cpu().numpy()) < tolerances.product(d, dtype)
    new = W.double() + gain.double() @ expected
    assert error(view.tensor, new.cpu().numpy()) < tolerances.product(max(u, d), dtype)
    assert view.untouched_outside()


@pytest.mark.parametrize("op", ["gain_products", "rls_update_", "downdate_"])
def test_leading_dimensions_of_any_strides(op, kernels) -> None:
    """Layers and experts in one launch, also where their order in memory is another one."""
    given = arguments(op, torch.float32, (2, 3), d=35, u=6)
    swapped = tuple(a.transpose(0, 1).contiguous().transpose(0, 1) if isinstance(a, torch.Tensor) else a for a in given)
    first = results(op, tuple(a.clone() if isinstance(a, torch.Tensor) else a for a in given), "tf32x3")
    other = results(op, swapped, "tf32x3")
    assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


@pytest.mark.parametrize("op", SCHEMAS)
@pytest.mark.parametrize("batch", [(5,), (3, 2), (2, 5), (1, 2, 1, 1, 2)])
def test_more_matrices_than_a_call_takes(op, batch, kernels, monkeypatch) -> None:
    """The other back ends take any number of them, and any number of leading dimensions."""
    given, function = arguments(op, torch.float32, batch, d=9, u=4), cuda.kernel(op)
    flat = [a.flatten(0, -3).clone() if isinstance(a, torch.Tensor) else a for a in given]
    expected = [*tensors(function(*flat)), *flat[: written(op)]]
    monkeypatch.setattr(cuda, "MOST_BATCH", 3)
    found = [*tensors(function(*given)), *given[: written(op)]]
    for got, exact in zip(found, expected, strict=True):
        assert got.shape[: len(batch)] == batch
        assert torch.equal(got.flatten(0, len(batch) - 1), exact)


@pytest.mark.parametrize("op", SCHEMAS)
def test_no_matrices_are_no_work(op, kernels) -> None:
    """No layers: CUDA refuses to launch an empty grid, the other back ends return what is empty."""
    given = tuple(a[:0] if isinstance(a, torch.Tensor) else a for a in arguments(op, torch.float32, (1,), d=9, u=4))
    assert all(tensor.numel() == 0 for tensor in results(op, given, "tf32x3"))


@ENGINES
@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("d", [256, 258])
def test_downdate_by_whole_tiles(d, offset, dtype, precision, kernels) -> None:
    """Tiles without an edge, read and written in pairs, or one by one where pairs are not aligned."""
    C, Z = builders.symmetric((), d, dtype, 0), builders.columns((), d, 3, dtype, 1)
    expected = rk.reference.downdate_(C, Z, -0.5)
    storage = torch.full((d * d + offset,), float("nan"), dtype=dtype)
    view = storage[offset:].view(d, d)
    view.copy_(C)
    results("downdate_", (view, Z, -0.5), precision)
    assert torch.equal(view, view.mT)
    assert error(view, expected) < tolerances.product(3, dtype)


def test_three_products_of_tf32_are_as_good_as_float32(kernels) -> None:
    """At most twice the error of the same torch sequence in IEEE float32 (truncating tensor cores are emulated)."""
    C, K = builders.symmetric((), 512, torch.float32, 6, 1e4), builders.key_batch((), 64, 512, torch.float32, 7)
    exact_Y, exact_G = rk.reference.gain_products(C, K)
    Y, G, *_ = results("gain_products", (C, K), "tf32x3")
    plain = C @ K.mT
    assert error(Y, exact_Y) <= 2.0 * error(plain, exact_Y)
    assert error(G, exact_G) <= 2.0 * error(K @ plain, exact_G)
    ones = torch.ones(1, 1024), torch.full((1024, 1024), 1.0 + 2.0**-12)
    Y, *_ = results("gain_products", (ones[1], ones[0]), "tf32x3")  # a biased sum would show here
    assert error(Y, np.full((1024, 1), 1024 * (1.0 + 2.0**-12))) < 1e-6


def test_precision_is_one_of_two(kernels) -> None:
    C, K = builders.symmetric((), 9, torch.float32, 0), builders.key_batch((), 2, 9, torch.float32, 1)
    with pytest.raises(ValueError, match=r"gain_products: input_precision must be one of 'tf32x3', 'ieee', got 'tf32'"):
        cuda.kernel("gain_products")(C, K, input_precision="tf32")
    with pytest.raises(RuntimeError, match="gain_products: precision must be 0"):
        kernels.gain_products(C, K, 2)


@pytest.mark.parametrize(
    ("op", "given"),
    [
        ("gain_products", (torch.eye(3), torch.ones(2, 4))),
        ("downdate_", (torch.eye(3), torch.ones(4, 2))),
        ("downdate_", (torch.ones(1, 1).expand(3, 3), torch.ones(3, 2))),
        ("downdate_", (torch.ones(7).as_strided((3, 3), (2, 1)), torch.ones(3, 2))),
        ("gain_solve", (torch.ones(4, 2), torch.eye(2), -1.0)),
        ("gain_products", (torch.eye(3), at_an_odd_address(torch.ones(2, 3)))),
        ("downdate_gain_products_", (torch.eye(3), torch.ones(3, 2), torch.ones(1, 2))),
        ("cholesky", (torch.ones(2, 3),)),
        ("gain_solve", (torch.ones(4, 2), torch.eye(3), 1.0)),
        ("rls_update_", (torch.eye(3), torch.ones(2, 4))),
        ("rls_update_", (torch.eye(3), torch.ones(2, 3).double())),
        ("qr_append_", (torch.eye(3), torch.ones(2, 4))),
        ("qr_append_rhs_", (torch.eye(3), torch.ones(3, 2), torch.ones(2, 3), torch.ones(1, 2))),
        ("qr_gain", (torch.eye(3), torch.ones(2, 4))),
        ("weight_update_", (torch.ones(3, 2), torch.ones(1, 3), torch.ones(1, 2), torch.ones(3, 2))),
    ],
)
def test_native_code_checks_again(op, given, kernels) -> None:
    """Called past the wrappers, a wrong argument is an error and no access out of bounds."""
    with pytest.raises(RuntimeError, match=f"{op}: "):
        getattr(kernels, op)(*given)
