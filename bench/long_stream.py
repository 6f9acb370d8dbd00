"""How far is W from a float64 batch solution after thousands of batches, by form, in float32?

Correlated keys under priors of growing condition, scaled so that k'C_0 k = 1, and under weak ridges. All forms see the
same batches; W is compared with a float64 solution of all of them at once, in the S-norm. This is the table of the
README; `forms.py` has the finer grid, in shorter streams, from which form="auto" takes its thresholds.
"""

from __future__ import annotations

import numpy as np
import torch
from forms import Rows, conditioned, weak
from harness import arguments, report

import rlsedit_kernels as rk

CONDITIONS = (1e4, 1e6, 1e8, 1e10)
RIDGES = (0.1, 0.01, 0.001)
WIDTH = 8

FORMS: dict[str, dict[str, object]] = {
    "plain": {"form": "plain"},
    "whitened": {"form": "whitened"},
    "inverse root": {"form": "inverse_root"},
    "auto": {"form": "auto"},
    "square root, by gain": {"state": "square_root", "solution": "gain"},
    "square root, carried": {"state": "square_root"},
    "plain, float64": {"form": "plain", "dtype": torch.float64},
}


def followed(problem: str, rows: Rows) -> list[dict[str, object]]:
    """One row for each form."""
    prior, S, stream = rows
    S, rhs = S.copy(), np.zeros((len(S), WIDTH))
    start = torch.zeros(len(S), WIDTH)
    filters = {
        name: rk.RLSFilter(start, prior, layout="in_out", track_bounds=False, guard="off", **arguments_)  # type: ignore[arg-type]
        for name, arguments_ in FORMS.items()
    }
    failed: dict[str, int] = {}
    for t, (K, V) in enumerate(stream):
        for name, rls in filters.items():
            if name not in failed:
                try:
                    rls.update(K, V)
                except rk.BreakdownError:
                    failed[name] = t
        S += (K.double().mT @ K.double()).numpy()
        rhs += (K.double().mT @ V.double()).numpy()
    exact = np.linalg.solve(S, rhs)
    size = np.sum(exact * (S @ exact))
    result = []
    for name, rls in filters.items():
        row: dict[str, object] = {"problem": problem, "form": name, "rho": rls.state.health().rho}
        if name in failed:
            row |= {"error_W": None, "failed_at": failed[name], "used": None, "status": "refused"}
        else:
            E = rls.weight.double().numpy() - exact
            health = rls.state.health()
            row |= {
                "error_W": float(np.sqrt(np.sum(E * (S @ E)) / size)),
                "failed_at": None,
                "used": f"{health.form} {health.storage.removeprefix('torch.')}",
                "status": health.status,
            }
        result.append(row)
    return result


def main() -> None:
    parser = arguments(__doc__.splitlines()[0])
    parser.add_argument("--d", type=int, default=1024)
    parser.add_argument("--u", type=int, default=32)
    parser.add_argument("--batches", type=int, default=2000)
    options = parser.parse_args()
    sizes = options.d, options.u, options.batches
    rows: list[dict[str, object]] = []
    for condition in CONDITIONS:
        rows += followed(f"condition {condition:.0e}", conditioned(condition, 1.0, *sizes))
    for lam in RIDGES:
        rows += followed(f"ridge, lambda {lam:g}", weak(lam, *sizes))
    report("long_stream", {"d": options.d, "u": options.u, "batches": options.batches}, rows, options.json)


if __name__ == "__main__":
    main()
