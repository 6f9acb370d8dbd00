"""Flops and bytes of a step are those that a count by hand gives."""

from __future__ import annotations

import pytest
import torch
from support import builders

import rlsedit_kernels as rk
from rlsedit_kernels.profile.counting import Count, count

D, U, V, B = 48, 6, 10, 4  # B bytes a number


def matrices() -> tuple[torch.Tensor, torch.Tensor]:
    return torch.eye(D) + 0.01, builders.key_batch((), U, D, torch.float32, 0)


def total(action) -> Count:
    return Count.total(count(action).values())


@pytest.mark.parametrize(
    ("action", "flops", "numbers"),
    [
        (lambda C, K: C @ K.mT, 2 * D * D * U, D * D + 2 * D * U),
        (lambda C, K: torch.addmm(C, K.mT, K), 2 * D * D * U, 2 * D * D + 2 * D * U),
        (lambda C, K: C.addmm_(K.mT, K), 2 * D * D * U, 2 * D * D + 2 * D * U),
        (
            lambda C, K: torch.ops.mkldnn._linear_pointwise(K, C, None, "none", [], ""),  # what rlsedit edits with
            2 * D * D * U,
            D * D + 2 * D * U,
        ),
        (lambda C, K: C + C.mT, 0, 3 * D * D),
        (lambda C, K: C.clone(), 0, 2 * D * D),
        (lambda C, K: torch.empty_like(C).copy_(C), 0, 2 * D * D),
        (lambda C, K: C[:8].mT, 0, 0),
        (lambda C, K: torch.linalg.solve(C, K.mT), 2 / 3 * D**3 + 2 * D * D * U, None),
        (lambda C, K: torch.linalg.cholesky(C), D**3 / 3, None),
        (lambda C, K: torch.linalg.solve_triangular(C, K.mT, upper=True), D * D * U, D * D + 2 * D * U),
        (lambda C, K: torch.linalg.lu_solve(*torch.linalg.lu_factor(C), K.mT), 2 / 3 * D**3 + 2 * D * D * U, None),
        (lambda C, K: torch.linalg.svd(K, full_matrices=False), 6 * D * U * U + 20 * U**3, None),
        (lambda C, K: torch.linalg.svd(K.mT), 4 * D * D * U + 22 * U**3, None),
        (lambda C, K: torch.linalg.svdvals(K), 2 * D * U * U + 2 * U**3, D * U + U),
        (lambda C, K: torch.linalg.matrix_norm(K, 2), 2 * D * U * U + 2 * U**3, None),
        (lambda C, K: torch.linalg.eigh(C), 9 * D**3, 2 * D * D + D),
        (lambda C, K: torch.linalg.eigvalsh(C), 4 / 3 * D**3, D * D + D),
        (lambda C, K: torch.geqrf(K.mT), 2 * D * U * U - 2 / 3 * U**3, 2 * D * U + U),
        (lambda C, K: torch.linalg.qr(K.mT), 4 * D * U * U - 4 / 3 * U**3, None),
        (lambda C, K: torch.linalg.qr(K.mT, mode="r"), 2 * D * U * U - 2 / 3 * U**3, None),
        (
            lambda C, K: torch.linalg.qr(K.mT, mode="complete"),
            2 * D * U * U - 2 / 3 * U**3 + 4 * (D * D * U - D * U * U + U**3 / 3),
            None,
        ),
        (lambda C, K: torch.linalg.qr(K), 2 * D * U * U - 2 / 3 * U**3 + 4 / 3 * U**3, None),
        (
            lambda C, K: torch.ormqr(*torch.geqrf(K.mT), C),
            2 * D * U * U - 2 / 3 * U**3 + 4 * D * D * U - 2 * D * U * U,
            None,
        ),
        (lambda C, K: torch.linalg.lu_factor(K.mT), D * U * U - U**3 / 3, None),
        (lambda C, K: torch.linalg.solve(C, K, left=False), 2 / 3 * D**3 + 2 * D * D * U, None),
        (lambda C, K: torch.linalg.solve(C, K.mT.expand(3, D, U)), 2 / 3 * D**3 + 3 * 2 * D * D * U, None),
        (lambda C, K: torch.cholesky_solve(K.mT, C.expand(3, D, D)), 3 * 2 * D * D * U, D * D + 4 * D * U),
        (lambda C, K: torch.linalg.slogdet(C), 2 / 3 * D**3, None),
        (lambda C, K: torch.linalg.pinv(K), 6 * D * U * U + 20 * U**3 + 2 * D * U * U, None),
        (lambda C, K: C.to(torch.complex64) @ K.mT.to(torch.complex64), 8 * D * D * U, None),
        (lambda C, K: C.expand(3, D, D) + 1.0, 0, 4 * D * D),
        (lambda C, K: C.index_select(0, torch.arange(U)), 0, 2 * D * U + 2 * 2 * U),
        (lambda C, K: C.index_add_(0, torch.arange(U), K), 0, 3 * D * U + 2 * 2 * U),
        (lambda C, K: torch.addmv(K[0], C, K[1]), 2 * D * D, D * D + 3 * D),
        (lambda C, K: C.addr_(K[0], K[1]), 2 * D * D, 2 * D * D + 2 * D),
        (lambda C, K: K[0] @ K[1], 2 * D, None),
        (lambda C, K: rk.ops.gain_products(C, K), 2 * D * D * U + D * U * U, D * D + 2 * D * U + U * U),
        (lambda C, K: rk.ops.downdate_(C, K.mT), D * D * U, 1.5 * D * D + D * U),
        (lambda C, K: rk.ops.qr_append_(C, K), 2 * D * D * U, D * D + D * U),
    ],
)
def test_a_call(action, flops, numbers) -> None:
    C, K = matrices()
    found = total(lambda: action(C, K))
    assert found.flops == pytest.approx(flops)
    assert found.wide == 0.0
    if numbers is not None:
        assert found.bytes == pytest.approx(B * numbers)


@pytest.mark.parametrize(
    "action",
    [
        lambda C, K: C @ K.mT,
        lambda C, K: torch.nn.functional.linear(K, C),
        lambda C, K: torch.linalg.solve(C, K.mT),
        lambda C, K: torch.linalg.eigvalsh(C),
        lambda C, K: rk.ops.gain_products(C, K),
    ],
)
def test_inference_mode_hides_no_work(action) -> None:
    C, K = matrices()
    usual = total(lambda: action(C, K))
    with torch.inference_mode():
        assert total(lambda: action(C, K)) == usual
    assert usual.flops > 0


def test_values_of_a_matrix_that_is_differentiated_need_the_vectors() -> None:
    C = matrices()[0].requires_grad_()
    assert total(lambda: torch.linalg.eigvalsh(C)).flops == 9 * D**3


def test_convolutions_are_work() -> None:
    layer, x = torch.nn.Conv1d(4, 8, 3), torch.ones(2, 4, 16)
    assert total(lambda: layer(x)).flops == 2 * 2 * 8 * 14 * 4 * 3


@pytest.mark.parametrize(
    ("action", "flops"),
    [
        (lambda C, K: torch.cdist(K, K), 3 * U * U * D),
        (lambda C, K: torch.cdist(C, K), 2 * D * U * (D + 2)),  # more than 25 points: a product
        (lambda C, K: torch.cdist(C.clone().requires_grad_(), K).detach(), 2 * D * U * (D + 2)),
        (lambda C, K: torch.cdist(C, K, p=1.0), 3 * D * U * D),
        (lambda C, K: torch.cdist(C, K, compute_mode="donot_use_mm_for_euclid_dist"), 3 * D * U * D),
        (lambda C, K: torch._addmm_activation(C[0], C, C), 2 * D**3),
        (lambda C, K: torch._int_mm(*[torch.ones(32, 32, dtype=torch.int8)] * 2), 2 * 32**3),
        (lambda C, K: torch.einsum("ij,kj->ik", C, K), 2 * D * D * U),
    ],
)
def test_calls_that_are_products_inside(action, flops) -> None:
    C, K = matrices()
    found = total(lambda: action(C, K))
    assert found.flops == flops
    assert not found.uncounted


@pytest.mark.parametrize("causal", [False, True])
def test_attention_is_work(causal: bool) -> None:
    """Of 2 x 3 heads, 5 queries and 7 keys: scores and values, and backward the scores again and four products."""
    q, k = torch.ones(2, 3, 5, 8, requires_grad=True), torch.ones(2, 3, 7, 8)
    attend = torch.nn.functional.scaled_dot_product_attention
    once = total(lambda: attend(q.detach(), k, k, is_causal=causal))
    assert once.flops == 2 * (2 * 3 * 5 * 7) * (8 + 8)
    both = total(lambda: attend(q, k, k, is_causal=causal).sum().backward())
    assert both.flops == once.flops + 2 * (2 * 3 * 5 * 7) * 5 * 8
    assert not both.uncounted


def test_work_of_which_no_number_is_known_is_named() -> None:
    """It stood as none, and "of ceiling" as if the step were slow."""
    C, K = matrices()
    found = count(lambda: (torch.linalg.matrix_exp(C), torch.fft.fft(K), C @ C, C.tanh(), C.sort()))
    assert found["other"].uncounted == {"aten::linalg_matrix_exp", "aten::_fft_r2c"}
    assert found["other"].flops == 2 * D**3
    assert found["other"].scaled(2.0).uncounted == Count.total(found.values()).uncounted == found["other"].uncounted
    with torch.library._scoped_library("counted_elsewhere", "FRAGMENT") as library:
        library.define("double(Tensor x) -> Tensor")
        library.impl("double", lambda x: x * 2, "CPU")
        foreign = total(lambda: torch.ops.counted_elsewhere.double(C))
    assert foreign.uncounted == {"counted_elsewhere::double"}


def test_a_leading_dimension_multiplies() -> None:
    C, K = matrices()
    one = total(lambda: rk.ops.rls_update_(C.clone(), K))
    three = total(lambda: rk.ops.rls_update_(C.expand(3, -1, -1).clone(), K.expand(3, -1, -1).contiguous()))
    assert three.flops == 3 * one.flops


def test_float64_is_counted_apart() -> None:
    C, K = matrices()
    found = total(lambda: (C @ K.mT, C.double() @ K.double().mT))
    assert found.wide == found.flops / 2 > 0


def test_work_belongs_to_the_stage_that_is_open() -> None:
    C, K = matrices()

    def step() -> None:
        with rk.profile.stage("products"):
            Y = C @ K.mT
        with rk.profile.stage("solve"):
            _ = K @ Y
        _ = Y * 2.0

    found = count(step)
    assert set(found) == {"products", "solve", "other"}
    assert found["products"].flops == 2 * D * D * U
    assert found["solve"].flops == 2 * U * D * U
    assert found["other"].flops == 0
    assert found["other"].bytes == 2 * D * U * B


def test_ops_outside_the_table_have_bytes_and_no_flops() -> None:
    C, _ = matrices()
    found = total(lambda: C.tanh())
    assert (found.flops, found.bytes) == (0.0, 2 * D * D * B)


def test_every_op_of_the_package_has_flops() -> None:
    from rlsedit_kernels.ops.schemas import SCHEMAS
    from rlsedit_kernels.profile import flops

    assert all(flops.known(f"rlsedit_kernels::{name}") for name in SCHEMAS)
