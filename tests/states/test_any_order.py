"""Every operation of a filter in any order, beside the constrained least squares that it solves, worked out anew."""

from __future__ import annotations

import copy
import io
import math
import pickle
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, assume, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

import rlsedit_kernels as rk

D, V = 8, 3
CLOSE = 1e-7
MOST_HELD = 4
"""Directions that may be held by hard writes and restrictions."""

EXAMPLES = 12

seeds = st.integers(0, 1_000_000)
UPDATE, HARD, HELD = 10_000_000, 20_000_000, 30_000_000
"""Where the seeds of each kind of drawing begin: no two of them give the same directions."""
noises = st.sampled_from([0.25, 1.0, 6.0])


def drawn(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator("cpu").manual_seed(seed), dtype=torch.float64, device="cpu")


@dataclass(frozen=True)
class Term:
    """A batch in the objective: |K W - V|^2 scale / noise."""

    K: torch.Tensor
    V: torch.Tensor
    noise: float
    scale: float = 1.0

    @property
    def weight(self) -> float:
        return self.scale / self.noise


class Problem:
    """prior_scale |W - W_0|_S^2 + sum of terms, least where held W = values: nothing recursive."""

    def __init__(self, S: torch.Tensor, W_0: torch.Tensor) -> None:
        self.S, self.W_0, self.prior_scale = S, W_0, 1.0
        self.terms: list[Term] = []
        self.held = torch.zeros(0, D, dtype=torch.float64, device="cpu")
        self.values = torch.zeros(0, V, dtype=torch.float64, device="cpu")
        self.restricted: list[torch.Tensor] = []

    def copied(self) -> Problem:
        twin = copy.copy(self)
        twin.terms, twin.restricted = list(self.terms), list(self.restricted)
        return twin

    def hold(self, A: torch.Tensor, values: torch.Tensor) -> None:
        self.held, self.values = torch.cat([self.held, A]), torch.cat([self.values, values])

    def forget(self, by: float) -> None:
        self.prior_scale *= by
        self.terms = [replace(term, scale=term.scale * by) for term in self.terms]

    def lift(self) -> None:
        """What `refactor` does: forgetting starts anew, hard writes are lifted, restrictions hold what is there."""
        W = self.weight()
        self.prior_scale = 1.0
        self.terms = [replace(term, scale=1.0) for term in self.terms]
        self.held, self.values = self.held[:0], self.values[:0]
        for A in self.restricted:
            self.hold(A, A @ W)

    def precision(self) -> torch.Tensor:
        S = self.prior_scale * self.S
        for term in self.terms:
            S = S + term.weight * term.K.mT @ term.K
        return S

    def _free(self) -> torch.Tensor:
        """An orthonormal basis (d, f) of what is not held."""
        if not len(self.held):
            return torch.eye(D, dtype=torch.float64, device="cpu")
        _, sizes, basis = torch.linalg.svd(self.held)
        return basis[int((sizes > 1e-9).sum()) :].mT

    def covariance(self) -> torch.Tensor:
        N = self._free()
        return N @ torch.linalg.inv(N.mT @ self.precision() @ N) @ N.mT

    def weight(self) -> torch.Tensor:
        right = self.prior_scale * self.S @ self.W_0
        for term in self.terms:
            right = right + term.weight * term.K.mT @ term.V
        start = torch.linalg.pinv(self.held, rtol=1e-9) @ self.values if len(self.held) else torch.zeros_like(self.W_0)
        return start + self.covariance() @ (right - self.precision() @ start)

    def objective(self) -> float:
        W = self.weight()
        shift = W - self.W_0
        total = self.prior_scale * float((shift * (self.S @ shift)).sum())
        return total + sum(term.weight * float((term.K @ W - term.V).square().sum()) for term in self.terms)


def error(found: torch.Tensor, exact: torch.Tensor) -> float:
    return float(torch.linalg.norm(found.cpu() - exact) / torch.linalg.norm(exact).clamp_min(1e-3))


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

    @initialize(seed=seeds, layout=st.sampled_from(["in_out", "out_in"]), anchor=st.booleans())
    def begin(self, seed: int, layout: str, anchor: bool) -> None:
        X, W_0 = drawn(seed, 12, D), drawn(seed + 1, D, V)
        prior = rk.Prior.anchor(X.mT @ X / 12, mu=0.8, lam=0.5) if anchor else rk.Prior.ridge(D, 0.9)
        given = W_0 if layout == "in_out" else W_0.mT.contiguous()
        self.rls = rk.RLSFilter(given, prior, layout=layout, dtype=torch.float64, **KINDS[self.kind])
        self.state: Any = rk.CovarianceState(prior, dtype=torch.float64)
        self.problem = Problem(prior.factor.precision("cpu"), W_0)
        self.kept: tuple[rk.RLSFilter, Any, Problem] | None = None

    @property
    def carried(self) -> bool:
        return self.kind == "carried"

    @rule(seed=seeds, u=st.integers(1, 5), noise=noises, forget=st.sampled_from([1.0, 1.0, 1.0, 0.8]))
    def update(self, seed: int, u: int, noise: float, forget: float) -> None:
        K, targets = drawn(UPDATE + seed, u, D) / math.sqrt(D), drawn(seed, u, V)
        before = self.problem.weight()
        step = self.rls.update(K, targets, noise, forget)
        self.state.update(K, noise, forget)
        self.problem.forget(forget)
        self.problem.terms.append(Term(K, targets, noise))
        assert step.innovation_norm == pytest.approx(float(torch.linalg.norm(targets - K @ before)), rel=1e-6, abs=1e-8)
        after = float(torch.linalg.norm(targets - K @ self.problem.weight()))
        assert step.residual_norm == pytest.approx(after, rel=1e-6, abs=1e-7)
        shift = float(torch.linalg.norm(self.problem.weight() - self.problem.W_0))
        assert step.parameter_bound is None or shift <= step.parameter_bound * (1.0 + 1e-9)

    @precondition(lambda self: not self.carried)
    @rule(seed=seeds)
    def write_hard(self, seed: int) -> None:
        assume(len(self.problem.held) < MOST_HELD)
        if isinstance(self.rls.state, rk.SquareRootState):
            return
        K, targets = drawn(HARD + seed, 1, D) / math.sqrt(D), drawn(seed, 1, V)
        if isinstance(self.state, rk.SquareRootState):
            self.state = self.state.convert("plain")
        self.rls.update(K, targets, 0.0)
        self.state.update(K, 0.0)
        self.problem.hold(K, targets)

    @precondition(lambda self: not self.carried)
    @rule(seed=seeds, q=st.integers(1, 2))
    def restrict(self, seed: int, q: int) -> None:
        assume(len(self.problem.held) + q <= MOST_HELD)
        Q = torch.linalg.qr(drawn(HELD + seed, D, q))[0]
        W = self.problem.weight()
        self.rls.state.restrict(Q)
        self.state.restrict(Q)
        self.problem.hold(Q.mT, Q.mT @ W)
        self.problem.restricted.append(Q.mT)

    @precondition(lambda self: bool(self.problem.terms))
    @rule(data=st.data())
    def remove(self, data: st.DataObject) -> None:
        term = data.draw(st.sampled_from(self.problem.terms))
        self.rls.remove(term.K, term.V, term.noise / term.scale)
        self.state.remove(term.K, term.noise / term.scale)
        self.problem.terms = [other for other in self.problem.terms if other is not term]

    @rule()
    def refactor(self) -> None:
        written = [(term.K, term.V, term.noise) for term in self.problem.terms]
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
            self.state = self.state.to("cpu", torch.float64)
            return
        kept = self.state.state_dict()
        arguments = {} if isinstance(self.state, rk.SquareRootState) else {"form": self.state._requested}
        self.state = type(self.state)(self.state.prior, dtype=torch.float64, **arguments)
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

    @staticmethod
    def _compare(rls: rk.RLSFilter, state: Any, problem: Problem) -> None:
        W = rls.weight if rls.layout == "in_out" else rls.weight.mT
        C = problem.covariance()
        assert error(W, problem.weight()) < CLOSE
        assert error(rls.state.covariance(), C) < CLOSE
        assert error(state.covariance(), C) < CLOSE
        assert rls.objective == pytest.approx(problem.objective(), rel=1e-6, abs=1e-8)
        assert rls.health(thorough=True).status == "ok"
        assert state.health(thorough=True).status == "ok"


@pytest.mark.parametrize("kind", KINDS)
def test_any_order(kind: str) -> None:
    from hypothesis.stateful import run_state_machine_as_test

    machine = type(f"AnyOrder_{kind}", (AnyOrder,), {"kind": kind})
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=EXAMPLES, stateful_step_count=14, deadline=None, derandomize=True,
            suppress_health_check=list(HealthCheck),
        ),
    )  # fmt: skip
