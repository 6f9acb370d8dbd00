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
