"""The theorem, the proposition and the limits of the paper, along every stream."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

import rlsedit_kernels as rk
from rlsedit_kernels.diagnostics import STREAMS, checkpoints, make_stream
from rlsedit_kernels.diagnostics.theory import consistency, follow_bounds, limits, slope


@pytest.mark.parametrize("name", STREAMS)
def test_the_bounds_hold_along_every_stream(name) -> None:
    for bounds in follow_bounds(make_stream(name, 24, 4), 120, checkpoints(120)):
        assert bounds.hold, bounds


def test_the_bounds_hold_with_both_anchors() -> None:
    rng = np.random.default_rng(0)
    stream = make_stream("weak-1", 24, 4)
    for prior in (
        rk.Prior.anchor_keys(rng.standard_normal((9, 24)), mu=3.0, lam=0.5),
        rk.Prior.anchor(np.cov(rng.standard_normal((24, 60))), mu=2.0, lam=0.5),
    ):
        anchored = dataclasses.replace(stream, prior=prior)
        for bounds in follow_bounds(anchored, 60, checkpoints(60)):
            assert bounds.hold
            assert 0.0 < bounds.anchor <= bounds.anchor_bound


def test_the_bounds_are_tight() -> None:
    """A quarter less would be wrong: there are streams that come close."""
    parameter, gain, key = 0.0, 0.0, 0.0
    for name in ("condition-1", "massive-1e8", "tiny"):
        for bounds in follow_bounds(make_stream(name, 24, 4), 60, checkpoints(60)):
            parameter = max(parameter, bounds.parameter / bounds.parameter_bound)
            gain = max(gain, bounds.gain / bounds.gain_bound)
            key = max(key, bounds.gain / bounds.key_bound)
    assert parameter > 0.95
    assert gain > 0.95
    assert key > 0.95


def test_beyond_lambda_the_bound_of_a_key_fails() -> None:
    """s / (lambda^2 + s^2) is claimed for s <= lambda only: an anchor makes a large key a smaller effective one."""
    lam, mu, s = 1.0, 1.0, 2.0
    S_0 = lam**2 * np.eye(2) + mu**2 * np.array([[0.0, 0.0], [0.0, 4.0]])
    largest = 0.0
    for angle in np.linspace(0.0, np.pi, 181):
        K = s * np.array([[np.cos(angle), np.sin(angle)]])
        largest = max(largest, float(np.linalg.norm(np.linalg.inv(S_0 + K.T @ K) @ K.T, 2)))
    assert s / (lam**2 + s**2) < largest <= 1.0 / (2.0 * lam)


def test_where_the_weight_goes() -> None:
    found = consistency(16, 8, batches=1500, at=checkpoints(1500, 5))
    late = {name: [pair for pair in pairs if pair[0] >= 50] for name, pairs in found.items()}
    assert slope(late["lambda fixed"]) == pytest.approx(-0.5, abs=0.12)
    assert slope(late["lambda^2 = t"]) == pytest.approx(-0.5, abs=0.12)
    for name in ("lambda^2 = t^1.5", "mu^2 = t^1.5"):
        distances = [distance for _, distance in late[name]]
        assert distances == sorted(distances, reverse=True)
    assert slope(late["lambda^2 = t^1.5"]) < -0.25
    assert slope(late["mu^2 = t^1.5"]) < -0.35
    assert late["lambda fixed"][-1][1] < 0.1


def test_limits() -> None:
    found = limits([10.0**i for i in range(6)])
    for name, expected in (("lambda", -2.0), ("mu", -2.0), ("1 / noise", -1.0)):
        assert slope(found[name][2:]) == pytest.approx(expected, abs=0.02)
