"""What does it cost to watch a state: the cheap check, the guard of a stream, and the thorough check on request?

Batches on states that keep a matrix, guarded and not, in turns. A guarded state checks itself before every 64th batch
once a stream has settled, so that rounds of 64 batches are timed; the price of one check is timed by itself as well.
"""

from __future__ import annotations

from typing import Any

import torch
from form_cost import prior_of
from harness import arguments, in_turns, report, summary

import rlsedit_kernels as rk
from rlsedit_kernels.states.guard import EVERY

FORMS = ("plain", "whitened", "inverse_root")


def settled(prior: rk.Prior, form: str, guard: str, batches: list[torch.Tensor]) -> rk.CovarianceState:
    """A state that keeps a matrix and is `EVERY` batches old at least."""
    state = rk.CovarianceState(prior, form=form, guard=guard)
    while not state.health().dense or state.steps % EVERY or not state.steps:
        state.commit(batches[state.steps % len(batches)])
    return state


def main() -> None:
    parser = arguments(__doc__.splitlines()[0])
    parser.add_argument("--d", type=int, default=1024)
    parser.add_argument("--u", type=int, default=100)
    parser.add_argument("--condition", type=float, default=1e4, help="of the prior; 1 for a ridge")
    parser.add_argument("--repeat", type=int, default=7)
    options = parser.parse_args()
    generator = torch.Generator().manual_seed(0)
    batches = [torch.randn(options.u, options.d, generator=generator) * 1e-3 for _ in range(4)]
    prior = prior_of(options.condition, options.d)
    rows: list[dict[str, Any]] = []
    for form in FORMS:
        states = {guard: settled(prior, form, guard, batches) for guard in ("off", "auto")}

        def rounds(state: rk.CovarianceState) -> None:
            for i in range(EVERY):
                state.update(batches[i % 4])

        seconds = in_turns(
            {name: (lambda _, state=state: rounds(state)) for name, state in states.items()},
            dict.fromkeys(states, options.repeat),
            warmup=1,
        )
        check = summary(in_turns({"check": lambda _, s=states["off"]: s.health()}, {"check": 15})["check"])["median_ms"]
        thorough = summary(
            in_turns({"check": lambda _, s=states["off"]: s.health(thorough=True)}, {"check": 3})["check"]
        )["median_ms"]
        batch = summary(seconds["off"])["median_ms"] / EVERY
        ratios = sorted(on / off for on, off in zip(seconds["auto"], seconds["off"], strict=True))
        rows.append(
            {
                "form": form,
                "batch_ms": batch,
                "check_ms": check,
                "check_batches": check / batch,
                "guard_percent": 100.0 * check / batch / EVERY,
                "guard_percent_timed": 100.0 * (ratios[len(ratios) // 2] - 1.0),
                "thorough_ms": thorough,
                "thorough_batches": thorough / batch,
            }
        )
    settings = {"d": options.d, "u": options.u, "condition": options.condition, "every": EVERY, "dtype": "float32"}
    report("health_cost", settings, rows, options.json)


if __name__ == "__main__":
    main()
