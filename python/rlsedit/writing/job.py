"""What a writer is given, and what it hands back."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from ..config import EditConfig
from ..deviations import Deviations
from ..facts import Fact
from ..methods import Method, Proposal, Solver
from ..models.adapter import Adapter
from ..prompts import Context
from ..store.records import LayerRows
from ..store.tensors import plain
from ..targets import Targets
from ..weights import EditedWeights

FindTargets = Callable[..., Targets]
"""`optimise_targets` or what stands in its place, such as a cache in front of it."""


@dataclass(frozen=True)
class LayerState:
    """State of one edited layer; replaced, never changed."""

    solver: Solver
    deviations: Deviations


def applied(
    method: Method,
    config: EditConfig,
    weights: EditedWeights,
    state: LayerState,
    layer: int,
    rows: LayerRows,
    solved: Callable[[], None] = lambda: None,
) -> LayerState:
    """Write the rows of a batch at one layer, and give the next state: the same bits for the same rows and state.

    Args:
        method, config: of the stream.
        weights: changed.
        state: of the layer, before the batch.
        layer: one of the edited layers.
        rows: keys, residual and bare keys, or the change itself.
        solved: called once the weight is written.
    """
    rows = rows.to(weights.wide(layer).device)
    if rows.change is not None:
        weights.add(layer, rows.change)
        solved()
        return LayerState(state.solver, state.deviations.moved(rows.change))
    assert rows.keys is not None
    assert rows.residual is not None
    proposal, solver = state.solver.propose(rows.keys, rows.residual, rows.bare)
    if method.post is not None:
        proposal = Proposal(method.post(proposal.update, weights.wide(layer), config), None)
    weights.add(layer, proposal.update)
    solved()
    noise = method.noise(config, len(rows.keys))
    return LayerState(solver, state.deviations.after(rows.keys, rows.residual, proposal, noise))


@dataclass(frozen=True)
class Job:
    """One batch.

    Attributes:
        adapter, tokenizer: the model.
        facts: at least one.
        contexts: of keys and targets, the bare prompt first.
        config, method: what is done.
        weights: the edited weights, with undo.
        states: by layer, before the batch.
        stage: called with (name of the stage, done, total).
        find: makes z*.
        rows: filled with what was written at each layer.
    """

    adapter: Adapter
    tokenizer: Any
    facts: Sequence[Fact]
    contexts: Sequence[Context]
    config: EditConfig
    method: Method
    weights: EditedWeights
    states: Mapping[int, LayerState]
    stage: Callable[[str, int, int], None]
    find: FindTargets
    rows: dict[int, LayerRows] = field(default_factory=dict)

    def apply(
        self, layer: int, keys: Tensor, residual: Tensor, bare: Tensor | None = None, *, seen: Tensor | None = None
    ) -> LayerState:
        """Propose a change for `layer`, take the method's step after the solve, add it, and give the next state.

        Args:
            layer: one of the edited layers.
            keys: (u, d).
            residual: (u, v).
            bare: (u, d) or None.
            seen: keys that an editor underneath has read, for the record.
        """
        bare = bare if self.method.solver is not None else None  # others do not read it
        # in one layout, so that they can be written again to the bit
        rows = LayerRows(plain(keys), plain(residual), bare=None if bare is None else plain(bare), seen=seen)
        return self._write(layer, rows)

    def change(self, layer: int, change: Tensor) -> LayerState:
        """Add a change (d, v) that no solve has made."""
        return self._write(layer, LayerRows(change=plain(change)))

    def _write(self, layer: int, rows: LayerRows) -> LayerState:
        state, at = self.states[layer], self.config.layers.index(layer)
        self.stage("solve", at, len(self.config.layers))
        following = applied(
            self.method, self.config, self.weights, state, layer, rows,
            lambda: self.stage("report", at, len(self.config.layers)),
        )  # fmt: skip
        if rows.keys is not None and rows.residual is not None:
            rows = replace(rows, target=state.deviations.target(rows.keys, rows.residual))
        self.rows[layer] = rows
        return following


@dataclass(frozen=True)
class Written:
    """Result of a writer.

    Attributes:
        states: by layer, after the batch.
        loss: mean of the last loss of each fact.
        steps: mean number of evaluations of the loss.
        owners: index of the fact of each row; empty where row i is that of fact i.
    """

    states: dict[int, LayerState] = field(default_factory=dict)
    loss: float = 0.0
    steps: float = 0.0
    owners: tuple[int, ...] = ()
