"""Every contender of the catalogue is right, and an error in one would show."""

from __future__ import annotations

import pytest
import torch

from rlsedit_kernels import profile
from rlsedit_kernels.profile import Contender, Problem, Settings


def test_every_contender_reaches_the_float64_weight(whole) -> None:
    assert {row.status for row in whole.rows} == {"measured"}
    special = {"RLSFilter plain, float64": 1e-12, "dense Cholesky": 1e-4, "dense Cholesky, float64": 1e-6}
    for row in whole.rows:
        assert row.error is not None, row.name
        assert row.error < special.get(row.name, 1e-5), row.name


def test_a_float32_system_loses_digits_that_the_recursion_keeps(whole) -> None:
    """Rounding S costs (unit roundoff) times its condition, 1e4; C as it is kept loses none of that."""
    error = {row.name: row.error for row in whole.rows}
    assert error["dense Cholesky"] > 5 * error["rlsedit, ops"]
    assert error["dense Cholesky, float64"] < 2 * error["rlsedit, ops"]


SHOWN = ["plain torch Woodbury", "AlphaEdit, released", "rlsedit, ops", "dense Cholesky", "AlphaEdit, Cholesky"]


@pytest.mark.parametrize("name", SHOWN)
def test_an_error_would_show(problem, found, name) -> None:
    """A contender that writes a tenth too much is off by about a tenth."""
    (one,) = profile.named([name], [c for c in profile.catalogue("cpu") if c.name == name])

    class Wrong:
        def __init__(self, p: Problem) -> None:
            self.step, self.first = one.make(p), p.weight.clone()

        @property
        def weight(self) -> torch.Tensor:
            return self.first + 1.1 * (self.step.weight - self.first)

        def __call__(self, K: torch.Tensor, V: torch.Tensor) -> None:
            self.step(K, V)

    wrong = Contender("wrong", Wrong, truth=one.truth)
    (row,) = profile.measure([wrong], problem, Settings(repetitions=3, cold=False), found=found).rows
    assert row.error == pytest.approx(0.1, rel=1e-3)


@pytest.mark.parametrize(
    "name", ["AlphaEdit, released", "AlphaEdit, Cholesky", "dense Cholesky", "dense Cholesky, float64"]
)
def test_a_contender_that_has_aged_knows_what_one_that_wrote_knows(problem, name) -> None:
    """The batches of a history are written without a solve: what later batches know of them is the same."""
    (one,) = [c for c in profile.catalogue("cpu") if c.name == name]
    wrote, aged, forgot = (one.make(problem) for _ in range(3))
    wrote(*problem.batch(0))
    wrote.weight = problem.weight.clone()
    aged.age(*problem.batch(0))
    for step in (wrote, aged, forgot):
        step(*problem.batch(1))
    change = (wrote.weight - problem.weight).norm()
    assert (aged.weight - wrote.weight).norm() < 1e-4 * change
    assert (forgot.weight - wrote.weight).norm() > 1e-2 * change


@pytest.mark.parametrize(
    ("name", "released"),
    [("AlphaEdit, Cholesky", "AlphaEdit, released"), ("dense Cholesky, float64", "MEMIT, float64")],
)
def test_the_best_of_a_dense_solve_has_fewer_flops_than_the_released_one(whole, name, released) -> None:
    flops = {row.name: row.flops for row in whole.rows}
    assert flops[name] < 0.7 * flops[released]
