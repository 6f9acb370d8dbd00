"""Each method against its published formula, evaluated densely in float64 over a stream of batches."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from rlsedit.config import EditConfig
from rlsedit.deviations import Deviations
from rlsedit.methods import DenseAlphaEdit, get_method, list_methods, null_basis

D, V, U, BATCHES = 40, 12, 5, 10
CONFIG = EditConfig(layers=(0,), mom2_weight=30.0, mu=1.2, lam=0.4, l2=2.0, null_threshold=0.5, noise=1.5)


def moment() -> Tensor:
    """Eigenvalues from 1e-2 to 4, a third of them below the threshold."""
    basis, _ = torch.linalg.qr(torch.randn(D, D, generator=torch.Generator().manual_seed(1), dtype=torch.float64))
    return basis @ torch.diag(torch.logspace(-2, 0.6, D, dtype=torch.float64)) @ basis.T


def stream() -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(2)
    common = torch.randn(1, D, generator=generator, dtype=torch.float64)
    return [
        (
            torch.randn(U, D, generator=generator, dtype=torch.float64) + common,
            torch.randn(U, V, generator=generator, dtype=torch.float64),
        )
        for _ in range(BATCHES)
    ]


def updates(name: str, dtype: torch.dtype, config: EditConfig = CONFIG) -> list[Tensor]:
    solver = get_method(name).solver(moment(), config, dtype, "cpu")
    found = []
    for keys, residual in stream():
        proposal, solver = solver.propose(keys.to(dtype), residual.to(dtype))
        found.append(proposal.update.double())
    return found


def dense(name: str, config: EditConfig = CONFIG) -> list[Tensor]:
    """The formulas of the papers: MEMIT eq. 14, its sequential form, AlphaEdit eq. 14, RLSEdit's normal equations."""
    eye, past, found = torch.eye(D, dtype=torch.float64), torch.zeros(D, D, dtype=torch.float64), []
    basis = null_basis(moment(), config.null_threshold)
    for keys, residual in stream():
        gram, right = keys.T @ keys / config.noise, keys.T @ residual / config.noise
        anchor = config.mu**2 * config.mom2_weight * moment()
        if name == "memit":
            found.append(torch.linalg.solve(anchor + gram, right))
        elif name == "memit_seq":
            found.append(torch.linalg.solve(anchor + past + gram, right))
        elif name == "rlsedit":
            found.append(torch.linalg.solve(anchor + config.lam**2 * eye + past + gram, right))
        else:
            p = basis @ basis.T
            found.append(torch.linalg.solve(p @ (past + gram) + config.l2 * eye, p @ right))
        past = past + gram
    return found


@pytest.mark.parametrize("name", [*list_methods(), "alphaedit_dense"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-4)])
def test_equal_to_the_published_formula(name: str, dtype: torch.dtype, tolerance: float) -> None:
    wanted = dense(name.removesuffix("_dense"))
    for found, exact in zip(updates(name, dtype), wanted, strict=True):
        assert (found - exact).norm() <= tolerance * exact.norm()


def test_rlsedit_minimises_its_objective_and_the_figures_are_those_of_the_objective() -> None:
    """W after the stream is the least-squares solution; cost, deviations and bounds equal their definitions."""
    method, anchor = get_method("rlsedit"), CONFIG.mom2_weight * moment()
    solver = method.solver(moment(), CONFIG, torch.float64, "cpu")
    figures = Deviations(torch.zeros(D, V, dtype=torch.float64), anchor)
    weight = start = torch.randn(D, V, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    rows: list[tuple[Tensor, Tensor]] = []
    for keys, residual in stream():
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
    system = CONFIG.mu**2 * anchor + CONFIG.lam**2 * torch.eye(D) + all_keys.T @ all_keys / CONFIG.noise
    exact = start + torch.linalg.solve(system, all_keys.T @ (all_values - all_keys @ start) / CONFIG.noise)
    torch.testing.assert_close(weight, exact, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", ["alphaedit", "alphaedit_dense"])
def test_alphaedit_figures(name: str) -> None:
    """With or without a gain at hand the figures are the same; fit is that of all batches."""
    method = get_method(name)
    solver = method.solver(moment(), CONFIG, torch.float64, "cpu")
    figures = Deviations(torch.zeros(D, V, dtype=torch.float64), CONFIG.mom2_weight * moment())
    rows = []
    for keys, residual in stream():
        rows.append((keys, keys @ figures.shift + residual))
        proposal, solver = solver.propose(keys, residual)
        figures = figures.after(keys, residual, proposal, CONFIG.noise)
    fit = sum(float((k @ figures.shift - v).square().sum()) for k, v in rows) / CONFIG.noise
    assert figures.fit(method, CONFIG) == pytest.approx(fit, rel=1e-8)
    held = torch.trace(figures.shift.T @ figures.gram @ figures.shift)
    assert figures.anchor == pytest.approx(float(held), rel=1e-9)
    basis = null_basis(moment(), CONFIG.null_threshold)
    assert (figures.shift - basis @ (basis.T @ figures.shift)).norm() < 1e-9 * figures.shift.norm()


@pytest.mark.parametrize("name", list_methods())
def test_a_proposal_changes_nothing(name: str) -> None:
    solver = get_method(name).solver(moment(), CONFIG, torch.float32, "cpu")
    keys, residual = (part.float() for part in stream()[0])
    first, _ = solver.propose(keys, residual)
    again, following = solver.propose(keys, residual)
    assert torch.equal(first.update, again.update)
    later, _ = following.propose(keys, residual)
    assert torch.equal(first.update, later.update) == (name == "memit")
    assert solver.health()["steps"] == 0


def test_memit_ignores_earlier_batches_and_rlsedit_without_ridge_is_sequential_memit() -> None:
    without = replace(CONFIG, lam=0.0)
    for one, other in zip(updates("rlsedit", torch.float64, without), updates("memit_seq", torch.float64), strict=True):
        assert torch.equal(one, other)
    assert not torch.allclose(updates("memit", torch.float64)[-1], updates("memit_seq", torch.float64)[-1])


def test_wrong_input_is_named() -> None:
    with pytest.raises(ValueError, match=r"method must be one of \['rlsedit', 'alphaedit', .*\], got 'alphaedlt'"):
        get_method("alphaedlt")
    make = get_method("alphaedit").solver
    with pytest.raises(ValueError, match=r"null_threshold must exceed the smallest eigenvalue .* null space is empty"):
        make(moment(), replace(CONFIG, null_threshold=1e-3), torch.float32, "cpu")
    with pytest.raises(ValueError, match=r"null_threshold must lie below the largest eigenvalue"):
        make(moment(), replace(CONFIG, null_threshold=100.0), torch.float32, "cpu")
    with pytest.raises(ValueError, match=r"mu must be positive .* the prior would be zero"):
        get_method("rlsedit").solver(moment(), replace(CONFIG, mu=0.0, lam=0.0), torch.float32, "cpu")
    broken = moment()
    broken[2, 3] = torch.inf
    for name in list_methods():
        with pytest.raises(ValueError, match=r"moments: E\[k k'\] must be finite"):
            get_method(name).solver(broken, CONFIG, torch.float32, "cpu")
    assert isinstance(get_method("alphaedit_dense").solver(moment(), CONFIG, torch.float32, "cpu"), DenseAlphaEdit)
    assert "alphaedit_dense" not in list_methods()
