"""Copies of an RLSFilter, and what it saves: independent, and on to the same bits."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from itertools import islice

import pytest
import torch

import rlsedit_kernels as rk
from rlsedit_kernels.diagnostics import make_stream

D, U = 24, 4
KINDS = {
    "covariance": {},
    "no bounds": {"track_bounds": False},
    "plain": {"form": "plain"},
    "whitened": {"form": "whitened"},
    "inverse_root": {"form": "inverse_root"},
    "float64": {"dtype": torch.float64},
    "carried": {"state": "square_root"},
    "square_root, gain": {"state": "square_root", "solution": "gain"},
}


def through_torch(rls: rk.RLSFilter) -> rk.RLSFilter:
    file = io.BytesIO()
    torch.save(rls, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES: dict[str, Callable[[rk.RLSFilter], rk.RLSFilter]] = {
    "clone": lambda rls: rls.clone(),
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
    "pickle": lambda rls: pickle.loads(pickle.dumps(rls)),
    "torch.save": through_torch,
}
kinds = pytest.mark.parametrize("kind", KINDS)
layouts = pytest.mark.parametrize("layout", ["in_out", "out_in"])
histories = pytest.mark.parametrize("history", [False, True], ids=["no-history", "history"])
ways = pytest.mark.parametrize("way", COPIES)


def stream():
    return make_stream("easy", D, U)


def batches(count: int) -> list:
    return list(islice(stream().batches(), count))


def made(kind: str, layout: str, log: list | None = None, W: torch.Tensor | None = None) -> rk.RLSFilter:
    W = stream().W_0 if W is None else W
    given = W if layout == "in_out" else W.mT.contiguous()
    history = None if log is None or kind == "no bounds" else lambda: log
    return rk.RLSFilter(given, stream().prior, layout=layout, history=history, **KINDS[kind])


def followed(rls: rk.RLSFilter, more: list, log: list | None = None) -> tuple:
    steps = []
    for batch in more:
        steps.append(rls.update(batch.K, batch.V, batch.noise))
        if log is not None:
            log.append((batch.K, batch.V, batch.noise))
    steps.append(rls.remove(more[0].K, more[0].V, more[0].noise))
    if log is not None:
        del log[-len(more)]
    return rls.weight.clone(), rls.state.covariance(), steps, rls.health().as_dict()


def same(a: tuple, b: tuple) -> None:
    assert torch.equal(a[0], b[0])
    assert torch.equal(a[1], b[1])
    assert a[2:] == b[2:]


@ways
@kinds
@layouts
@histories
def test_a_copy_is_independent_and_goes_on_to_the_same_bits(way, kind, layout, history) -> None:
    log: list | None = [] if history else None
    rls, given = made(kind, layout, log), batches(9)
    followed(rls, given[:4], log)
    before = rls.weight.clone(), rls.state.covariance(), rls.objective
    twin = COPIES[way](rls)
    for other in (twin, COPIES[way](twin)):
        assert other.history is None
        first = followed(other, given[4:])
        assert torch.equal(rls.weight, before[0])
        assert torch.equal(rls.state.covariance(), before[1])
        assert rls.objective == before[2]
        assert not torch.equal(other.weight, before[0])
    same(followed(rls, given[4:]), first)


@ways
@kinds
def test_the_guard_of_a_copy_rebuilds_the_copy(way, kind) -> None:
    if kind == "no bounds":
        pytest.skip("keeps no history")
    log: list = []
    rls, given = made(kind, "out_in", log), batches(17)
    for batch in given[:16]:
        rls.update(batch.K, batch.V, batch.noise)
        log.append((batch.K, batch.V, batch.noise))
    twin, kept = COPIES[way](rls), list(log)
    twin.history = lambda: kept
    before = rls.weight.clone(), rls.state.covariance()
    for one in (twin, rls):
        form = one.state._form
        held = next(A for A in (getattr(form, n, None) for n in ("C", "matrix", "A", "R")) if A is not None)
        held *= 1.5
        one.update(given[16].K, given[16].V)
        assert one.health().repairs == 1
        if one is twin:
            assert torch.equal(rls.weight, before[0])
            assert torch.equal(rls.state.covariance(), before[1])
    assert torch.equal(twin.weight, rls.weight)
    assert torch.equal(twin.state.covariance(), rls.state.covariance())


@ways
def test_a_broken_copy_without_a_history_refuses(way) -> None:
    log: list = []
    rls = rk.RLSFilter(stream().W_0, stream().prior, layout="in_out", form="plain", history=lambda: log)
    given = batches(17)
    followed(rls, given[:8], log)
    twin = COPIES[way](rls)
    for batch in given[:7]:
        twin.update(batch.K, batch.V)
    assert twin.state.steps == 14
    twin.update(given[0].K, given[0].V)
    twin.update(given[0].K, given[0].V)
    twin.state._form.C *= 1.5
    with pytest.raises(rk.BreakdownError):
        twin.update(given[7].K, given[7].V)


def test_a_history_is_checked_when_it_is_set() -> None:
    rls = made("covariance", "in_out")
    with pytest.raises(TypeError, match="history must be callable"):
        rls.history = []
    bare = made("no bounds", "in_out")
    with pytest.raises(ValueError, match="history needs W_0"):
        bare.history = list
    bare.history = None


@pytest.mark.parametrize("make", [rk.CovarianceState, rk.SquareRootState])
def test_a_state_is_copied_without_its_history(make) -> None:
    state = make(stream().prior, history=list)
    state.update(batches(1)[0].K)
    for twin in (copy.deepcopy(state), pickle.loads(pickle.dumps(state)), state.clone()):
        assert twin.history is None
        assert torch.equal(twin.covariance(), state.covariance())
        twin.history = tuple
        assert twin.history is tuple
    assert state.history is list
    assert state.to(dtype=torch.float64).history is list  # the same stream elsewhere
    with pytest.raises(TypeError, match="history must be callable"):
        state.history = []


def test_a_clone_goes_its_own_way_when_its_original_is_rebuilt() -> None:
    """Rebuilt from the batches of its original it would forget its own in silence."""
    log: list = []
    state = rk.CovarianceState(stream().prior, form="plain", history=lambda: log)
    for batch in batches(7):
        state.update(batch.K)
        log.append((batch.K, 1.0))
    twin = state.clone()
    twin.update(batches(8)[7].K)
    twin._form.C *= 1.5
    with pytest.raises(rk.BreakdownError):
        twin.update(batches(9)[8].K)
    twin.history = lambda: [(batch.K, 1.0) for batch in batches(8)]
    twin.update(batches(9)[8].K)
    expected = rk.CovarianceState(stream().prior, form="plain", dtype=torch.float64)
    for batch in batches(9):
        expected.update(batch.K.double())
    assert twin.health().repairs == 1
    torch.testing.assert_close(twin.covariance().double(), expected.covariance(), rtol=1e-4, atol=1e-6)


def test_a_model_saved_with_its_filter_keeps_the_weight_that_is_written_in_place() -> None:
    layer = torch.nn.Linear(D, stream().W_0.shape[1], bias=False)
    rls = rk.RLSFilter(layer.weight, stream().prior, layout="out_in", inplace=True)
    file = io.BytesIO()
    torch.save((layer, rls), file)
    file.seek(0)
    twin_layer, twin = torch.load(file, weights_only=False)
    batch = batches(1)[0]
    twin.update(batch.K, batch.V)
    assert torch.equal(twin_layer.weight, twin.weight)
    assert not torch.equal(layer.weight, twin.weight)


@kinds
@layouts
def test_a_saved_filter_goes_on_to_the_same_bits(kind, layout) -> None:
    rls, given = made(kind, layout), batches(9)
    followed(rls, given[:4])
    file = io.BytesIO()
    torch.save(rls.state_dict(), file)
    file.seek(0)
    twin = made(kind, layout, W=torch.zeros_like(stream().W_0))
    weight = twin._weight
    twin.load_state_dict(torch.load(file, weights_only=True))
    assert twin.weight is weight
    same(followed(rls, given[4:]), followed(twin, given[4:]))
    if kind != "no bounds":
        kept = [(batch.K, batch.V, batch.noise) for batch in given[:3]]
        rls.refactor(kept)
        twin.refactor(kept)
        assert torch.equal(rls.weight, twin.weight)


def test_a_filter_from_nothing_is_saved_before_it_has_a_weight() -> None:
    def make() -> rk.RLSFilter:
        return rk.RLSFilter(stream().W_0, rk.Prior.ridge(D, 0.0), "square_root", layout="in_out")

    rls, given, twin = make(), batches(12), make()
    for batch in given[:3]:
        rls.update(batch.K, batch.V)
    twin.load_state_dict(rls.state_dict())
    for batch in given[3:]:
        assert rls.update(batch.K, batch.V).objective == twin.update(batch.K, batch.V).objective
    assert torch.equal(rls.weight, twin.weight)


def test_what_is_saved_is_a_copy() -> None:
    rls, given = made("carried", "in_out"), batches(3)
    rls.update(given[0].K, given[0].V)
    saved = rls.state_dict()
    first = copy.deepcopy(saved)
    rls.update(given[1].K, given[1].V)
    _ = rls.weight
    assert torch.equal(saved["weight"], first["weight"])
    assert torch.equal(saved["carried"]["B"], first["carried"]["B"])


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        ("covariance", lambda s: s.pop("weight"), "the saved filter lacks weight"),
        ("covariance", lambda s: s["rounding"].pop("sum"), "the saved filter lacks sum"),
        ("covariance", lambda s: s.update(version=2), "version must be 1, got 2"),
        ("covariance", lambda s: s.update(layout="out_in"), "layout must be 'in_out', got 'out_in'"),
        ("covariance", lambda s: s.update(track_bounds=False), "track_bounds must be True, got False"),
        ("covariance", lambda s: s.update(weight=torch.zeros(2, 2)), "weight must be"),
        ("covariance", lambda s: s.update(initial=None), "initial must be a tensor"),
        ("covariance", lambda s: s["weight"].fill_(float("nan")), "weight must be finite"),
        ("covariance", lambda s: s["state"].update(dtype="torch.float64"), "the saved state is torch.float64"),
        ("carried", lambda s: s.update(carried=None), "solution must be 'carried', got 'gain'"),
        ("carried", lambda s: s["carried"].update(B=torch.zeros(2, 2)), "B must be"),
        ("carried", lambda s: s["carried"].update(B=s["carried"]["B"][:-1]), "B must have as many rows as R"),
    ],
)
def test_what_does_not_fit_changes_nothing(kind, change, message) -> None:
    rls, given = made(kind, "in_out"), batches(5)
    followed(rls, given)
    saved = rls.state_dict()
    change(saved)
    other = made(kind, "in_out")
    other.update(given[0].K, given[0].V)
    before = other.weight.clone(), other.state.covariance(), other.objective
    with pytest.raises(ValueError, match=message):
        other.load_state_dict(saved)
    assert torch.equal(other.weight, before[0])
    assert torch.equal(other.state.covariance(), before[1])
    assert other.objective == before[2]
    other.update(given[1].K, given[1].V)


def test_a_state_changed_from_outside_is_not_saved() -> None:
    rls = made("carried", "in_out")
    rls.state.commit(batches(1)[0].K)
    with pytest.raises(ValueError, match="changed outside of the filter"):
        rls.state_dict()
