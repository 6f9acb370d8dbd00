"""What does it cost to watch a state: the cheap check, the guard of a stream, and the thorough check on request?

Processor time of one thread, which what else runs on a machine disturbs little. A guarded state checks itself before
every 64th batch once a stream has settled: one check is timed beside one batch, in turns, and so are rounds of 64
batches with the guard on and off.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from form_cost import prior_of
from harness import arguments, report, summary

import rlsedit_kernels as rk
from rlsedit_kernels.states.guard import EVERY

FORMS = ("plain", "whitened", "inverse_root")


def cpu_in_turns(functions: Mapping[str, Callable[[], object]], repetitions: int) -> dict[str, list[float]]:
    """Processor seconds of each call, the functions taking turns; one uncounted call of each first."""
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for i in range(repetitions + 1):
        for name, function in functions.items():
            begin = time.process_time()
            function()
            if i:
                seconds[name].append(time.process_time() - begin)
    return seconds


def settled(prior: rk.Prior, form: str, guard: str, batches: list[torch.Tensor]) -> rk.CovarianceState:
    """A state that keeps a matrix and whose age is a multiple of `EVERY`."""
    state = rk.CovarianceState(prior, form=form, guard=guard)
    while not state.health().dense or state.steps % EVERY or not state.steps:
        state.commit(batches[state.steps % len(batches)])
    return state


def measured(prior: rk.Prior, form: str, batches: list[torch.Tensor], repeat: int) -> dict[str, Any]:
    """One row."""
    states = {guard: settled(prior, form, guard, batches) for guard in ("off", "auto")}

    def rounds(state: rk.CovarianceState) -> None:
        for i in range(EVERY):
            state.update(batches[i % len(batches)])

    whole = cpu_in_turns({name: (lambda state=state: rounds(state)) for name, state in states.items()}, repeat)
    ratios = sorted(on / off for on, off in zip(whole["auto"], whole["off"], strict=True))
    state = states["off"]
    single = cpu_in_turns({"batch": lambda: state.update(batches[0]), "check": state.health}, 31)
    thorough = summary(cpu_in_turns({"thorough": lambda: state.health(thorough=True)}, 3)["thorough"])["median_ms"]
    batch, check = (summary(single[name])["median_ms"] for name in ("batch", "check"))
    return {
        "form": form,
        "batch_ms": batch,
        "check_ms": check,
        "guard_percent": 100.0 * check / batch / EVERY,
        "guard_percent_rounds": 100.0 * (ratios[len(ratios) // 2] - 1.0),
        "thorough_ms": thorough,
        "thorough_batches": thorough / batch,
    }


def main() -> None:
    parser = arguments(__doc__.splitlines()[0])
    parser.add_argument("--d", type=int, nargs="+", default=[128, 1024])
    parser.add_argument("--u", type=int, nargs="+", default=[8, 100])
    parser.add_argument("--condition", type=float, default=1e4, help="of the prior; 1 for a ridge")
    parser.add_argument("--repeat", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    rows: list[dict[str, Any]] = []
    for d in options.d:
        prior = prior_of(options.condition, d)
        for u in options.u:
            batches = [torch.randn(u, d, generator=generator) * 1e-3 for _ in range(4)]
            rows += [{"d": d, "u": u, **measured(prior, form, batches, options.repeat)} for form in FORMS]
    settings = {"condition": options.condition, "every": EVERY, "dtype": "float32", "clock": "processor time, 1 thread"}
    report("health_cost", settings, rows, options.json)


if __name__ == "__main__":
    main()
