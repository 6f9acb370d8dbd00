"""Noise, forgetting and alpha: what is refused, what overflows, and how torch.compile takes values that change."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from support import builders, pretended

import rlsedit_kernels as rk

on_a_true_device = pytest.mark.skipif(
    pretended.active(), reason="torch.compile wants a device that is there, not a pretended one"
)
Call = Callable[[torch.Tensor, float], object]


def calls() -> dict[str, tuple[Call, float]]:
    """Calls of every op that takes a number, as functions of a matrix and the number, and a value that is good."""
    K = builders.key_batch((), 3, 8, torch.float32, 1)
    Z = builders.columns((), 8, 2, torch.float32, 2) * 0.1
    return {
        "gain_solve noise": (lambda C, x: rk.ops.gain_solve(Z, C[:2, :2], x), 0.5),
        "downdate_ alpha": (lambda C, x: rk.ops.downdate_(C, Z, x), -0.5),
        "downdate_gain_products_ alpha": (lambda C, x: rk.ops.downdate_gain_products_(C, Z, K, x), -0.5),
        "rls_update_ noise": (lambda C, x: rk.ops.rls_update_(C, K, x), 0.5),
        "rls_update_ forget": (lambda C, x: rk.ops.rls_update_(C, K, 0.5, x), 0.5),
    }


NAMES = (
    "gain_solve noise",
    "downdate_ alpha",
    "downdate_gain_products_ alpha",
    "rls_update_ noise",
    "rls_update_ forget",
)


@on_a_true_device
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dynamic", [None, True])
def test_one_graph_takes_values_that_change(name, dynamic, backend) -> None:
    call, good = calls()[name]
    torch._dynamo.reset()
    compiled = torch.compile(call, backend="aot_eager", fullgraph=True, dynamic=dynamic)
    for i in range(4):
        value = good + 0.05 * i
        C, compiled_C = (builders.symmetric((), 8, torch.float32, 0) for _ in range(2))
        expected, got = call(C, value), compiled(compiled_C, value)
        torch.testing.assert_close(got, expected, rtol=0.0, atol=0.0)
        assert torch.equal(compiled_C, C)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 1e39])
def test_what_is_not_finite_in_the_dtype_is_refused(name, value) -> None:
    call, _ = calls()[name]
    C = builders.symmetric((), 8, torch.float32, 0)
    before = C.clone()
    message = name.split()[1] + (r" must be in \(0, 1\]" if "forget" in name else " must be finite")
    with pytest.raises(ValueError, match=message):
        call(C, value)
    assert torch.equal(C, before)


def test_the_message_says_what_the_dtype_holds() -> None:
    with pytest.raises(
        ValueError, match=r"noise must be finite and >= 0 \(at most 3.403e\+38 in float32\), got 1e\+39"
    ):
        rk.ops.rls_update_(torch.eye(2), torch.ones(1, 2), 1e39)
    with pytest.raises(ValueError, match=r"alpha must be finite \(at most 3.403e\+38 in float32\), got -1e\+39"):
        rk.ops.downdate_(torch.eye(2), torch.ones(2, 1), -1e39)


def test_forgetting_so_much_that_the_covariance_overflows_is_refused() -> None:
    C = torch.eye(2)
    with pytest.raises(ValueError, match=r"forget must be at least 2.939e-39 in float32, got 1e-40"):
        rk.ops.rls_update_(C, torch.ones(1, 2), 1.0, 1e-40)
    assert torch.equal(C, torch.eye(2))
    with pytest.raises(ValueError, match=r"forget must be at least 5.563e-309 in float64, got 1e-310"):
        rk.ops.rls_update_(C.double(), torch.ones(1, 2, dtype=torch.float64), 1.0, 1e-310)
    rk.ops.rls_update_(C, torch.ones(1, 2), 1.0, 3e-39)
    assert C.isfinite().all()


@pytest.mark.parametrize("name", NAMES)
def test_an_int_that_is_no_float_is_refused(name) -> None:
    call, _ = calls()[name]
    with pytest.raises(ValueError, match=name.split()[1] + " must be finite, got an int that is no float"):
        call(builders.symmetric((), 8, torch.float32, 0), 10**400)


def test_float64_takes_what_overflows_float32(backend) -> None:
    C = torch.eye(2, dtype=torch.float64)
    gain, info = rk.ops.rls_update_(C, torch.ones(1, 2, dtype=torch.float64), 1e39)
    assert not info.any()
    torch.testing.assert_close(gain, torch.full((2, 1), 1e-39, dtype=torch.float64), rtol=1e-12, atol=0.0)


def test_unchecked_noise_that_overflows_is_a_factor_that_failed(backend) -> None:
    C = torch.eye(2)
    gain, info = torch.ops.rlsedit_kernels.rls_update_.default(C, torch.ones(1, 2), 1e39)
    assert int(info) == 1
    assert gain.isnan().all()
    assert torch.equal(C, torch.eye(2))
    gain, Z, info = torch.ops.rlsedit_kernels.gain_solve.default(torch.ones(3, 2), torch.eye(2), 1e39)
    assert int(info) == 1
    assert gain.isnan().all()
    assert Z.isnan().all()
