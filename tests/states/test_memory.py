"""No d x d temporary anywhere in an update: every tensor that appears on the way is counted."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support import builders
from torch.utils._python_dispatch import TorchDispatchMode

import rlsedit_kernels as rk
from rlsedit_kernels.backends import fallback
from rlsedit_kernels.states import wide
from rlsedit_kernels.states.reading import squared_norm

D, U = 1536, 8


class Largest(TorchDispatchMode):
    """Storage of the largest tensor that any call made anew, in elements."""

    def __init__(self, *known: torch.Tensor) -> None:
        super().__init__()
        self.known = {A.untyped_storage().data_ptr() for A in known}
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for A in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(A, torch.Tensor) and A.untyped_storage().data_ptr() not in self.known:
                self.elements = max(self.elements, A.untyped_storage().nbytes() // A.element_size())
        return out


@pytest.fixture
def inputs() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    C = torch.eye(D) + 0.01
    return C, builders.key_batch((), U, D, torch.float32, 0), builders.columns((), D, U, torch.float32, 1) * 0.01


def test_the_count_would_see_one(inputs) -> None:
    C, _, Z = inputs
    with Largest(C) as seen:
        _ = C - Z @ Z.mT
    assert seen.elements == D * D


@pytest.mark.parametrize(
    "op", ["gain_products", "downdate_", "downdate_gain_products_", "rls_update_", "qr_append_", "qr_gain"]
)
def test_fallback(op, inputs) -> None:
    C, K, Z = inputs
    R = C.triu()
    arguments = {
        "gain_products": (C, K),
        "downdate_": (C, Z),
        "downdate_gain_products_": (C, Z, K),
        "rls_update_": (C, K, 1.0, 0.9),
        "qr_append_": (R, K),
        "qr_gain": (R, K),
    }[op]
    with Largest(C, K, Z, R) as seen:
        fallback.kernels()[op](*arguments)
    assert 0 < seen.elements <= D * D // 5


def test_careful_step(inputs) -> None:
    C, K, Z = inputs
    with Largest(C, K, Z) as seen:
        wide.products(C, K.double())
        wide.change_(C, Z.double(), -1.0)
    assert 0 < seen.elements <= D * D // 2.9


@pytest.mark.parametrize("careful", [False, True])
def test_inverse_root(careful) -> None:
    A = torch.eye(D) + 0.01
    K = builders.key_batch((), U, D, torch.float32, 0) * (1e4 if careful else 1.0)
    state = rk.CovarianceState(rk.Prior.ridge(D, 1.0), form="inverse_root", guard="off")
    state._form.A = A
    with Largest(A) as seen:
        state.commit(K)
        state.remove(K, 2.0)  # float64 arithmetic in either case
    assert state.health().careful_steps == careful
    assert 0 < seen.elements <= D * D // 2.9


def test_a_norm_makes_no_float64_copy() -> None:
    """Nor one block after the other: what was freed in between was not used again, and the peak that of a copy."""
    W = torch.randn(2100, 2048)
    expected = float(W.double().norm()) ** 2
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as seen:
        found = squared_norm(W)
    taken = sum(max(event.self_cpu_memory_usage, 0) for event in seen.events())
    assert found == pytest.approx(expected, rel=1e-12)
    assert 0 < taken < W.numel()
