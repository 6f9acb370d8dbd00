"""What holds for every method, and the figures of its objective; formulas are in methods/test_published.py."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support.method_streams import BATCHES, CONFIG, moment, stream
from torch import Tensor

import rlsedit_kernels as rk
from rlsedit.deviations import Deviations
from rlsedit.methods import DenseAlphaEdit, get_method, list_methods, null_basis
from rlsedit.methods.solver import RecursionSolver, appended


def randn(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


NAMES = [
    "rlsedit", "memit", "memit_seq", "encore", "alphaedit", "langedit", "evoedit", "emmet", "rome", "r_rome", "pmet",
    "prune", "rect", "lyaplock", "simie", "ultraedit", "ft",
]  # fmt: skip
SOLVED = [name for name in NAMES if name != "ft"]
OUTPUTS = stream("rlsedit")[0][1].shape[1]


def test_the_names_are_these() -> None:
    assert list_methods() == NAMES
    assert all(get_method(name).name == name for name in NAMES)


@pytest.mark.parametrize("columns", ["method | dense form of one batch", "method | efficacy"])
def test_every_method_is_in_the_tables_of_the_documentation(columns: str) -> None:
    """Its formula and its row of the comparison, both in the order of `list_methods`."""
    text = (Path(__file__).parents[2] / "docs" / "methods.md").read_text(encoding="utf-8")
    table = text.split(f"\n| {columns}", 1)[1].split("\n\n", 1)[0]
    assert re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE) == NAMES


def test_rlsedit_minimises_its_objective_and_the_figures_are_those_of_the_objective() -> None:
    """W after the stream is the least-squares solution; cost, deviations and bounds equal their definitions."""
    method, anchor, d = get_method("rlsedit"), CONFIG.mom2_weight * moment(), len(moment())
    solver = method.start(moment(), CONFIG, torch.float64)
    figures = Deviations(torch.zeros(d, OUTPUTS, dtype=torch.float64), anchor)
    weight = start = torch.randn(d, OUTPUTS, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    rows: list[tuple[Tensor, Tensor]] = []
    for keys, residual, _ in stream("rlsedit"):
        rows.append((keys, keys @ weight + residual))
        proposal, solver = solver.propose(keys, residual)
        figures = figures.after(keys, residual, proposal, CONFIG.noise)
        weight = weight + proposal.update
        shift = weight - start
        fit = sum(float((k @ weight - v).square().sum()) for k, v in rows) / CONFIG.noise
        held = float(torch.trace(shift.T @ anchor @ shift))
        assert figures.fit(method, CONFIG) == pytest.approx(fit, rel=1e-9)
        assert figures.parameter == pytest.approx(float(shift.square().sum()), rel=1e-9)
        assert figures.anchor == pytest.approx(held, rel=1e-9)
        parameter_bound, anchor_bound = figures.bounds(method, CONFIG)
        assert shift.norm() <= parameter_bound
        assert held**0.5 <= anchor_bound
        innovation = sum(float((v - k @ start).square().sum()) for k, v in rows) / CONFIG.noise
        assert anchor_bound == pytest.approx(innovation**0.5 / (2 * CONFIG.mu), rel=1e-9)
    all_keys, all_values = torch.cat([k for k, _ in rows]), torch.cat([v for _, v in rows])
    system = CONFIG.mu**2 * anchor + CONFIG.lam**2 * torch.eye(d) + all_keys.T @ all_keys / CONFIG.noise
    exact = start + torch.linalg.solve(system, all_keys.T @ (all_values - all_keys @ start) / CONFIG.noise)
    torch.testing.assert_close(weight, exact, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", ["memit_seq", "encore", "alphaedit", "alphaedit_dense", "simie"])
def test_the_fit_is_that_of_all_batches(name: str) -> None:
    """From the cost recursion, with or without a gain at hand; the bounds hold."""
    method = get_method(name)
    solver = method.start(moment(), CONFIG, torch.float64)
    figures = Deviations(torch.zeros(len(moment()), OUTPUTS, dtype=torch.float64), CONFIG.mom2_weight * moment())
    noise = method.noise(CONFIG, 5)
    rows = []
    for keys, residual, _ in stream(name):
        rows.append((keys, keys @ figures.shift + residual))
        proposal, solver = solver.propose(keys, residual)
        figures = figures.after(keys, residual, proposal, noise)
    fit = sum(float((k @ figures.shift - v).square().sum()) for k, v in rows) / noise
    assert figures.fit(method, CONFIG) == pytest.approx(fit, rel=1e-8)
    held = float(torch.trace(figures.shift.T @ figures.gram @ figures.shift))
    assert figures.anchor == pytest.approx(held, rel=1e-9)
    parameter_bound, anchor_bound = figures.bounds(method, CONFIG)
    assert parameter_bound is None or figures.shift.norm() <= parameter_bound
    assert anchor_bound is None or held**0.5 <= anchor_bound
    assert not parameter_bound is anchor_bound is None
    if name.startswith("alphaedit"):
        basis = null_basis(moment(), CONFIG.null_threshold)
        assert (figures.shift - basis @ (basis.T @ figures.shift)).norm() < 1e-9 * figures.shift.norm()


def test_a_change_without_keys_moves_the_deviations_alone() -> None:
    generator = torch.Generator().manual_seed(4)
    anchor = CONFIG.mom2_weight * moment()
    figures = Deviations(torch.zeros(len(anchor), 3, dtype=torch.float64), anchor)
    for _ in range(3):
        figures = figures.moved(torch.randn(len(anchor), 3, generator=generator, dtype=torch.float64))
    assert figures.parameter == pytest.approx(float(figures.shift.square().sum()), rel=1e-12)
    assert figures.anchor == pytest.approx(float(torch.trace(figures.shift.T @ anchor @ figures.shift)), rel=1e-12)
    assert figures.fit(get_method("ft"), CONFIG) != figures.fit(get_method("ft"), CONFIG)  # NaN


@pytest.mark.parametrize("name", SOLVED)
def test_a_proposal_changes_nothing(name: str) -> None:
    solver = get_method(name).start(moment(), CONFIG, torch.float32)
    batch = [part.float() for part in stream(name)[0]]
    first, _ = solver.propose(*batch)
    again, following = solver.propose(*batch)
    assert torch.equal(first.update, again.update)
    later, _ = following.propose(*batch)
    static = {"memit", "pmet", "prune", "rect", "emmet", "rome", "r_rome"}
    assert torch.equal(first.update, later.update) == (name in static)
    assert solver.health()["steps"] == 0


def test_rlsedit_without_ridge_is_sequential_memit() -> None:
    without = replace(CONFIG, lam=0.0)
    one, other = (get_method(name).start(moment(), without, torch.float64) for name in ("rlsedit", "memit_seq"))
    for keys, residual, _ in stream("rlsedit"):
        mine, one = one.propose(keys, residual)
        yours, other = other.propose(keys, residual)
        assert torch.equal(mine.update, yours.update)


def test_wrong_input_is_named() -> None:
    with pytest.raises(ValueError, match=r"method must be one of \['rlsedit', 'memit', .*\], got 'alphaedlt'"):
        get_method("alphaedlt")
    for name in ("alphaedit", "langedit", "evoedit"):
        start = get_method(name).start
        with pytest.raises(ValueError, match=r"null_threshold must exceed the smallest .* null space is empty"):
            start(moment(), replace(CONFIG, null_threshold=1e-3), torch.float32)
        with pytest.raises(ValueError, match=r"null_threshold must lie below the largest eigenvalue"):
            start(moment(), replace(CONFIG, null_threshold=100.0), torch.float32)
    with pytest.raises(ValueError, match=r"mu must be positive .* the prior would be zero"):
        get_method("rlsedit").start(moment(), replace(CONFIG, mu=0.0, lam=0.0), torch.float32)
    broken = moment()
    broken[2, 3] = torch.inf
    for name in NAMES:
        with pytest.raises(ValueError, match=r"moments: E\[k k'\] must be finite"):
            get_method(name).start(broken, CONFIG, torch.float32)
    assert isinstance(get_method("alphaedit_dense").start(moment(), CONFIG, torch.float32), DenseAlphaEdit)
    assert "alphaedit_dense" not in list_methods()
    assert BATCHES >= 10


def test_a_rebuilt_solver_holds_the_batches_that_stay_and_no_others() -> None:
    d, prior = 12, rk.Prior.ridge(12, 2.0)
    solver = RecursionSolver(rk.CovarianceState(prior, dtype=torch.float64), lambda keys: 0.3 * keys, "batch")
    rows = [(randn(u, d, seed=u), randn(u, 3, seed=10 + u), 0.3 * u) for u in (2, 3, 4)]
    following: RecursionSolver = solver
    for keys, _, _ in rows:
        _, following = following.solved(keys)
    before = following.state.covariance()
    shift, rebuilt = following.rebuilt(lambda: iter(rows[1:]))
    system = 4.0 * torch.eye(d, dtype=torch.float64) + sum(K.T @ K / noise for K, _, noise in rows[1:])
    right = sum(K.T @ V / noise for K, V, noise in rows[1:])
    torch.testing.assert_close(shift, torch.linalg.solve(system, right))
    torch.testing.assert_close(rebuilt.state.covariance(), torch.linalg.inv(system))
    assert torch.equal(following.state.covariance(), before)
    gain, removed = following.removed(rows[0][0])
    torch.testing.assert_close(removed.state.covariance(), torch.linalg.inv(system))
    torch.testing.assert_close(gain, torch.linalg.solve(system, rows[0][0].T / rows[0][2]))


def test_rows_that_are_appended_keep_their_gram_matrix_and_are_bounded() -> None:
    kept, gram = None, torch.zeros(4, 4, dtype=torch.float64)
    for seed, noise in enumerate([0.5, 2.0, 1.0, 0.1]):
        keys = randn(5, 4, seed=seed)
        kept, gram = appended(kept, keys, noise), gram + keys.T @ keys / noise
        torch.testing.assert_close(kept.T @ kept, gram)
        assert len(kept) <= 12
