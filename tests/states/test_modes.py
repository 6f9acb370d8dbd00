"""Autocast does not reach what a state works out: under it all bits are those without."""

from __future__ import annotations

import contextlib
from itertools import islice
from typing import Any

import pytest
import torch

import rlsedit_kernels as rk
from rlsedit_kernels.backends.precision import ieee_products
from rlsedit_kernels.diagnostics import make_stream

D, U = 40, 4
FORMS = ("auto", "plain", "whitened", "inverse_root", "square_root")
PRIORS = ("ridge", "moment")
FILTERS: dict[str, dict[str, Any]] = {
    "auto": {},
    "plain": {"form": "plain"},
    "whitened": {"form": "whitened"},
    "inverse_root": {"form": "inverse_root"},
    "no bounds": {"track_bounds": False},
    "carried": {"state": "square_root"},
    "square_root, gain": {"state": "square_root", "solution": "gain"},
    "float64": {"dtype": torch.float64},
}


def prior(name: str) -> rk.Prior:
    if name == "ridge":
        return rk.Prior.ridge(D, 1.0)
    X = torch.randn(3 * D, D, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    return rk.Prior.anchor(X.mT @ X, lam=1.0)


def batches(count: int) -> list:
    return list(islice(make_stream("easy", D, U).batches(), count))


def flat(found: object) -> list[object]:
    if isinstance(found, dict):
        return [one for value in found.values() for one in flat(value)]
    if isinstance(found, (list, tuple)):
        return [one for value in found for one in flat(value)]
    return [found]


def same(one: object, other: object) -> None:
    left, right = flat(one), flat(other)
    assert len(left) == len(right)
    for a, b in zip(left, right, strict=True):
        if isinstance(a, torch.Tensor):
            assert a.dtype == b.dtype
            assert torch.equal(a, b)
        else:
            assert a == b or (a != a and b != b)


def made(form: str, name: str) -> rk.CovarianceState | rk.SquareRootState:
    return rk.SquareRootState(prior(name)) if form == "square_root" else rk.CovarianceState(prior(name), form=form)


def of_a_state(form: str, name: str) -> object:
    """All that a state gives along a stream."""
    given, seen = batches(9), []
    state: Any = made(form, name)
    for batch in given[:5]:
        seen += [state.gain(batch.K), state.update(batch.K, 0.5)]
    state.commit(given[5].K * 3.0, 0.1, 0.9)
    state.commit(given[5].K, 1.0)
    seen += [state.remove(given[5].K), state.covariance(), state.precision()]
    if form == "square_root":
        B = torch.zeros(D, 3)
        V = torch.arange(12.0).reshape(U, 3)
        state.append_with(B, given[6].K, V)
        seen += [B.clone(), state.half(given[7].K), state.solve(B)]
        state.remove_with(B, given[6].K, V)
        seen += [B]
    else:
        state.commit(given[6].K, 0.0)
    state.restrict(torch.linalg.qr(given[7].K.mT.double())[0].to(torch.float32))
    seen += [state.health().as_dict(), state.health(thorough=True).as_dict(), state.state_dict()]
    seen += [state.to(dtype=torch.float64).covariance(), state.convert("whitened").state_dict()]
    state.refactor([(batch.K, 0.5) for batch in given])
    state.look()
    return [*seen, state.state_dict(), state.clone().covariance()]


def of_a_filter(arguments: dict[str, Any], name: str) -> object:
    given, seen = batches(9), []
    W = torch.randn(D, given[0].V.shape[1], generator=torch.Generator().manual_seed(2))
    rls = rk.RLSFilter(W, prior(name), layout="in_out", **arguments)
    for batch in given[:8]:
        seen += [vars(rls.update(batch.K, batch.V)), rls.weight.clone()]
    seen += [vars(rls.remove(given[2].K, given[2].V)), rls.weight.clone(), rls.health(thorough=True).as_dict()]
    if arguments.get("track_bounds", True):
        rls.refactor([(batch.K, batch.V, 1.0) for batch in given])
    return [*seen, rls.weight, rls.state_dict()]


@pytest.mark.parametrize("name", PRIORS)
class TestAutocast:
    @pytest.mark.parametrize("form", FORMS)
    def test_a_state_gives_the_same_bits(self, form, name, backend) -> None:
        expected = of_a_state(form, name)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            same(of_a_state(form, name), expected)

    @pytest.mark.parametrize("kind", FILTERS)
    def test_a_filter_gives_the_same_bits(self, kind, name, backend) -> None:
        expected = of_a_filter(FILTERS[kind], name)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            same(of_a_filter(FILTERS[kind], name), expected)


def test_autocast_is_back_afterwards() -> None:
    a = torch.ones(2, 2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for error in (None, RuntimeError):
            with contextlib.suppress(RuntimeError), ieee_products():
                assert (a @ a).dtype == torch.float32
                with ieee_products():
                    assert (a @ a).dtype == torch.float32
                assert (a @ a).dtype == torch.float32
                if error:
                    raise error
            assert (a @ a).dtype == torch.bfloat16
    with ieee_products():
        pass
    assert not torch.is_autocast_enabled("cpu")
