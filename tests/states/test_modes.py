"""Autocast and inference mode do not reach what a state works out: under them all bits are those without."""

from __future__ import annotations

import contextlib
import copy
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


@pytest.mark.parametrize("name", PRIORS)
class TestInferenceMode:
    @pytest.mark.parametrize("form", FORMS)
    def test_a_state_gives_the_same_bits(self, form, name) -> None:
        expected = of_a_state(form, name)
        with torch.inference_mode():
            same(of_a_state(form, name), expected)

    @pytest.mark.parametrize("kind", FILTERS)
    def test_a_filter_gives_the_same_bits(self, kind, name) -> None:
        expected = of_a_filter(FILTERS[kind], name)
        with torch.inference_mode():
            same(of_a_filter(FILTERS[kind], name), expected)

    @pytest.mark.parametrize("form", FORMS)
    @pytest.mark.parametrize("made_inside", ["made", "updated", "copied", "loaded", "refactored"])
    def test_a_state_goes_on_outside(self, form, name, made_inside) -> None:
        keys = [batch.K for batch in batches(13)]
        expected: Any = made(form, name)
        for K in keys[:2]:
            expected.update(K)
        with torch.inference_mode(made_inside == "made"):
            state: Any = made(form, name)
        with torch.inference_mode(made_inside == "updated"):
            for K in keys[:2]:
                state.update(K)
        with torch.inference_mode():
            if made_inside == "copied":
                state = copy.deepcopy(state)
            if made_inside == "loaded":
                state.load_state_dict(copy.deepcopy(state.state_dict()))
            if made_inside == "refactored":
                state.refactor([(K, 1.0) for K in keys[:2]])
        if made_inside == "refactored":
            expected.refactor([(K, 1.0) for K in keys[:2]])
        for one in (expected, state):
            for K in keys[2:]:
                one.update(K, 0.5, 0.99)
            one.restrict(torch.linalg.qr(keys[0].mT)[0])
            one.update(keys[1])
        same(state.state_dict(), expected.state_dict())

    @pytest.mark.parametrize("kind", FILTERS)
    @pytest.mark.parametrize("inplace", [False, True])
    @pytest.mark.parametrize("layout", ["in_out", "out_in"])
    def test_a_filter_goes_on_outside(self, kind, name, inplace, layout) -> None:
        """A weight of inference mode that is written in place among them."""
        given = batches(9)
        W = torch.randn(D, given[0].V.shape[1], generator=torch.Generator().manual_seed(2))
        W = W.to(FILTERS[kind].get("dtype", torch.float32))
        W = W if layout == "in_out" else W.mT.contiguous()
        expected = rk.RLSFilter(W.clone(), prior(name), layout=layout, inplace=inplace, **FILTERS[kind])
        with torch.inference_mode():
            own = W.clone()
            rls = rk.RLSFilter(own, prior(name), layout=layout, inplace=inplace, **FILTERS[kind])
        for batch in given[:4]:
            assert rls.update(batch.K, batch.V) == expected.update(batch.K, batch.V)
        with torch.inference_mode():
            assert rls.update(given[4].K, given[4].V) == expected.update(given[4].K, given[4].V)
            twin = copy.deepcopy(rls)
        for one in (rls, twin, expected):
            one.update(given[5].K, given[5].V)
            one.remove(given[2].K, given[2].V)
        assert torch.equal(rls.weight, expected.weight)
        assert torch.equal(twin.weight, expected.weight)
        assert not inplace or torch.equal(own, expected.weight)
        if FILTERS[kind].get("track_bounds", True):
            for one in (rls, twin, expected):
                one.refactor([(batch.K, batch.V, 1.0) for batch in given])
            assert torch.equal(rls.weight, expected.weight)
        rls.load_state_dict(expected.state_dict())
