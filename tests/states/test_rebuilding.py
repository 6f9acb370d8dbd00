"""A covariance made anew, or moved to another form, knows how long its keys are in the coordinates that it has then."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import rlsedit_kernels as rk

D, U = 16, 4


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def steep() -> rk.Prior:
    """C_0 from 1 down to 1e-8 along the axes."""
    return rk.Prior.precision(torch.diag(torch.logspace(0, 8, D, dtype=torch.float64)))


def warned(state: Any) -> str:
    """The warning about rho, without what it advises; nothing where there is none."""
    return next((text.split(":")[0] for text in state.health().messages if text.startswith("rho")), "")


def batches(size: float = 1.0, axes: int = D) -> list[tuple[torch.Tensor, float]]:
    found = []
    for seed in range(3):
        K = torch.zeros(U, D)
        K[:, D - axes :] = size * randn(U, axes, seed=seed).float()
        found.append((K, 1.0))
    return found


def written(form: str, given: rk.Prior, stream: list[tuple[torch.Tensor, float]], **more: Any) -> rk.CovarianceState:
    state = rk.CovarianceState(given, form=form, guard="off", **more)
    for K, noise in stream:
        state.update(K, noise)
    return state


WEAK = rk.Prior.ridge(D, 1e-4)


@pytest.mark.parametrize(
    ("form", "given"),
    [("whitened", WEAK), ("whitened", rk.Prior.precision(1e-8 * torch.eye(D).double())), ("inverse_root", WEAK)],
)
def test_a_rebuilt_state_still_warns_of_rho(form, given) -> None:
    """The largest key in the coordinates of the form was forgotten, and the warning with it."""
    stream = batches()
    state = written(form, given, stream)
    before = warned(state)
    state.refactor(stream)
    assert "is high for" in before
    assert warned(state) == before


@pytest.mark.parametrize("form", ["whitened", "inverse_root", "plain", "auto"])
def test_a_rebuilt_state_has_the_figures_of_one_that_was_written(form) -> None:
    stream = batches(1e-2)
    state = written(form, steep(), stream)
    before = state._counters.largest_inner
    state.refactor(stream)
    assert state._counters.largest_inner == pytest.approx(before, rel=1e-5)


def test_what_is_restricted_counts_for_nothing_in_a_rebuilt_state() -> None:
    """Keys that are huge along forbidden directions alone: the form that holds these does not see it."""
    Q = torch.eye(D)[:, :2].contiguous()
    stream = batches(1e-3)
    for K, _ in stream:
        K[:, :2] *= 1e7
    state = rk.CovarianceState(rk.Prior.ridge(D, 1.0), form="whitened", guard="off")
    state.restrict(Q)
    for K, noise in stream:
        state.update(K, noise)
    before = state._counters.largest_inner
    assert warned(state) == ""
    state.refactor(stream)
    assert warned(state) == ""
    assert state._counters.largest_inner == pytest.approx(before, rel=1e-3)


@pytest.mark.parametrize("form", ["whitened", "inverse_root"])
def test_a_state_that_is_converted_keeps_or_bounds_the_length_of_its_keys(form) -> None:
    """That of the keys themselves was taken for it: too few warnings under a weak prior, and one too many."""
    weak = written("plain", rk.Prior.ridge(D, 1e-3), batches(1e-2), dtype=torch.float64).convert(form)
    assert weak._counters.largest_inner == pytest.approx(1e6 * weak._counters.largest_key)
    strong = written("plain", rk.Prior.ridge(D, 1e3), batches(1e3)).convert(form)
    assert strong._counters.largest_inner == pytest.approx(1e-6 * strong._counters.largest_key)
    assert warned(strong) == ""
    again = strong.convert("inverse_root" if form == "whitened" else "whitened")
    assert again._counters.largest_inner == strong._counters.largest_inner
    assert strong.convert("plain")._counters.largest_inner == strong._counters.largest_key


def test_a_move_that_is_taken_back_leaves_no_trace() -> None:
    state = rk.CovarianceState(steep())
    state.update(1e-3 * randn(U, D).float())
    before = state._counters.largest_inner
    large = 30.0 * randn(U, D, seed=1).float()
    with pytest.raises(rk.BreakdownError, match="cannot hold more of it"):
        state.update(large, 1.0, 1e-40)
    assert state._counters.largest_inner == before
    state.update(large)
    assert state._form.maps
    assert state._counters.largest_inner >= before
