"""Keys whose squares leave float32: the same batch in other units, to the bit where these are powers of two."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import rlsedit_kernels as rk
from rlsedit_kernels.distributed import StateBank

D, U, V = 12, 3, 2
FORMS = ("plain", "whitened", "inverse_root", "auto")
forms = pytest.mark.parametrize("form", FORMS)
priors = pytest.mark.parametrize("kind", ["ridge", "anchor"])
SCALE = 2.0**-80
"""Squares of keys of this size are 0 in float32."""


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def prior(kind: str) -> rk.Prior:
    if kind == "ridge":
        return rk.Prior.ridge(D, 2.0)
    A = randn(4 * D, D, seed=7)
    return rk.Prior.anchor(A.mT @ A / D)


def made(form: str, kind: str = "ridge", **more: Any) -> Any:
    if form == "square_root":
        return rk.SquareRootState(prior(kind), **more)
    state = rk.CovarianceState(prior(kind), form=form, **more)
    state.update(randn(U, D, seed=1).float())  # an automatic state has a form from here on
    return state


def off(A: torch.Tensor, B: torch.Tensor) -> float:
    return float((A.double() - B.double()).norm() / B.double().norm())


@forms
@priors
@pytest.mark.parametrize("scale", [SCALE, 2.0**-110, 2.0**60])
def test_a_hard_write_does_not_depend_on_the_size_of_its_keys(form, kind, scale) -> None:
    """K C K' of small ones was 0, nothing was written and nobody was told; of large ones it overflowed."""
    K, (one, other) = randn(U, D).float(), [made(form, kind) for _ in range(2)]
    gain, scaled = one.update(K, 0.0), other.update(scale * K, 0.0)
    assert off(scale * scaled, gain) < 1e-6
    if one.form == other.form:  # large keys may ask for another form
        assert torch.equal(scale * scaled, gain)
    assert off(K.double() @ gain.double(), torch.eye(U)) < 1e-5
    later = randn(U, D, seed=3).float()
    assert off(other.update(later), one.update(later)) < 1e-5
    C = other.covariance().double()
    assert float((K.double() @ C).norm()) < 1e-5 * float(K.double().norm() * C.norm())


@forms
def test_a_short_key_beside_a_long_one_is_written_hard_as_well(form) -> None:
    """It was taken for a multiple of the long one: what is short was all within its rounding."""
    K, sizes = randn(U, D).float(), torch.tensor([1.0, 1e-5, 1e-30])
    gain = made(form).update(sizes[:, None] * K, 0.0)
    assert off(K.double() @ (gain * sizes).double(), torch.eye(U)) < 1e-5


@forms
def test_what_no_gain_can_hold_is_refused(form) -> None:
    state = made(form)
    before = state.covariance()
    with pytest.raises(ValueError, match=r"the gain overflows torch\.float32: keys of size"):
        state.update(torch.full((1, D), 1e-40), 0.0)
    assert torch.equal(state.covariance(), before)


@pytest.mark.parametrize("form", [*FORMS, "square_root"])
@priors
@pytest.mark.parametrize("forget", [1.0, 0.5])
def test_a_batch_of_small_keys_and_as_small_a_noise_is_one_of_usual_size(form, kind, forget) -> None:
    """K C K' and the noise were both 0: the gain came out twice as large as it is, or more."""
    K, later = randn(U, D).float(), randn(U, D, seed=3).float()
    one, other = made(form, kind), made(form, kind)
    for noise in (1.0, 0.25):
        gain, scaled = one.update(K, noise, forget), other.update(SCALE * K, SCALE * SCALE * noise, forget)
        assert off(SCALE * scaled, gain) < 2e-6
    assert other.health().rho == pytest.approx(one.health().rho, rel=1e-6)  # it was that of noise alone
    assert off(other.update(later), one.update(later)) < 1e-5
    assert off(other.covariance(), one.covariance()) < 1e-5
    if forget == 1.0:
        assert off(SCALE * other.remove(SCALE * K, SCALE * SCALE), one.remove(K)) < 1e-4
        assert off(other.covariance(), one.covariance()) < 1e-4


def test_a_state_from_nothing_takes_a_small_noise() -> None:
    """The gain was divided by a noise that is 0 in float32: refused as one that overflows."""
    K = randn(D, D).float()
    gain = rk.SquareRootState(rk.Prior.ridge(D, 0.0)).update(SCALE * K, SCALE * SCALE)
    assert off(SCALE * gain, torch.linalg.inv(K.double())) < 1e-3


@pytest.mark.parametrize("noise", [1e-84, 1e-92])
def test_a_noise_whose_root_has_no_digits_left_in_float32(noise) -> None:
    """Keys and targets were divided by 0, or by 1e-42, of which float32 keeps few digits."""
    K, goal = 1e-36 * randn(U, D), 1e-36 * randn(U, V, seed=5)
    found = rk.RLSFilter(torch.zeros(D, V), prior("ridge"), "square_root", layout="in_out")
    found.update(K.float(), goal.float(), noise)
    assert off(found.state.precision(), K.mT @ K / noise) < 1e-6
    assert off(found.state.factor.mT.double() @ found._solution.B.double(), K.mT @ goal / noise) < 1e-5


@pytest.mark.parametrize("how", [{"form": "plain"}, {"form": "whitened"}, {"form": "inverse_root"}, {"form": "auto"}])
@pytest.mark.parametrize("noise", [0.0, 1.0])
def test_a_filter_says_of_small_keys_what_it_says_of_others(how, noise) -> None:
    """Weight, residual and objective; V in the units of K."""
    K, goal, W = randn(U, D).float(), randn(U, V, seed=5).float(), randn(D, V, seed=6).float()
    one, other = (rk.RLSFilter(W.clone(), prior("anchor"), layout="in_out", **how) for _ in range(2))
    for rls in (one, other):
        rls.update(randn(U, D, seed=1).float(), randn(U, V, seed=2).float())
    step, scaled = one.update(K, goal, noise), other.update(SCALE * K, SCALE * goal, SCALE * SCALE * noise)
    assert off(other.weight, one.weight) < 1e-6
    assert scaled.innovation_norm == pytest.approx(SCALE * step.innovation_norm, rel=1e-5)
    assert scaled.objective == pytest.approx(step.objective, rel=1e-5)
    if noise > 0.0:
        assert scaled.residual_norm == pytest.approx(SCALE * step.residual_norm, rel=1e-4)
        assert scaled.parameter_bound is None
        assert scaled.anchor_bound == pytest.approx(step.anchor_bound, rel=1e-5)
    else:
        assert scaled.residual_norm < 1e-5 * scaled.innovation_norm


@pytest.mark.parametrize("form", ["plain", "whitened"])
@pytest.mark.parametrize("noise", [0.0, 1.0])
def test_states_side_by_side_do_as_one_alone(form, noise) -> None:
    small = SCALE * randn(U, D).float()
    bank = StateBank({name: prior("anchor") for name in "ab"}, form=form)
    alone = rk.CovarianceState(prior("anchor"), form=form)
    if form == "whitened":
        alone._form._densify()
    gains = bank.update({name: (small, SCALE * SCALE * noise) for name in "ab"})
    wanted = alone.update(small, SCALE * SCALE * noise)
    assert all(off(gains[name], wanted) < 1e-6 for name in "ab")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_keys_are_measured_whatever_their_size(dtype) -> None:
    """|k|^2 of keys of 1e-30 was 0, and infinite of keys of 1e25."""
    for size in (1e-30, 1e-15, 1.0, 1e25):
        state = rk.SquareRootState(prior("ridge"), dtype=dtype)
        state.commit(torch.full((2, D), size, dtype=dtype), noise=size**2)
        assert state._counters.largest_key == pytest.approx(D * size**2, rel=1e-5)
