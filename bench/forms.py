"""How far is W from a float64 batch solution, by form of the covariance, prior and size of the keys?

Two kinds of streams, both of correlated keys: under a prior of a given condition, keys scaled so that k'C_0 k has a
given level; under a ridge, keys with |k|^2 = 500, so that the level is 500 / lam^2. W and S are compared with a float64
batch solution in the S-norm. This is where the thresholds of form="auto" come from, and the coordinates of the inverse
root, which is measured in both.
"""

from __future__ import annotations

import numpy as np
import torch
from harness import arguments, report

import rlsedit_kernels as rk
from rlsedit_kernels.states import inverse_root

CONDITIONS = [
    (1e2, 1.0),
    (1e2, 10.0),
    (1e2, 100.0),
    (1e4, 1.0),
    (1e4, 10.0),
    (1e4, 100.0),
    (1e5, 1.0),
    (1e5, 100.0),
    (1e6, 1.0),
    (1e6, 100.0),
    (1e8, 1.0),
    (1e8, 100.0),
    (1e10, 1.0),
    (1e10, 100.0),
]
RIDGES = [3.0, 1.0, 0.3, 0.1, 0.03, 0.01, 0.003, 0.001]
KEY = 500.0
FORMS = {
    "plain": ("plain", None),
    "whitened": ("whitened", None),
    "inverse_root": ("inverse_root", None),
    "inverse_root, keys": ("inverse_root", float("inf")),
    "inverse_root, whitened": ("inverse_root", 0.0),
    "auto": ("auto", None),
}
"""Form, and what to put in the place of `inverse_root.MAPPED_FROM` to force coordinates."""

Rows = tuple[rk.Prior, np.ndarray, list[tuple[torch.Tensor, torch.Tensor]]]


def conditioned(condition: float, level: float, d: int, u: int, batches: int) -> Rows:
    """Prior, its S and batches (K, V), every k'C_0 k = level."""
    rng = np.random.default_rng(0)
    Q = np.linalg.qr(rng.standard_normal((d, d)))[0]
    S = (Q * np.logspace(0.0, -np.log10(condition), d)) @ Q.T
    S = 0.5 * (S + S.T)
    C_0, mixing = np.linalg.inv(S), rng.standard_normal((d, d)) * np.logspace(0.0, -1.5, d)
    stream = []
    for _ in range(batches):
        K = rng.standard_normal((u, d)) @ mixing.T
        K = torch.from_numpy(K * np.sqrt(level / np.einsum("ij,jk,ik->i", K, C_0, K))[:, None]).float()
        stream.append((K, torch.from_numpy(rng.standard_normal((u, 8))).float()))
    return rk.Prior.precision(S), S, stream


def weak(lam: float, d: int, u: int, batches: int) -> Rows:
    """A ridge, its S and batches (K, V), every |k|^2 = `KEY`."""
    rng = np.random.default_rng(0)
    mixing = rng.standard_normal((d, d)) * np.logspace(0.0, -2.0, d)
    stream = []
    for _ in range(batches):
        K = rng.standard_normal((u, d)) @ mixing.T
        K = torch.from_numpy(K * np.sqrt(KEY) / np.linalg.norm(K, axis=1, keepdims=True)).float()
        stream.append((K, torch.from_numpy(rng.standard_normal((u, 8))).float()))
    return rk.Prior.ridge(d, lam), np.eye(d) * lam**2, stream


def followed(rows: Rows, variant: str) -> dict[str, object]:
    """Error of W after the stream, drift, and where it failed."""
    prior, S, stream = rows
    form, mapped_from = FORMS[variant]
    kept = inverse_root.MAPPED_FROM
    inverse_root.MAPPED_FROM = kept if mapped_from is None else mapped_from
    try:
        state, S = rk.CovarianceState(prior, form=form, guard="off"), S.copy()
        rhs, W = np.zeros((len(S), 8)), torch.zeros(len(S), 8)
        for t, (K, V) in enumerate(stream):
            try:
                gain = state.update(K)
            except rk.BreakdownError:
                return {"form": variant, "failed_at": t}
            W = W + gain @ (V - K @ W)
            S += (K.double().mT @ K.double()).numpy()
            rhs += (K.double().mT @ V.double()).numpy()
    finally:
        inverse_root.MAPPED_FROM = kept
    exact = np.linalg.solve(S, rhs)
    E = W.double().numpy() - exact
    health = state.health()
    return {
        "form": variant,
        "used": f"{health.form} {health.storage.removeprefix('torch.')}",
        "rho": health.rho,
        "error_W": float(np.sqrt(np.sum(E * (S @ E)) / np.sum(exact * (S @ exact)))),
        "drift": health.drift,
        "careful_steps": health.careful_steps,
        "status": health.status,
        "failed_at": None,
    }


def main() -> None:
    parser = arguments(__doc__.splitlines()[0])
    parser.add_argument("--d", type=int, default=256)
    parser.add_argument("--u", type=int, default=32)
    parser.add_argument("--batches", type=int, default=300)
    options = parser.parse_args()
    sizes = options.d, options.u, options.batches
    rows: list[dict[str, object]] = []
    for condition, level in CONDITIONS:
        problem = conditioned(condition, level, *sizes)
        rows += [{"condition": condition, "level": level, **followed(problem, form)} for form in FORMS]
    for lam in RIDGES:
        problem = weak(lam, *sizes)
        rows += [{"lam": lam, "level": KEY / lam**2, **followed(problem, form)} for form in FORMS]
    settings = {"d": options.d, "u": options.u, "batches": options.batches, "dtype": "float32"}
    report("forms", settings, rows, options.json)


if __name__ == "__main__":
    main()
