"""A batch that was prepared is written into the state that it was prepared for, or not at all."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.bits import same

import rlsedit_kernels as rk

D = 16


def keys(seed: int, u: int = 3) -> torch.Tensor:
    return torch.randn(u, D, generator=torch.Generator().manual_seed(seed))


def made(form: str) -> Any:
    prior = rk.Prior.ridge(D, 1.0)
    return rk.SquareRootState(prior) if form == "square_root" else rk.CovarianceState(prior, form=form)


CHANGES: dict[str, Callable[[Any], object]] = {
    "update": lambda state: state.update(keys(2)),
    "remove": lambda state: state.remove(keys(0)),
    "restrict": lambda state: state.restrict(torch.eye(D)[:, :2]),
    "refactor": lambda state: state.refactor([(keys(0), 1.0)]),
    "load_state_dict": lambda state: state.load_state_dict(state.state_dict()),
    "take_covariance": lambda state: state.take_covariance(state.covariance().double(), 1.0),
    "append_with": lambda state: state.append_with(torch.zeros(D, 2), keys(2), torch.zeros(3, 2)),
    "remove_with": lambda state: state.remove_with(torch.zeros(D, 2), keys(0), torch.zeros(3, 2)),
}


FORMS = ("plain", "whitened", "inverse_root", "square_root")


@pytest.mark.parametrize(
    ("form", "change"), [(f, change) for f in FORMS for change in CHANGES if hasattr(made(f), change)]
)
def test_after_any_change_it_is_refused(form: str, change: str) -> None:
    state = made(form)
    state.commit(keys(0))
    prepared = state.prepare(keys(1))
    CHANGES[change](state)
    before = state.state_dict()
    with pytest.raises(ValueError, match="prepare it again"):
        state.write(prepared)
    assert same(state.state_dict(), before)
    state.write(state.prepare(keys(1)))


@pytest.mark.parametrize("form", FORMS)
def test_after_what_changes_nothing_it_is_written(form: str) -> None:
    state = made(form)
    state.commit(keys(0))
    twin = state.clone()
    prepared = state.prepare(keys(1))
    state.gain(keys(2))
    state.covariance()
    state.health(thorough=True)
    state.clone().commit(keys(2))
    with pytest.raises(rk.LeverageError):
        state.remove(100.0 * keys(5, u=D))
    state.write(prepared)
    twin.commit(keys(1))
    assert torch.equal(state.covariance(), twin.covariance())


@pytest.mark.parametrize("form", FORMS)
def test_another_state_does_not_take_it(form: str) -> None:
    """Not one of the same age, and not a copy that has gone another way; nothing is written."""
    state, other = made(form), made(form)
    state.commit(keys(0))
    other.commit(keys(5))
    twin = state.clone()
    for one in (state, twin):
        one.commit(keys(6) if one is twin else keys(7))
    prepared = state.prepare(keys(1))
    for one in (other, twin, made(form)):
        before = one.state_dict()
        with pytest.raises(ValueError, match="another state prepared it"):
            one.write(prepared)
        assert same(one.state_dict(), before)
    state.write(prepared)


@pytest.mark.parametrize("form", FORMS)
def test_a_copy_takes_what_was_prepared_for_both(form: str) -> None:
    """As long as neither it nor what it is a copy of has changed since they were one."""
    state = made(form)
    state.commit(keys(0))
    prepared = state.prepare(keys(1))
    twin = state.clone()
    state.write(prepared)
    twin.write(prepared)
    assert torch.equal(state.covariance(), twin.covariance())
    with pytest.raises(ValueError, match="prepare it again"):
        twin.write(prepared)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("given", [None, 3, "a batch"])
def test_what_nobody_prepared_is_refused(form: str, given: Any) -> None:
    with pytest.raises(TypeError, match=f"write: needs what prepare\\(\\) gave, got {type(given).__name__}"):
        made(form).write(given)
