"""Every operation of a filter in any order, beside the constrained least squares that it solves, worked out anew."""

from __future__ import annotations

import copy
import io
import math
import pickle
from typing import Any

import pytest
import torch
from hypothesis import assume
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)
from support.any_order import run_in_any_order
from support.least_squares import Problem, Term

import rlsedit_kernels as rk

D, V = 8, 3
CLOSE = {torch.float64: 1e-7, torch.float32: 5e-3}
"""Relative error of weight and covariance that is let pass; a batch that is taken back may cost three digits."""
MOST_HELD = 6
"""Directions that may be held by hard writes and restrictions."""

EXAMPLES = 12

seeds = st.integers(0, 1_000_000)
UPDATE, HARD, HELD = 10_000_000, 20_000_000, 30_000_000
"""Where the seeds of each kind of drawing begin: no two of them give the same directions."""
noises = st.sampled_from([0.25, 1.0, 6.0])
PRIORS = ("ridge", "anchor", "null_space")


def drawn(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator("cpu").manual_seed(seed), dtype=torch.float64, device="cpu")


def error(found: torch.Tensor, exact: torch.Tensor) -> float:
    return float(torch.linalg.norm(found.cpu().double() - exact) / torch.linalg.norm(exact).clamp_min(1e-3))


def saved_and_read(rls: rk.RLSFilter) -> rk.RLSFilter:
    file = io.BytesIO()
    torch.save(rls.state_dict(), file)
    file.seek(0)
    state = "square_root" if isinstance(rls.state, rk.SquareRootState) else "covariance"
    form = "auto" if state == "square_root" else rls.state._requested
    twin = rk.RLSFilter(
        torch.zeros_like(rls.weight), rls.state.prior, state, form=form, layout=rls.layout, dtype=rls.state.dtype,
        solution="carried" if type(rls._solution).__name__ == "CarriedSolution" else "gain",
    )  # fmt: skip
    twin.load_state_dict(torch.load(file, weights_only=True))
    return twin


COPIES = {
    "clone": lambda rls: rls.clone(),
    "deepcopy": copy.deepcopy,
    "pickle": lambda rls: pickle.loads(pickle.dumps(rls)),
    "state_dict": saved_and_read,
}
KINDS: dict[str, dict[str, Any]] = {
    **{form: {"state": "covariance", "form": form} for form in ("plain", "whitened", "inverse_root", "auto")},
    "carried": {"state": "square_root", "solution": "carried"},
    "square_root": {"state": "square_root", "solution": "gain"},
}
FORMS = ("plain", "whitened", "inverse_root", "square_root")


class AnyOrder(RuleBasedStateMachine):
    """A filter, a state that is converted and moved beside it, and the problem that both solve."""

    kind = "plain"
    dtype = torch.float64

    @initialize(seed=seeds, layout=st.sampled_from(["in_out", "out_in"]), kind=st.sampled_from(PRIORS))
    def begin(self, seed: int, layout: str, kind: str) -> None:
        X, W_0 = drawn(seed, 12, D), drawn(seed + 1, D, V).to(self.dtype).double()
        S = {"ridge": 0.81, "anchor": 0.25, "null_space": 0.7}[kind] * torch.eye(D, dtype=torch.float64, device="cpu")
        prior = rk.Prior.ridge(D, 0.9)
        if kind == "anchor":
            prior = rk.Prior.anchor(X.mT @ X / 12, mu=0.8, lam=0.5)
            S += 0.64 / 12 * X.mT @ X
        self.problem = Problem(S, W_0)
        if kind == "null_space":
            Q = torch.linalg.qr(X.mT)[0]
            prior = rk.Prior.null_space(Q[:, 2:], 0.7)
            self.problem.restrict(Q[:, :2].mT)
        given = (W_0 if layout == "in_out" else W_0.mT.contiguous()).to(self.dtype)
        self.rls = rk.RLSFilter(given, prior, layout=layout, **KINDS[self.kind])
        self.state: Any = rk.CovarianceState(prior, dtype=self.dtype)
        self.kept: tuple[rk.RLSFilter, Any, Problem] | None = None

    @property
    def close(self) -> float:
        return CLOSE[self.dtype]

    @property
    def carried(self) -> bool:
        return self.kind == "carried"

    def _drawn(self, *given: int) -> torch.Tensor:
        return drawn(*given).to(self.dtype)

    @rule(seed=seeds, u=st.integers(1, 5), noise=noises, forget=st.sampled_from([1.0, 1.0, 1.0, 0.8]))
    def update(self, seed: int, u: int, noise: float, forget: float) -> None:
        K, targets = self._drawn(UPDATE + seed, u, D) / math.sqrt(D), self._drawn(seed, u, V)
        term = Term(K.double(), targets.double(), noise)
        before = self.problem.misfit(term)
        step = self.rls.update(K, targets, noise, forget)
        self.state.update(K, noise, forget)
        self.problem.forget(forget)
        self.problem.terms.append(term)
        assert step.innovation_norm == pytest.approx(before, rel=self.close, abs=self.close)
        assert step.residual_norm == pytest.approx(self.problem.misfit(term), rel=self.close, abs=self.close)
        shift = float(torch.linalg.norm(self.problem.weight() - self.problem.W_0))
        assert step.parameter_bound is None or shift <= step.parameter_bound + self.close

    @precondition(lambda self: not self.carried)
    @rule(seed=seeds)
    def write_hard(self, seed: int) -> None:
        assume(len(self.problem.held) < MOST_HELD)
        if isinstance(self.rls.state, rk.SquareRootState):
            return
        K, targets = self._drawn(HARD + seed, 1, D) / math.sqrt(D), self._drawn(seed, 1, V)
        if isinstance(self.state, rk.SquareRootState):
            self.state = self.state.convert("plain")
        self.rls.update(K, targets, 0.0)
        self.state.update(K, 0.0)
        self.problem.hold(K.double(), targets.double())

    @precondition(lambda self: not self.carried)
    @rule(seed=seeds, q=st.integers(1, 2))
    def restrict(self, seed: int, q: int) -> None:
        assume(len(self.problem.held) + q <= MOST_HELD)
        Q = torch.linalg.qr(drawn(HELD + seed, D, q))[0]
        self.rls.state.restrict(Q)
        self.state.restrict(Q)
        self.problem.restrict(Q.mT)

    @precondition(lambda self: bool(self.problem.terms))
    @rule(data=st.data())
    def remove(self, data: st.DataObject) -> None:
        term = data.draw(st.sampled_from(self.problem.terms))
        K, targets = term.K.to(self.dtype), term.V.to(self.dtype)
        self.rls.remove(K, targets, term.noise / term.scale)
        self.state.remove(K, term.noise / term.scale)
        self.problem.terms = [other for other in self.problem.terms if other is not term]

    @rule()
    def refactor(self) -> None:
        written = [(term.K.to(self.dtype), term.V.to(self.dtype), term.noise) for term in self.problem.terms]
        self.rls.refactor(written)
        self.state.refactor([(K, noise) for K, _, noise in written])
        self.problem.lift()

    @rule(way=st.sampled_from(list(COPIES)), stay=st.booleans())
    def copied(self, way: str, stay: bool) -> None:
        """Go on with the copy, or with the original; the other must not notice (`unmoved`)."""
        twin = COPIES[way](self.rls)
        other = self.state.clone()
        if stay:
            self.kept = twin, other, self.problem.copied()
        else:
            self.kept, self.rls, self.state = (self.rls, self.state, self.problem.copied()), twin, other

    @rule(form=st.sampled_from(FORMS))
    def convert(self, form: str) -> None:
        self.state = self.state.convert(form)

    @rule(saved=st.booleans())
    def move(self, saved: bool) -> None:
        """Nowhere: the same device and dtype, or through a file."""
        if not saved:
            self.state = self.state.to("cpu", self.dtype)
            return
        kept = self.state.state_dict()
        arguments = {} if isinstance(self.state, rk.SquareRootState) else {"form": self.state._requested}
        self.state = type(self.state)(self.state.prior, dtype=self.dtype, **arguments)
        self.state.load_state_dict(kept)

    @invariant()
    def right(self) -> None:
        if hasattr(self, "problem"):
            self._compare(self.rls, self.state, self.problem)

    @invariant()
    def unmoved(self) -> None:
        if getattr(self, "kept", None) is not None:
            assert self.kept is not None
            self._compare(*self.kept)

    def _compare(self, rls: rk.RLSFilter, state: Any, problem: Problem) -> None:
        W = rls.weight if rls.layout == "in_out" else rls.weight.mT
        C = problem.covariance()
        assert error(W, problem.weight()) < self.close
        assert error(rls.state.covariance(), C) < self.close
        assert error(state.covariance(), C) < self.close
        assert rls.objective == pytest.approx(problem.objective(), rel=self.close, abs=self.close)
        assert rls.health(thorough=True).status == "ok"
        assert state.health(thorough=True).status == "ok"


@pytest.mark.parametrize("dtype", CLOSE, ids=["float64", "float32"])
@pytest.mark.parametrize("kind", KINDS)
def test_any_order(kind: str, dtype: torch.dtype) -> None:
    machine = type(f"AnyOrder_{kind}", (AnyOrder,), {"kind": kind, "dtype": dtype})
    run_in_any_order(machine, EXAMPLES, 14)
