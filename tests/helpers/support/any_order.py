"""State machines of hypothesis: the same runs every time, however long one takes."""

from __future__ import annotations

from hypothesis import HealthCheck, settings
from hypothesis.stateful import RuleBasedStateMachine, run_state_machine_as_test


def run_in_any_order(machine: type[RuleBasedStateMachine], examples: int, steps: int) -> None:
    """Runs of at most `steps` rules each."""
    chosen = settings(
        max_examples=examples, stateful_step_count=steps, deadline=None, derandomize=True,
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    run_state_machine_as_test(machine, settings=chosen)
