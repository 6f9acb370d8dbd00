"""RLSFilter: layouts, master weights, guarantees after an error."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from support import builders
from support.tolerances import relative_error

import rlsedit_kernels as rk

D, V = 20, 7


def prior() -> rk.Prior:
    return rk.Prior.anchor(builders.spd(D, 50.0, np.random.default_rng(0)), mu=1.0, lam=0.5)


def pair(seed: int = 0, u: int = 4, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    rng = np.random.default_rng(seed)
    return builders.tensor(rng.standard_normal((u, D)), dtype), builders.tensor(rng.standard_normal((u, V)), dtype)


def weight(dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return builders.tensor(np.random.default_rng(9).standard_normal((D, V)), dtype)


def test_both_layouts_are_the_same_filter() -> None:
    W = weight()
    rows, columns = rk.RLSFilter(W, prior(), layout="in_out"), rk.RLSFilter(W.mT, prior(), layout="out_in")
    for seed in range(4):
        a, b = rows.update(*pair(seed)), columns.update(*pair(seed))
        assert a.objective == pytest.approx(b.objective, rel=1e-5)
    rows.remove(*pair(1))
    columns.remove(*pair(1))
    assert columns.weight.shape == (V, D)
    assert relative_error(columns.weight.mT, rows.weight) < 1e-6


def test_a_square_weight_is_never_guessed() -> None:
    W = builders.tensor(np.random.default_rng(1).standard_normal((D, D)), torch.float64)
    K, _ = pair(dtype=torch.float64)
    target = torch.zeros(4, D, dtype=torch.float64)
    rows, columns = rk.RLSFilter(W, prior(), layout="in_out"), rk.RLSFilter(W, prior(), layout="out_in")
    rows.update(K, target)
    columns.update(K, target)
    assert relative_error(rows.weight, rk.reference.batch_solution(prior(), [(K, target)], W)) < 1e-10
    assert relative_error(columns.weight.mT, rk.reference.batch_solution(prior(), [(K, target)], W.mT)) < 1e-10
    with pytest.raises(TypeError, match="layout"):
        rk.RLSFilter(W, prior())


def test_the_given_weight_is_not_touched_unless_asked() -> None:
    W = weight()
    before = W.clone()
    rls = rk.RLSFilter(W, prior(), layout="in_out")
    rls.update(*pair())
    assert torch.equal(W, before)
    inside = rk.RLSFilter(W, prior(), layout="in_out", inplace=True)
    inside.update(*pair())
    assert torch.equal(W, inside.weight)
    assert W.data_ptr() == inside.weight.data_ptr()
    assert torch.equal(W, rls.weight)


def test_in_place_on_a_parameter_view() -> None:
    """A slice of a larger weight, as a fused projection has."""
    buffer = torch.zeros(2 * V, D + 3)
    view = buffer[V:, 3:]
    view.copy_(weight().mT)
    outside = buffer[:V].clone(), buffer[:, :3].clone()
    rls = rk.RLSFilter(view, prior(), layout="out_in", inplace=True)
    rls.update(*pair())
    expected = rk.RLSFilter(weight(), prior(), layout="in_out")
    expected.update(*pair())
    assert relative_error(view.mT, expected.weight) < 1e-6
    assert torch.equal(buffer[:V], outside[0])
    assert torch.equal(buffer[:, :3], outside[1])


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
def test_a_half_precision_weight_gets_a_float32_master(half) -> None:
    """Tiny edits must add up: rounded to the model's dtype each time, they would vanish."""
    W = torch.ones(D, V, dtype=half)
    rls = rk.RLSFilter(W, rk.Prior.ridge(D, 100.0), layout="in_out")
    K = torch.ones(1, D)
    for _ in range(200):
        rls.update(K, K @ rls.weight + 1.0)
    assert rls.weight.dtype == torch.float32
    assert float((rls.weight - 1.0).mean()) > 1e-2
    first = rk.RLSFilter(W, rk.Prior.ridge(D, 100.0), layout="in_out")
    first.update(K, K @ first.weight + 1.0)
    assert torch.equal(first.weight.to(half), W)


def test_bounds_can_be_left_out() -> None:
    rls = rk.RLSFilter(weight(), prior(), layout="in_out", track_bounds=False)
    step = rls.update(*pair())
    assert step.parameter_bound is None
    assert step.anchor_bound is None


def test_bounds_are_none_where_the_prior_has_no_such_anchor() -> None:
    ridge = rk.RLSFilter(weight(), rk.Prior.ridge(D, 2.0), layout="in_out").update(*pair())
    assert ridge.parameter_bound is not None
    assert ridge.anchor_bound is None
    moment = rk.Prior.anchor(builders.spd(D, 50.0, np.random.default_rng(0)))
    anchor = rk.RLSFilter(weight(), moment, layout="in_out").update(*pair())
    assert anchor.parameter_bound is None
    assert anchor.anchor_bound is not None


def test_a_hard_write_has_no_finite_bound() -> None:
    step = rk.RLSFilter(weight(), prior(), layout="in_out").update(*pair(), noise=0.0)
    assert math.isinf(step.parameter_bound)


@pytest.mark.parametrize("method", ["update", "remove"])
@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda K, E: (K, E[:, :-1]), ValueError, r"V must have shape \(u, v\) with u = K.shape\[0\] = 4 and v = 7"),
        (lambda K, E: (K, E[:-1]), ValueError, r"V must have shape"),
        (lambda K, E: (K[:, :-1], E), ValueError, r"K must have shape"),
        (lambda K, E: (K, E * float("nan")), ValueError, r"V must be finite"),
        (lambda K, E: (K * float("inf"), E), ValueError, r"K must be finite"),
        (lambda K, E: (K, E.to(torch.int32)), TypeError, r"V must be floating point"),
        (lambda K, E: (K, None), TypeError, r"V must be a torch.Tensor, got NoneType"),
        (lambda K, E: (K, E.to("meta")), ValueError, r"V must be on the device of the state"),
    ],
)
def test_bad_batches_change_nothing(method, change, error, message) -> None:
    rls = rk.RLSFilter(weight(), prior(), layout="in_out")
    rls.update(*pair())
    before = rls.weight.clone(), rls.state.covariance(), rls.objective
    with pytest.raises(error, match=message):
        getattr(rls, method)(*change(*pair()))
    assert torch.equal(rls.weight, before[0])
    assert torch.equal(rls.state.covariance(), before[1])
    assert rls.objective == before[2]


def test_a_change_that_would_overflow_is_refused() -> None:
    rls = rk.RLSFilter(weight(), rk.Prior.ridge(D, 1e-3), layout="in_out")
    K, E = pair()
    before = rls.weight.clone(), rls.state.covariance()
    with pytest.raises(ValueError, match="cannot hold"):
        rls.update(K * 1e-2, torch.full_like(E, 3e37))
    assert torch.equal(rls.weight, before[0])
    assert torch.equal(rls.state.covariance(), before[1])


def test_a_parameter_that_is_changed_through_its_data_is_noticed() -> None:
    """No version counter tells of it."""
    layer = torch.nn.Linear(D, 5, bias=False)
    rls = rk.RLSFilter(layer.weight, rk.Prior.ridge(D, 1.0), layout="out_in", inplace=True)
    rls.update(torch.ones(1, D), torch.ones(1, 5))
    layer.weight.data.fill_(3e38)
    with pytest.raises(ValueError, match="cannot hold"):
        rls.update(3.0 * torch.ones(1, D), torch.zeros(1, 5))
    assert bool(torch.isfinite(layer.weight).all())


@pytest.mark.parametrize("arguments", [{}, {"state": "square_root"}, {"state": "square_root", "solution": "gain"}])
@pytest.mark.parametrize("seed", range(4))
def test_a_weight_that_is_back_at_its_start_has_no_error_to_speak_of(arguments, seed) -> None:
    """What rounding leaves of |W - W_0| is no size that an error could be compared with."""
    rls = rk.RLSFilter(weight(), prior(), layout="in_out", **arguments)
    K, V = pair(seed, u=1)
    rls.update(K, V, 6.0)
    rls.remove(K, V, 6.0)
    assert rls.health().status == "ok"
    assert rls.health().weight_error is None
    rls.update(K, V, 6.0)
    assert 0.0 < rls.health().weight_error < 1e-3


@pytest.mark.parametrize("changed", ["by others", "by writing"])
def test_the_size_of_the_weight_is_not_taken_on_trust(changed) -> None:
    """It is a bound that grows with the batches, and is measured again where somebody else has changed the weight."""
    given = weight().to(torch.float32)
    rls = rk.RLSFilter(given, rk.Prior.ridge(D, 1.0), layout="in_out", inplace=True)
    K, E = pair()
    rls.update(K, E)
    if changed == "by others":
        given.mul_(1e30)
    else:
        rls.update(K, 1e30 * torch.ones_like(E))
    before = given.clone(), rls.state.covariance()
    with pytest.raises(ValueError, match="cannot hold"):
        rls.update(K * 1e-9, E * 1e38, noise=1e-20) if changed == "by writing" else rls.update(K * 1e9, E)
    assert torch.equal(given, before[0])
    assert torch.equal(rls.state.covariance(), before[1])


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"layout": "rows"}, ValueError, r"layout must be 'in_out' or 'out_in', got 'rows'"),
        (
            {"layout": "out_in"},
            ValueError,
            r"weight must have shape \(v, d\) for layout 'out_in' with d = prior.d = 20",
        ),
        ({"state": "qr"}, ValueError, r"state must be one of 'covariance', 'square_root', got 'qr'"),
        ({"solution": "carried"}, ValueError, r"solution must be 'gain' for state 'covariance', got 'carried'"),
        ({"state": "square_root", "solution": "qr"}, ValueError, r"solution must be 'carried' or 'gain' for state"),
        ({"state": "square_root", "form": "plain"}, ValueError, r"form is that of a covariance"),
        ({"prior": rk.Prior.ridge(D, 0.0)}, ValueError, r"lam is 0, so S_0 is zero"),
        ({"prior": None}, TypeError, r"prior must be a Prior, got NoneType"),
        ({"weight": torch.full((D, V), float("nan"))}, ValueError, r"weight must be finite"),
        ({"weight": torch.ones(D, V, dtype=torch.int8)}, TypeError, r"dequantise"),
        ({"weight": torch.ones(D, V).bfloat16(), "inplace": True}, TypeError, r"inplace needs a weight of the dtype"),
        ({"weight": [1.0]}, TypeError, r"weight must be a torch.Tensor, got list"),
    ],
)
def test_wrong_construction(arguments, error, message) -> None:
    given = {"weight": weight(), "prior": prior(), "layout": "in_out", **arguments}
    with pytest.raises(error, match=message):
        rk.RLSFilter(**given)


each_solution = pytest.mark.parametrize("solution", ["carried", "gain"])


def square_root(W: torch.Tensor, solution: str, layout: str = "in_out", **kwargs: object) -> rk.RLSFilter:
    given = kwargs.pop("prior", prior())
    return rk.RLSFilter(W, given, "square_root", layout=layout, solution=solution, **kwargs)


class TestSquareRoot:
    @each_solution
    def test_is_the_filter_of_the_covariance(self, solution, dtype) -> None:
        W = weight(dtype)
        rls, other = square_root(W.mT, solution, "out_in"), rk.RLSFilter(W, prior(), layout="in_out")
        limit = 1e4 * torch.finfo(dtype).eps
        for seed in range(5):
            a, b = rls.update(*pair(seed, dtype=dtype), 0.5, 0.9), other.update(*pair(seed, dtype=dtype), 0.5, 0.9)
            for name in ("innovation_norm", "residual_norm", "objective", "parameter_bound", "anchor_bound"):
                assert getattr(a, name) == pytest.approx(getattr(b, name), rel=limit), name
        assert relative_error(rls.weight.mT, other.weight) < limit

    @each_solution
    def test_removal_and_refactor(self, solution, dtype) -> None:
        W, limit = weight(dtype), 1e4 * torch.finfo(dtype).eps
        rls, without = square_root(W, solution), square_root(W, solution)
        batches = [(*pair(seed, dtype=dtype), 0.5) for seed in range(5)]
        kept = batches[:3] + batches[4:]
        for batch in batches:
            last = rls.update(*batch)
        for batch in kept:
            expected = without.update(*batch)
        removed = rls.remove(*batches[3])
        assert removed.objective == pytest.approx(expected.objective, rel=limit)
        assert removed.parameter_bound == pytest.approx(expected.parameter_bound, rel=limit)
        assert removed.innovation_norm > removed.residual_norm
        assert relative_error(rls.weight, without.weight) < limit
        again = rls.update(*batches[3])
        assert again.objective == pytest.approx(last.objective, rel=limit)
        rls.refactor(kept)
        assert rls.objective == pytest.approx(expected.objective, rel=limit)
        assert relative_error(rls.weight, without.weight) < limit
        assert rls.update(*batches[3]).parameter_bound == pytest.approx(last.parameter_bound, rel=limit)

    @pytest.mark.parametrize(("state", "form"), [("covariance", "inverse_root"), ("square_root", "auto")])
    def test_a_batch_that_cannot_be_removed_is_left_out_where_the_rest_is_known(self, state, form) -> None:
        weak = rk.Prior.ridge(D, 1e-3)
        rls = rk.RLSFilter(weight(), weak, state, layout="in_out", form=form)
        kept, goes = (*pair(1, u=30), 1.0), (torch.ones(1, D) * 1e5, torch.ones(1, V), 1e-6)
        rls.update(*kept)
        rls.update(*goes)
        before = rls.weight.clone(), rls.objective
        with pytest.raises(rk.LeverageError):
            rls.remove(*goes)
        assert torch.equal(rls.weight, before[0])
        assert rls.objective == before[1]
        step = rls.remove(*goes, remaining=[kept])
        expected = rk.RLSFilter(weight().double(), weak, layout="in_out", form="plain")
        alone = expected.update(*kept)
        assert relative_error(rls.weight, expected.weight) < 1e-5
        assert step.objective == pytest.approx(alone.objective, rel=1e-5)

    @pytest.mark.parametrize("state", ["covariance", "square_root"])
    def test_a_filter_is_not_rebuilt_from_a_hard_write(self, state) -> None:
        rls = rk.RLSFilter(torch.zeros(D, 3), rk.Prior.ridge(D, 1.0), state, layout="in_out")
        K, Y = torch.randn(2, D), torch.ones(2, 3)
        step = rls.update(K, Y)
        before = rls.weight.clone()
        with pytest.raises(ValueError, match="refactor: noise must be > 0 for every batch"):
            rls.refactor([(K, Y, 1.0), (K, Y, 0.0)])
        assert torch.equal(rls.weight, before)
        assert (rls.objective, rls.state.steps) == (step.objective, 1)

    def test_refactor_needs_the_initial_weight(self) -> None:
        rls = rk.RLSFilter(weight(), prior(), layout="in_out", track_bounds=False)
        with pytest.raises(ValueError, match="W_0 is not kept"):
            rls.refactor([(*pair(), 1.0)])

    def test_from_nothing(self) -> None:
        rls = square_root(weight(), "carried", prior=rk.Prior.ridge(D, 0.0))
        rng = np.random.default_rng(4)
        K, E = (torch.from_numpy(rng.standard_normal((D + 10, n))).float() for n in (D, V))
        first = rls.update(K[:8], E[:8])
        assert math.isnan(first.innovation_norm)
        assert first.objective == pytest.approx(0.0, abs=1e-4)
        with pytest.raises(rk.UnderdeterminedError, match="knows 8 of 20 directions"):
            _ = rls.weight
        rls.update(K[8:], E[8:])
        exact = np.linalg.lstsq(K.double().numpy(), E.double().numpy(), rcond=None)[0]
        residual = float(np.sum((E.double().numpy() - K.double().numpy() @ exact) ** 2))
        assert relative_error(rls.weight, exact) < 1e-5
        assert rls.objective == pytest.approx(residual, rel=1e-4)
        more = pair(5)
        step = rls.update(*more)
        innovation = more[1].double().numpy() - more[0].double().numpy() @ exact
        assert step.innovation_norm == pytest.approx(np.linalg.norm(innovation), rel=1e-4)
        assert step.parameter_bound is None

    @each_solution
    def test_in_place_and_half_precision(self, solution) -> None:
        W = weight()
        rls = square_root(W, solution, inplace=True)
        rls.update(*pair())
        expected = rk.RLSFilter(weight(), prior(), layout="in_out")
        expected.update(*pair())
        assert rls.weight.data_ptr() == W.data_ptr()
        assert relative_error(W, expected.weight) < 1e-5
        assert square_root(weight().bfloat16(), solution).weight.dtype == torch.float32

    def test_the_weight_is_solved_for_once(self, monkeypatch) -> None:
        rls, calls = square_root(weight(), "carried"), []
        solve = rls.state.solve
        monkeypatch.setattr(rls.state, "solve", lambda B: calls.append(1) or solve(B))
        for seed in range(3):
            rls.update(*pair(seed))
        assert not calls
        first = rls.weight.clone()
        assert torch.equal(rls.weight, first)
        assert len(calls) == 1

    def test_a_state_changed_from_outside_is_noticed(self) -> None:
        rls = square_root(weight(), "carried")
        rls.update(*pair())
        rls.state.commit(pair(3)[0])
        for use in (lambda: rls.update(*pair(1)), lambda: rls.remove(*pair()), lambda: rls.weight):
            with pytest.raises(ValueError, match="changed outside of the filter"):
                use()

    @each_solution
    def test_bad_batches_change_nothing(self, solution) -> None:
        rls = square_root(weight(), solution)
        rls.update(*pair())
        before = rls.weight.clone(), rls.state.factor, rls.objective
        K, E = pair(1)
        for call, error in [
            (lambda: rls.update(K, E, 0.0), ValueError),
            (lambda: rls.update(torch.cat([K, K]), torch.cat([E, E]), 0.0), ValueError),
            (lambda: rls.update(K, E, -1.0), ValueError),
            (lambda: rls.update(K, E, math.nan), ValueError),
            (lambda: rls.update(K, E, "1"), TypeError),
            (lambda: rls.update(K, E, 1.0, 0.0), ValueError),
            (lambda: rls.remove(K, E, 0.0), ValueError),
            (lambda: rls.remove(K, E, -1.0), ValueError),
            (lambda: rls.update(K, E * math.inf), ValueError),
            (lambda: rls.update(K, E[:, :2]), ValueError),
            (lambda: rls.update(K * 1e37, E), ValueError),
            (lambda: rls.update(K, torch.full_like(E, 2e38)), ValueError),
            (lambda: rls.remove(K * 1e3, E), rk.LeverageError),
        ]:
            with pytest.raises(error):
                call()
        assert torch.equal(rls.weight, before[0])
        assert torch.equal(rls.state.factor, before[1])
        assert rls.objective == before[2]


@pytest.mark.parametrize("lam", [1e-3, 1e-2])
def test_a_removal_that_would_multiply_the_rounding_of_the_weight_is_refused(lam: float) -> None:
    """An automatic state keeps float64 and could be downdated; the float32 weight was off by 3 % to 500 % then."""
    rls = rk.RLSFilter(weight(), rk.Prior.ridge(D, lam), layout="in_out")
    written = [(*pair(seed), 1.0) for seed in range(3)]
    for K, E, noise in written:
        rls.update(K, E, noise)
    assert rls.state._form.dtype == torch.float64  # type: ignore[union-attr]
    before = rls.weight.clone()
    with pytest.raises(rk.LeverageError, match=r"1\.2e-03"):
        rls.remove(*pair(2))
    assert torch.equal(rls.weight, before)
    rls.remove(*pair(2), remaining=written[:2])
    wide = [(K.double(), E.double(), noise) for K, E, noise in written[:2]]
    expected = rk.reference.batch_solution(rk.Prior.ridge(D, lam), wide, weight().double())
    assert relative_error(rls.weight, expected) < 1e-5


@pytest.mark.parametrize("form", ["plain", "whitened", "inverse_root"])
@pytest.mark.parametrize("seed", range(3))
def test_the_residual_of_a_high_leverage_is_no_difference(form: str, seed: int) -> None:
    """It is 1/280 of the innovation; as a difference it was off by up to 1e-5 in float32."""
    rng = np.random.default_rng(seed)
    K = builders.tensor(250.0**0.5 * builders.orthogonal(D, rng)[:6], torch.float32)
    E = builders.tensor(rng.standard_normal((6, V)), torch.float32)
    rls = rk.RLSFilter(weight(), rk.Prior.ridge(D, 1.0), layout="in_out", form=form)
    step = rls.update(K, E, 1.0, 0.9)
    wide, error = K.double(), E.double() - K.double() @ weight().double()
    residual = torch.linalg.solve(0.9 * torch.eye(6) + wide @ wide.mT, 0.9 * error)
    assert step.residual_norm == pytest.approx(float(residual.norm()), rel=5e-7)
    assert rls.health().careful_steps == 0


@pytest.mark.parametrize("form", ["plain", "whitened", "inverse_root"])
@pytest.mark.parametrize("apart", [0.0, 1e-4, 1e-3])
def test_what_a_hard_write_could_not_tell_apart_is_in_its_residual(form, apart) -> None:
    """Two keys that float32 takes for one, with other targets: the mean is written, and the step says what is not."""
    generator = torch.Generator().manual_seed(0)
    K = torch.randn(1, D, generator=generator) + torch.tensor([[0.0], [apart]]) * torch.randn(2, D, generator=generator)
    V = torch.eye(2)
    rls = rk.RLSFilter(torch.zeros(D, 2), rk.Prior.ridge(D, 1.0), layout="in_out", form=form)
    step = rls.update(K, V, 0.0)
    assert step.residual_norm == pytest.approx(float((V - K @ rls.weight).norm()), rel=1e-3)
    assert step.residual_norm == pytest.approx(1.0, rel=0.05)
    together = torch.randn(2, D, generator=generator)
    rls.update(together, torch.ones(2, 2), 0.0)
    assert float((together @ rls.weight - 1.0).norm()) < 1e-4
