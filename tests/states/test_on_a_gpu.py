"""States, filters and stand-ins on a GPU do what they do on the CPU: `--device cuda`, with a GPU or a pretended one.

Unlike in the tests of the ops, tensors are made on the CPU and brought over, under either default device: a tensor that
the product makes where nobody asked for it shows.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from support import builders
from support.default_device import plain_torch_under
from support.tolerances import relative_error
from torch.utils import _pytree as pytree

import rlsedit_kernels as rk
from rlsedit_kernels import dropin

if torch.get_default_device().type != "cuda":
    pytest.skip("needs --device cuda, with a GPU or --pretend-cuda", allow_module_level=True)

D, V, U, BATCHES = 24, 7, 5, 4
CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
TOLERANCE = {torch.float32: 2e-3, torch.float64: 1e-8}
"""A few batches on priors of condition 100: what differs is the order of sums, times the condition and a leverage."""

FORMS = ("auto", "plain", "whitened", "inverse_root", "square_root")
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
FILTERS = ({"track_bounds": False}, {}, {"state": "square_root"}, {"state": "square_root", "solution": "gain"})
forms = pytest.mark.parametrize("form", FORMS)


@pytest.fixture(autouse=True, params=["cpu", "cuda"], ids=["default-cpu", "default-cuda"])
def default_device(request: pytest.FixtureRequest) -> Iterator[None]:
    with plain_torch_under(request.param):
        yield


def given(A: np.ndarray, device: torch.device, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(A)).to(device=device, dtype=dtype)


def random(seed: int) -> np.random.Generator:
    return np.random.default_rng(seed)


def priors(device: torch.device) -> dict[str, Callable[[], rk.Prior]]:
    S = given(builders.spd(D, 100.0, random(0)), device)
    keys, Q = given(builders.keys(3 * D, D, random(1)), device), given(builders.orthogonal(D, random(2)), device)
    return {
        "ridge": lambda: rk.Prior.ridge(D, 0.7),
        "anchor": lambda: rk.Prior.anchor(S, mu=1.5, lam=0.1),
        "anchor_keys": lambda: rk.Prior.anchor_keys(keys, 1.5, lam=0.2),
        "null_space": lambda: rk.Prior.null_space(Q[:, : D - 6], 2.0),
        "projector": lambda: rk.Prior.null_space(Q[:, :-6] @ Q[:, :-6].mT, 2.0),
        "precision": lambda: rk.Prior.precision(S),
    }


def batches(device: torch.device, dtype: torch.dtype) -> list[tuple[torch.Tensor, torch.Tensor]]:
    rng = random(3)
    return [
        (given(builders.keys(U, D, rng), device, dtype), given(rng.standard_normal((U, V)), device, dtype))
        for _ in range(BATCHES)
    ]


def directions(device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    return given(builders.orthogonal(D, random(4))[:, :2], device, dtype)


def state_of(form: str, prior: rk.Prior, dtype: torch.dtype, device: Any, **options: Any) -> Any:
    if form == "square_root":
        return rk.SquareRootState(prior, dtype=dtype, device=device, **options)
    return rk.CovarianceState(prior, form=form, dtype=dtype, device=device, **options)


def same(walk: Callable[[torch.device], list[Any]], dtype: torch.dtype) -> None:
    """`walk` gives tensors on its device and numbers, equal on both devices to rounding."""
    found, expected = walk(GPU), walk(CPU)
    assert len(found) == len(expected)
    for i, (mine, theirs) in enumerate(zip(found, expected, strict=True)):
        if isinstance(mine, torch.Tensor):
            assert (mine.device, mine.dtype) == (GPU, theirs.dtype), i
            assert relative_error(mine, theirs) < TOLERANCE[dtype], i
        elif isinstance(theirs, float):
            assert mine == pytest.approx(theirs, rel=TOLERANCE[dtype], abs=TOLERANCE[dtype]), i
        else:
            assert mine == theirs, i


@pytest.mark.parametrize("lies", ["prior-cpu", "prior-gpu"])
class TestPriors:
    @forms
    @pytest.mark.parametrize("kind", ["ridge", "anchor", "null_space"])
    def test_a_stream(self, kind: str, lies: str, form: str) -> None:
        def walk(device: torch.device) -> list[Any]:
            prior = priors(GPU if lies == "prior-gpu" else CPU)[kind]()
            state = state_of(form, prior, torch.float32, device)
            found: list[Any] = [] if form == "square_root" else [state.covariance(), state.precision()]
            for K, _ in batches(device, torch.float32):
                found.append(state.update(K, noise=0.5))
            health = state.health(thorough=True)
            assert health.error is not None
            assert health.error < 1e-2
            return [*found, state.covariance(), state.precision(), health.status, health.steps]

        same(walk, torch.float32)

    @pytest.mark.parametrize("kind", ["ridge", "anchor", "anchor_keys", "null_space", "projector", "precision"])
    def test_what_it_tells(self, kind: str, lies: str) -> None:
        here, there = priors(CPU)[kind](), priors(GPU if lies == "prior-gpu" else CPU)[kind]()
        assert there.signature()["sums"] == pytest.approx(here.signature()["sums"], rel=1e-9)
        assert there.factor.condition == pytest.approx(here.factor.condition, rel=1e-9)
        for name in ("covariance", "precision"):
            assert relative_error(getattr(there.factor, name)(), getattr(here.factor, name)()) < 1e-9
        assert relative_error(there.information(), here.information()) < 1e-9


@forms
@dtypes
class TestStates:
    def test_operations(self, form: str, dtype: torch.dtype) -> None:
        def walk(device: torch.device) -> list[Any]:
            state = state_of(form, priors(CPU)["anchor"](), dtype, device)
            found: list[Any] = []
            stream = [K for K, _ in batches(device, dtype)]
            found.append(state.gain(stream[0]))
            state.commit(stream[0])
            found.append(state.update(stream[1], noise=0.3))
            prepared = state.prepare(stream[2], forget=1.0)
            state.write(prepared)
            found.append(state.remove(stream[1], noise=0.3))
            state.refactor([(stream[0], 1.0), (stream[2], 1.0)])
            found.append(state.remove(stream[0], remaining=[(stream[2], 1.0)]))
            found.append(state.update(stream[3], noise=2.0, forget=0.9))
            twin = state.clone()
            state.restrict(directions(device, dtype))
            found += [state.covariance(), state.precision(), twin.covariance()]
            if form != "square_root":
                twin.commit(stream[1], noise=0.0)
                found += [twin.covariance(), twin.update(stream[2]), twin.health().status]
            health = state.health()
            return [*found, state.update(stream[1]), health.status, health.drift < 1e-3]

        same(walk, dtype)

    def test_moves_between_forms_and_devices(self, form: str, dtype: torch.dtype) -> None:
        def walk(device: torch.device) -> list[Any]:
            K, _ = batches(device, dtype)[0]
            state = state_of(form, priors(CPU)["anchor"](), dtype, device)
            state.commit(K)
            found: list[Any] = []
            for other in FORMS:
                twin = state.convert(other)
                found += [twin.covariance(), twin.update(K), twin.health().status]
            for twin in (state.to("cpu").to(device), state.to(dtype=torch.float64), state.to(device)):
                found += [twin.update(K.to(twin.dtype)), twin.covariance(), twin.health().status]
            moved = state.to("cpu" if device == GPU else "cuda")
            moved.update(K.to(moved.device))
            found.append(moved.to(device).covariance())
            state.restrict(directions(device, dtype))
            return [*found, *(state.convert(other).covariance() for other in FORMS)]

        same(walk, dtype)

    @pytest.mark.parametrize(("saved_on", "read_to"), [("cpu", "cpu"), ("cuda", "cpu"), ("cuda", "cuda")])
    def test_saved_states(self, form: str, dtype: torch.dtype, saved_on: str, read_to: str) -> None:
        """Wherever the tensors of a saved state lie, they go to the device of the state that reads them."""

        def walk(device: torch.device) -> list[Any]:
            prior, stream = priors(CPU)["anchor"](), [K for K, _ in batches(CPU, dtype)]
            first = state_of(form, prior, dtype, saved_on)
            first.commit(stream[0].to(saved_on))
            saved = pytree.tree_map_only(torch.Tensor, lambda part: part.to(read_to), first.state_dict())
            second = state_of(form, prior, dtype, device)
            second.load_state_dict(saved)
            second.commit(stream[1].to(device))
            return [second.covariance(), second.update(stream[2].to(device)), second.health().status]

        same(walk, dtype)

    def test_a_device_without_a_number(self, form: str, dtype: torch.dtype) -> None:
        state = state_of(form, priors(CPU)["ridge"](), dtype, "cuda")
        assert state.device == GPU
        assert state.update(batches(GPU, dtype)[0][0]).device == GPU
        assert state.to("cuda").update(batches(GPU, dtype)[1][0]).device == GPU


def test_health_before_the_first_keys() -> None:
    def walk(device: torch.device) -> list[Any]:
        state = rk.CovarianceState(priors(CPU)["anchor"](), device=device)
        health = state.health(thorough=True)
        return [state.covariance(), state.precision(), health.status, health.smallest_eigenvalue]

    same(walk, torch.float32)


@pytest.mark.parametrize("form", ["auto", "square_root"])
def test_the_guard_repairs(form: str) -> None:
    """A state that is spoilt is rebuilt from its history; the prior lies on the CPU."""

    def walk(device: torch.device) -> list[Any]:
        stream = [K for K, _ in batches(device, torch.float32)]
        prior, history = priors(CPU)["anchor"](), [(K, 1.0) for K in stream[:2]]
        state = state_of(form, prior, torch.float32, device, history=lambda: history)
        for K in stream[:2]:
            state.commit(K)
        part = state._form.R if form == "square_root" else state._form.C
        part[:3, :3] *= 1.5
        state.update(stream[2])
        return [state.covariance(), state.health().repairs]

    same(walk, torch.float32)


def test_weak_priors_move_to_safer_forms() -> None:
    def walk(device: torch.device) -> list[Any]:
        found: list[Any] = []
        for lam in (0.1, 1e-2, 1e-4):
            state = rk.CovarianceState(rk.Prior.ridge(D, lam), device=device)
            for i, (K, _) in enumerate(batches(device, torch.float32)):
                found.append(state.update(K * 3.0**i))
            found += [state.form, state.health().storage]
        return found

    same(walk, torch.float32)


def test_a_stream_from_nothing() -> None:
    def walk(device: torch.device) -> list[Any]:
        W = given(random(5).standard_normal((D, V)), device, torch.float64)
        filtered = rk.RLSFilter(W, rk.Prior.ridge(D, 0.0), "square_root", layout="in_out")
        many = [*batches(device, torch.float64), *((K.roll(3, 1), Y) for K, Y in batches(device, torch.float64))]
        steps = [filtered.update(K, Y) for K, Y in many]
        return [filtered.weight, steps[-1].objective, filtered.health().status]

    same(walk, torch.float64)


@pytest.mark.parametrize("layout", ["in_out", "out_in"])
@pytest.mark.parametrize("weight_dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("options", FILTERS, ids=["no bounds", "covariance", "carried", "gain"])
def test_filter(layout: str, weight_dtype: torch.dtype, options: dict[str, Any]) -> None:
    """The usual case: the weight on the GPU, the prior from a file on the CPU."""
    working = torch.float64 if weight_dtype == torch.float64 else torch.float32

    def walk(device: torch.device) -> list[Any]:
        W = given(random(5).standard_normal((D, V)), device, weight_dtype)
        W = W if layout == "in_out" else W.mT.contiguous()
        filtered = rk.RLSFilter(W, priors(CPU)["anchor"](), layout=layout, **options)
        found: list[Any] = []
        many = batches(device, working)
        for K, Y in many:
            found += vars(filtered.update(K, Y, noise=0.5, forget=0.95)).values()
        found += vars(filtered.remove(*many[-1], noise=0.5)).values()
        if options != {"track_bounds": False}:
            filtered.refactor([(K, Y, 1.0) for K, Y in many[:3]])
            left = [(K, Y, 1.0) for K, Y in many[1:3]]
            found += vars(filtered.remove(*many[0], remaining=left)).values()
        health = filtered.health(thorough=True)
        return [*found, filtered.weight, filtered.objective, health.status]

    same(walk, working)


def test_filter_writes_the_model_s_own_weight() -> None:
    weight = given(random(5).standard_normal((V, D)), GPU, torch.float32)
    before = weight.clone()
    filtered = rk.RLSFilter(weight, priors(CPU)["anchor"](), layout="out_in", inplace=True)
    filtered.update(*batches(GPU, torch.float32)[0])
    assert filtered.weight.data_ptr() == weight.data_ptr()
    assert not torch.equal(weight, before)


def test_keys_of_the_other_device_are_refused() -> None:
    state = rk.CovarianceState(priors(CPU)["ridge"](), device="cuda")
    with pytest.raises(ValueError, match="K must be on the device of the state, cuda:0, got cpu"):
        state.update(batches(CPU, torch.float32)[0][0])
    filtered = rk.RLSFilter(given(np.zeros((D, V)), GPU), priors(CPU)["ridge"](), layout="in_out")
    K, Y = batches(GPU, torch.float64)[0]
    with pytest.raises(ValueError, match="V must be on the device of the state, cuda:0, got cpu"):
        filtered.update(K, Y.cpu())


def waits(update: Callable[[int], Any]) -> int:
    """How often the host waits for the GPU in the sixth batch, before which the guard does not look."""
    for i in range(5):
        update(i)
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as found:
            warnings.simplefilter("always")
            update(5)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return sum("called a synchronizing CUDA operation" in str(warning.message) for warning in found)


@pytest.mark.parametrize("u", [5, 130])
@pytest.mark.parametrize(
    ("form", "allowed"), [("auto", 2), ("plain", 2), ("whitened", 2), ("inverse_root", 2), ("square_root", 2)]
)
def test_a_batch_waits_for_the_gpu_a_few_times(form: str, allowed: int, u: int) -> None:
    """Whatever its size: nothing is read block by block. More than that is a slower step, and should have a reason."""
    d, rng = 200, random(7)
    state = state_of(form, rk.Prior.precision(4.0 * np.eye(d)), torch.float32, GPU)
    stream = [given(builders.keys(u, d, rng), GPU, torch.float32) for _ in range(6)]
    assert waits(lambda i: state.update(stream[i])) <= allowed


@pytest.mark.parametrize("u", [5, 130])
@pytest.mark.parametrize("options", FILTERS[1:], ids=["covariance", "carried", "gain"])
def test_a_batch_of_a_filter_waits_for_the_gpu_a_few_times(options: dict[str, Any], u: int) -> None:
    d, v, rng = 200, 150, random(7)
    W, prior = given(np.zeros((d, v)), GPU, torch.float32), rk.Prior.precision(4.0 * np.eye(d))
    filtered = rk.RLSFilter(W, prior, layout="in_out", **options)
    stream = [
        (given(builders.keys(u, d, rng), GPU, torch.float32), given(rng.standard_normal((u, v)), GPU, torch.float32))
        for _ in range(6)
    ]
    assert waits(lambda i: filtered.update(*stream[i])) <= 3


class TestDropIn:
    """As the public code is run: statistics and caches on the host, keys on the GPU."""

    @pytest.mark.parametrize("lies", ["cpu", "cuda"])
    def test_alphaedit(self, lies: str) -> None:
        def walk(device: torch.device) -> list[Any]:
            where = lies if device == GPU else "cpu"
            Q = given(builders.orthogonal(D, random(2)), CPU, torch.float32)[:, :-6]
            past = given(builders.keys(9, D, random(6)), CPU, torch.float32)
            stack, sums = (Q @ Q.mT)[None].to(where), (past.mT @ past)[None].to(where)
            P, cache = dropin.alphaedit(stack, 2.0, sums, verify=True, device="cuda" if device == GPU else None)
            found: list[Any] = [cache.tensor().to(device)]
            for K, R in batches(device, torch.float32):
                keys = K.mT
                eye = torch.eye(D, dtype=torch.float, device=device)
                left = P[0, :, :].to(device) @ (keys @ keys.mT + cache[0, :, :].to(device)) + 2.0 * eye
                found.append(torch.linalg.solve(left, P[0, :, :].to(device) @ keys @ R))
                cache[0, :, :] += (keys @ keys.mT).to(where)
            return [*found, cache.tensor().to(device), P.health()[0].status]

        same(walk, torch.float32)

    @pytest.mark.parametrize("lies", ["cpu", "cuda"])
    def test_memit(self, lies: str) -> None:
        def walk(device: torch.device) -> list[Any]:
            S = given(builders.spd(D, 100.0, random(0)), CPU, torch.float32)
            get_cov = dropin.memit(lambda *_: S.to(lies if device == GPU else "cpu"), verify=True)
            found: list[Any] = []
            for K, _ in batches(device, torch.float64):
                cov, keys = get_cov(None, None, "layer"), K.mT
                found.append(torch.linalg.solve(30.0 * cov.double() + keys @ keys.mT, keys))
            return found

        same(walk, torch.float64)

    @pytest.mark.parametrize("lies", ["cpu", "cuda"])
    def test_rls(self, lies: str) -> None:
        def walk(device: torch.device) -> list[Any]:
            S = given(builders.spd(D, 100.0, random(0)), CPU, torch.float32).to(lies if device == GPU else "cpu")
            invert = dropin.rls(torch.linalg.inv, verify=True)
            C = torch.stack([invert(S), invert(S)])
            found: list[Any] = []
            for K, R in batches(device, torch.float32):
                keys, old = K.mT, C[0].to(device)
                F = old @ keys
                system = torch.eye(U, device=device) + keys.mT @ F
                G = torch.linalg.solve_triangular(torch.linalg.cholesky(system, upper=True), F, upper=True, left=False)
                new = old - G @ G.T
                found.append((new @ keys) @ R)
                C[0] = new.to("cpu")
            return found

        same(walk, torch.float32)
