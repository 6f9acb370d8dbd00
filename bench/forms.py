"""How far is W from a float64 batch solution, by form of the covariance, condition of the prior and size of the keys?

A stream of correlated keys, scaled so that k'C_0 k has the given level; W and S are compared with a float64 batch
solution in the S-norm. This is where the thresholds of form="auto" come from.
"""

from __future__ import annotations

import numpy as np
import torch
from harness import arguments, report

import rlsedit_kernels as rk

GRID = [
    (1e2, 1.0),
    (1e2, 10.0),
    (1e2, 100.0),
    (1e4, 1.0),
    (1e4, 10.0),
    (1e6, 1.0),
    (1e8, 1.0),
    (1e8, 100.0),
    (1e10, 1.0),
]


def stream(condition: float, level: float, form: str, d: int, u: int, batches: int) -> dict[str, object]:
    """One row: error of W after the stream, drift, and where it failed."""
    rng = np.random.default_rng(0)
    Q = np.linalg.qr(rng.standard_normal((d, d)))[0]
    S = (Q * np.logspace(0.0, -np.log10(condition), d)) @ Q.T
    S = 0.5 * (S + S.T)
    C_0, mixing = np.linalg.inv(S), rng.standard_normal((d, d)) * np.logspace(0.0, -1.5, d)
    state = rk.CovarianceState(rk.Prior.precision(S), form=form)
    rhs, W = np.zeros((d, 8)), torch.zeros(d, 8)
    row: dict[str, object] = {"condition": condition, "level": level, "form": form}
    for t in range(batches):
        K = rng.standard_normal((u, d)) @ mixing.T
        K = torch.from_numpy(K * np.sqrt(level / np.einsum("ij,jk,ik->i", K, C_0, K))[:, None]).float()
        V = torch.from_numpy(rng.standard_normal((u, 8))).float()
        try:
            gain = state.update(K)
        except rk.BreakdownError:
            return {**row, "failed_at": t}
        W = W + gain @ (V - K @ W)
        S += (K.double().mT @ K.double()).numpy()
        rhs += (K.double().mT @ V.double()).numpy()
    exact = np.linalg.solve(S, rhs)
    E = W.double().numpy() - exact
    health = state.health()
    return {
        **row,
        "used": f"{health.form} {health.storage.removeprefix('torch.')}",
        "rho": health.rho,
        "error_W": float(np.sqrt(np.sum(E * (S @ E)) / np.sum(exact * (S @ exact)))),
        "drift": health.drift,
        "status": health.status,
        "failed_at": None,
    }


def main() -> None:
    parser = arguments(__doc__.splitlines()[0])
    parser.add_argument("--d", type=int, default=256)
    parser.add_argument("--u", type=int, default=32)
    parser.add_argument("--batches", type=int, default=300)
    options = parser.parse_args()
    rows = [
        stream(condition, level, form, options.d, options.u, options.batches)
        for condition, level in GRID
        for form in ("plain", "whitened", "auto")
    ]
    settings = {"d": options.d, "u": options.u, "batches": options.batches, "dtype": "float32"}
    report("forms", settings, rows, options.json)


if __name__ == "__main__":
    main()
