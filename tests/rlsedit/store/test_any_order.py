"""Every operation of an editor that is kept in a folder, in any order: bits, ledger and the problem that it solves."""

from __future__ import annotations

import shutil
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)
from support.any_order import run_in_any_order
from support.editors import differing, editor, everything, facts, resumed
from support.least_squares import Problem, Term

from rlsedit.facts import Fact

METHODS = ("rlsedit", "alphaedit", "memit_seq")
CLOSE = 1e-6
EXAMPLES = 5

POOL = facts(6)
POOL += [replace(fact, id=f"{fact.id}'", target_new="Sydney") for fact in POOL[:3]]  # about the same
"""Facts to choose from; an id may come back once its edit is out of the model."""


class AnyOrder(RuleBasedStateMachine):
    """An editor, the ids that its model shall hold, and everything it had behind each step that counts."""

    method = "rlsedit"

    @initialize(every=st.sampled_from([1, 2, 100]), kept=st.booleans())
    def begin(self, every: int, kept: bool) -> None:
        self.folder, self.every, self.kept = Path(tempfile.mkdtemp()), every, kept
        self.one = editor(self.method, torch.float64)
        if kept:
            self.one.save(self.folder, every=every)
        self.live: list[str] = []
        self.past: list[tuple[list[str], dict[str, Any]]] = []

    def teardown(self) -> None:
        if hasattr(self, "one"):
            self.one.close()
            shutil.rmtree(self.folder)

    def _step(self, work: Any, live: list[str]) -> None:
        before = self.live, everything(self.one)
        work()
        self.past.append(before)
        self.live = live

    def _same(self, expected: dict[str, Any]) -> None:
        """To the bit; before the first step there need be no states."""
        found = everything(self.one)
        names = found.keys() if self.past else found.keys() & expected.keys() - {"numbers"}
        assert differing({n: found[n] for n in names}, {n: expected[n] for n in names if n in expected}) == []

    @rule(data=st.data(), size=st.integers(1, 3), policy=st.sampled_from(["keep-both", "replace", "refuse"]))
    def edit(self, data: st.DataObject, size: int, policy: Any) -> None:
        some: list[Fact] = data.draw(
            st.lists(st.sampled_from(POOL), min_size=1, max_size=3, unique_by=lambda fact: fact.subject)
        )
        about = [name for name in self.live if any(name.rstrip("'") == fact.id.rstrip("'") for fact in some)]
        taken = [fact for fact in some if fact.id in self.live]
        before = everything(self.one)
        if (policy == "refuse" and about) or (policy == "keep-both" and taken):
            with pytest.raises(ValueError, match=r"nothing was written|must have ids that are not in the model"):
                self.one.edit(some, batch_size=size, on_conflict=policy)
            assert differing(everything(self.one), before) == []
            return
        for i in range(0, len(some), size):  # a step a batch
            batch = some[i : i + size]
            subjects = {fact.id.rstrip("'") for fact in batch} if policy == "replace" else set()
            gone = [name for name in self.live if name.rstrip("'") in subjects]
            live = [name for name in self.live if name not in gone] + [fact.id for fact in batch]
            self._step(lambda batch=batch: self.one.edit(batch, batch_size=size, on_conflict=policy), live)

    @precondition(lambda self: bool(self.live))
    @rule(data=st.data())
    def remove(self, data: st.DataObject) -> None:
        names = data.draw(st.lists(st.sampled_from(self.live), min_size=1, unique=True))
        self._step(lambda: self.one.remove(names), [name for name in self.live if name not in names])

    @precondition(lambda self: bool(self.past))
    @rule(steps=st.integers(1, 2))
    def undo(self, steps: int) -> None:
        for _ in range(min(steps, len(self.past))):
            self.one.undo()
            self.live, expected = self.past.pop()
            self._same(expected)

    @rule()
    def reset(self) -> None:
        self.one.reset()
        self.live, self.past = [], []

    @precondition(lambda self: self.kept)
    @rule()
    def resume(self) -> None:
        expected = everything(self.one)
        self.one.close()
        self.one = resumed(self.folder, torch.float64, every=self.every)
        self._same(expected)

    @rule()
    def save(self) -> None:
        self.one.save(self.folder, every=self.every)
        self.kept = True

    @rule(name=st.sampled_from(["f0", "nobody"]))
    def remove_what_is_not_there(self, name: str) -> None:
        if name in self.live:
            return
        before = everything(self.one)
        with pytest.raises(ValueError, match="ids must be of edits in the model"):
            self.one.remove([name])
        assert differing(everything(self.one), before) == []

    @invariant()
    def ledger(self) -> None:
        if not hasattr(self, "live"):
            return
        journal = self.one._recorded("test")
        assert sorted(journal.index.live) == sorted(self.live)
        assert len(journal.index.stack) == len(self.past)
        if self.one.folder is not None:
            rows = self.one.folder.ledger.edits()
            assert sorted(row.fact.id for row in rows if row.state == "applied") == sorted(self.live)

    @invariant()
    def weights(self) -> None:
        """Behind each layer's W lies the minimiser for the recorded targets of the edits that are left."""
        if not getattr(self, "past", None):
            return
        journal = self.one._recorded("test")
        places = {e.number: journal.index.positions(e) for e in journal.index.stack if e.kind == "batch"}
        records = {record.number: record for record in self.one.records}
        assert self.one._layers is not None
        for n, layer in self.one._layers.items():
            prior = layer.solver.state.prior.factor
            shift = (self.one._weights.wide(n) - self.one.first_weights[n]).double()
            problem = Problem(prior.precision("cpu"), torch.zeros_like(shift))
            if prior.rank < prior.d:
                problem.restrict(torch.linalg.svd(prior.covariance())[2][prior.rank :])
            for number, positions in places.items():
                rows, record = records[number].rows_of(positions), records[number]
                if len(rows):
                    kept = record.layers[n]
                    problem.terms.append(Term(kept.keys[rows].double(), kept.target[rows].double(), record.noise))
            exact = problem.weight()
            assert float((shift - exact).norm()) <= CLOSE * max(float(exact.norm()), float(shift.norm()) * 1e-3, 1e-9)


@pytest.mark.parametrize("method", METHODS)
def test_any_order(method: str) -> None:
    machine = type(f"AnyOrder_{method}", (AnyOrder,), {"method": method})
    run_in_any_order(machine, EXAMPLES, 10)
