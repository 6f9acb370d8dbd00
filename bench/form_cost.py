"""What does a batch cost, by form of the covariance, in time and in bytes kept, relative to the plain form?

States under one prior are updated in turns, once each keeps a matrix (the whitened form starts with columns). The
cost model of form="auto" (`states/choice.py`) stands beside the clock.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from harness import arguments, in_turns, report, summary

import rlsedit_kernels as rk
from rlsedit_kernels.states import choice

DTYPES = {"float32": torch.float32, "float64": torch.float64}


def prior_of(condition: float, d: int) -> rk.Prior:
    """A ridge for condition 1, otherwise a matrix with geometric eigenvalues."""
    if condition == 1.0:
        return rk.Prior.ridge(d, 1.0)
    Q = np.linalg.qr(np.random.default_rng(0).standard_normal((d, d)))[0]
    S = (Q * np.logspace(0.0, -np.log10(condition), d)) @ Q.T
    return rk.Prior.precision(0.5 * (S + S.T))


def bytes_kept(state: rk.CovarianceState) -> int:
    """Of the form, the prior's root that it works with included."""
    return sum(A.numel() * A.element_size() for A in vars(state._form).values() if isinstance(A, torch.Tensor))


def main() -> None:
    parser = arguments(__doc__.splitlines()[0])
    parser.add_argument("--d", type=int, default=2048)
    parser.add_argument("--u", type=int, default=100)
    parser.add_argument("--repeat", type=int, default=11)
    options = parser.parse_args()
    d, u = options.d, options.u
    generator = torch.Generator().manual_seed(0)
    batches = [torch.randn(u, d, generator=generator) * 1e-3 for _ in range(4)]
    rows: list[dict[str, Any]] = []
    for condition in (1.0, 1e2, 1e8):
        prior = prior_of(condition, d)
        states = {}
        for form in choice.SAFETY:
            for name, dtype in DTYPES.items():
                state = states[form, name] = rk.CovarianceState(prior, form=form, dtype=dtype, guard="off")
                while not state.health().dense or state.steps < 1:
                    state.commit(batches[state.steps % 4])
        seconds = in_turns(
            {" ".join(key): (lambda i, state=state: state.update(batches[i % 4])) for key, state in states.items()},
            {" ".join(key): options.repeat for key in states},
        )
        time = {key: summary(seconds[" ".join(key)]) for key in states}
        base, flops = time["plain", "float32"]["median_ms"], choice.flops("plain", prior.factor, 0, True)
        for (form, name), state in states.items():
            model = choice.flops(form, prior.factor, d, True, DTYPES[name]) * (1 if name == "float32" else 2)
            rows.append(
                {
                    "condition": condition,
                    "form": form,
                    "dtype": name,
                    "median_ms": time[form, name]["median_ms"],
                    "relative": time[form, name]["median_ms"] / base,
                    "model": model / flops,
                    "bytes_per_d2": bytes_kept(state) / d**2,
                }
            )
    report("form_cost", {"d": d, "u": u, "prior": "ridge, or a matrix of this condition"}, rows, options.json)


if __name__ == "__main__":
    main()
