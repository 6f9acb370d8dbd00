"""Streams: what they promise, the same for the same seed, and their truth."""

from __future__ import annotations

from dataclasses import replace
from itertools import islice

import numpy as np
import pytest
import torch

import rlsedit_kernels as rk
from rlsedit_kernels.diagnostics import STREAMS, Truth, in_digits, make_stream
from rlsedit_kernels.diagnostics.keys import Mixing, falling

D, U = 24, 4


def first(name: str, count: int, **sizes: int):
    return list(islice(make_stream(name, **({"d": D, "u": U} | sizes)).batches(), count))


@pytest.mark.parametrize("name", STREAMS)
def test_a_stream_can_be_gone_through_again(name) -> None:
    stream = make_stream(name, D, U, seed=3)
    one, two = (list(islice(stream.batches(), 5)) for _ in range(2))
    for a, b in zip(one, two, strict=True):
        assert torch.equal(a.K, b.K)
        assert torch.equal(a.V, b.V)
        assert (a.noise, a.forget) == (b.noise, b.forget)
        assert a.K.shape == (U, D)
        assert a.V.shape == (U, 4)
        assert a.K.dtype == a.V.dtype == torch.float32
        assert bool(torch.isfinite(a.K).all())
    assert not torch.equal(one[0].V, one[1].V)


@pytest.mark.parametrize("name", STREAMS)
def test_a_stream_can_be_gone_through_by_two_at_once(name) -> None:
    stream = make_stream(name, D, U, seed=3)
    behind = stream.batches()
    for wanted, ahead in zip(first(name, 4, seed=3), stream.batches(), strict=False):
        assert torch.equal(ahead.K, wanted.K)
        late = next(behind)
        assert torch.equal(late.K, wanted.K)
        assert torch.equal(late.V, wanted.V)


def test_seeds_differ() -> None:
    assert not torch.equal(first("weak-1", 1)[0].K, first("weak-1", 1, seed=1)[0].K)


@pytest.mark.parametrize(
    ("name", "condition"), [("condition-1e8", 1e8), ("condition-300", 300.0), ("massive-1e8", 1e8)]
)
def test_the_prior_has_its_condition(name, condition) -> None:
    assert make_stream(name, 128, U).prior.factor.condition == pytest.approx(condition, rel=1e-4)


def test_keys_have_their_level() -> None:
    stream = make_stream("loud-1e8", D, U)
    C = stream.prior.factor.covariance()
    for batch in islice(stream.batches(), 3):
        K = batch.K.double()
        assert torch.einsum("ij,jk,ik->i", K, C, K).numpy() == pytest.approx(100.0, rel=1e-3)


def test_what_makes_them_hard() -> None:
    dependent = first("dependent", 1)[0].K.double()
    values = torch.linalg.svdvals(dependent)
    assert float(values[1] / values[0]) < 1e-3
    sizes = torch.cat([batch.K.norm(dim=1) for batch in first("mixed", 200)])
    assert float(sizes.max() / sizes.min()) > 1e7
    noise = [batch.noise for batch in first("growing-noise", 200)]
    assert noise == sorted(noise)
    assert noise[-1] == pytest.approx(1.005**199)
    repeated = first("repeated", 4)
    assert torch.equal(repeated[0].K, repeated[2].K)
    assert not torch.equal(repeated[0].V, repeated[2].V)
    wound = torch.cat([batch.K for batch in first("wind-up", 30)])
    assert int(torch.linalg.matrix_rank(wound.double(), rtol=1e-5)) == D // 2
    K = torch.cat([batch.K for batch in first("correlated", 20)]).double()
    assert float((K[1:] * K[:-1]).sum(dim=1).mean()) / 500.0 > 0.95


def test_conflicts_take_turns() -> None:
    seen: dict[bytes, set[bytes]] = {}
    for batch in first("conflict", 60):
        for k, v in zip(batch.K, batch.V, strict=True):
            seen.setdefault(k.numpy().tobytes(), set()).add(v.numpy().tobytes())
    assert max(map(len, seen.values())) == 2


def test_mixing_is_orthogonal() -> None:
    mixing = Mixing(D, torch.Generator().manual_seed(0))
    Q = mixing.rows(torch.eye(D, dtype=torch.float64))
    assert float((Q @ Q.mT - torch.eye(D)).abs().max()) < 1e-13
    assert float((mixing.rows_transposed(Q) - torch.eye(D)).abs().max()) < 1e-13
    values = falling(D, 3.0)
    assert torch.linalg.eigvalsh(mixing.matrix(values)).flip(0).numpy() == pytest.approx(values.numpy())


@pytest.mark.parametrize("name", ["nothing", "condition-0.5", "condition-", "condition-x"])
def test_unknown_names_are_refused(name) -> None:
    with pytest.raises(ValueError, match="make_stream: name must be"):
        make_stream(name, D, U)


def test_sizes_are_checked() -> None:
    with pytest.raises(ValueError, match="sizes must be"):
        make_stream("easy", 1, U)


class TestTruth:
    @pytest.mark.parametrize("name", ["weak-0.1", "condition-1e6", "falling-noise"])
    def test_is_the_batch_solution(self, name) -> None:
        stream = make_stream(name, D, U)
        truth, batches = Truth(stream), list(islice(stream.batches(), 30))
        for batch in batches:
            truth.add(batch)
        rows = [(b.K.double().numpy(), b.V.double().numpy(), b.noise) for b in batches]
        expected = rk.reference.batch_solution(stream.prior, rows, stream.W_0.double().numpy())
        exact = truth.now()
        assert np.allclose(exact.W.numpy(), expected, rtol=1e-7, atol=1e-9 * np.abs(expected).max())
        C = rk.reference.batch_covariance(stream.prior, rows)
        assert np.allclose(exact.C.numpy(), C, rtol=1e-6, atol=1e-9 * np.abs(C).max())
        K = rows[-1][0]
        assert np.allclose(exact.half(batches[-1].K).mT.numpy() @ exact.half(batches[-1].K).numpy(), K @ C @ K.T)

    def test_of_a_null_space(self) -> None:
        rng = np.random.default_rng(0)
        Q = np.linalg.qr(rng.standard_normal((D, 7)))[0]
        prior = rk.Prior.null_space(Q, 2.0)
        stream = make_stream("weak-1", D, U)
        stream = type(stream)("null", "", prior, stream.W_0, stream.batches)
        truth, batches = Truth(stream), list(islice(stream.batches(), 5))
        for batch in batches:
            truth.add(batch)
        rows = [(b.K.double().numpy(), b.V.double().numpy()) for b in batches]
        assert np.allclose(truth.now().W.numpy(), rk.reference.batch_solution(prior, rows, np.zeros((D, 4))), atol=1e-9)
        assert np.allclose(truth.now().C.numpy(), rk.reference.batch_covariance(prior, rows), atol=1e-9)

    def test_forgets(self) -> None:
        stream = make_stream("forgetting", D, U)
        truth, batches = Truth(stream), list(islice(stream.batches(), 40))
        for batch in batches:
            truth.add(batch)
        rows = [(b.K.double().numpy(), b.V.double().numpy()) for b in batches]
        expected = rk.reference.batch_solution(stream.prior, rows, np.zeros((D, 4)), forget=0.999)
        assert np.allclose(truth.now().W.numpy(), expected, rtol=1e-9, atol=1e-12)

    @pytest.mark.parametrize(
        ("name", "limit"), [("condition-1e12", 1e-6), ("condition-1e8", 1e-9), ("weak-0.001", 1e-11), ("mixed", 1e-12)]
    )
    def test_float64_is_close_to_fifty_digits(self, name, limit) -> None:
        """How wrong the float64 truth itself is, in the norm in which errors are told: far below any float32 error."""
        pytest.importorskip("mpmath")
        stream = make_stream(name, 10, 3, 2)
        truth = Truth(stream)
        for batch in islice(stream.batches(), 12):
            truth.add(batch)
        exact, digits = truth.now(), torch.from_numpy(in_digits(stream, 12))
        assert exact.norm(exact.W - digits) / exact.norm(digits) < limit

    @pytest.mark.parametrize(
        ("lam", "size", "noise"),
        [
            (1e-20, 1.0, 1.0), (1.0, 1e18, 1.0), (1.0, 1e-20, 1.0), (1e18, 1.0, 1.0), (1.0, 1.0, 1e-30),
            (1.0, 1.0, 1e30), (1e-18, 1e-18, 1.0),
        ],
    )  # fmt: skip
    @pytest.mark.parametrize("count", [2, 12])
    def test_sizes_far_from_one_leave_it_right(self, lam, size, noise, count) -> None:
        """S itself has a condition far beyond float64 here, as long as there are fewer keys than directions."""
        pytest.importorskip("mpmath")
        usual = make_stream("easy", 10, 3, 2)

        def batches():
            for batch in usual.batches():
                yield replace(batch, K=batch.K * size, noise=noise)

        stream = replace(usual, prior=rk.Prior.ridge(10, lam), batches=batches)
        truth = Truth(stream)
        for batch in islice(stream.batches(), count):
            truth.add(batch)
        exact, digits = truth.now(), torch.from_numpy(in_digits(stream, count, 120))
        assert exact.norm(exact.W - digits) < 1e-12 * exact.norm(digits)

    def test_looking_changes_nothing(self) -> None:
        stream = make_stream("forgetting", D, U)
        seen, unseen = Truth(stream), Truth(stream)
        for batch in islice(stream.batches(), 11):
            for truth in (seen, unseen):
                truth.add(batch)
            seen.now()
        assert torch.equal(seen.now().W, unseen.now().W)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"noise": 0.0}, "noise of a batch must be > 0"),
            ({"forget": 1.5}, "forget of a batch must be in"),
            ({"V": torch.zeros(1, 4)}, "must have shapes"),
        ],
    )
    def test_a_batch_without_a_finite_precision_is_refused(self, change, message) -> None:
        stream = make_stream("easy", D, U)
        with pytest.raises(ValueError, match=message):
            Truth(stream).add(replace(first("easy", 1)[0], **change))

    def test_a_solution_that_is_not_determined_is_named(self) -> None:
        stream = replace(make_stream("easy", D, U), prior=rk.Prior.ridge(D, 0.0))
        with pytest.raises(ValueError, match="not determined"):
            Truth(stream).now()

    def test_digits_do_not_depend_on_their_number(self) -> None:
        pytest.importorskip("mpmath")
        stream = make_stream("condition-1e10", 6, 2, 1)
        assert np.array_equal(in_digits(stream, 5), in_digits(stream, 5, digits=80))
        with pytest.raises(ValueError, match="digits must be"):
            in_digits(stream, 5, digits=10)
