"""How long does one whole batch take, state and weight, against plain torch and the AlphaEdit solve?

One problem for all: C_0 = P / L2 with a null-space projector P, some batches written, then batches of u keys in
turns. All of them have to give the same weight (docs/mathematics.md, facts 1 to 3); the error of each against
float64 stands beside its time.
"""

from __future__ import annotations

import math

import torch
from harness import arguments, in_turns, report, summary

import rlsedit_kernels as rk

L2 = 10.0


class PlainTorch:
    """The Woodbury step as one writes it first: two full products, fresh buffers."""

    def __init__(self, C: torch.Tensor, W: torch.Tensor) -> None:
        self.C, self.W = C.clone(), W.clone()

    def __call__(self, K: torch.Tensor, V: torch.Tensor) -> None:
        Y = self.C @ K.T
        L = torch.linalg.cholesky(torch.eye(K.shape[0], dtype=K.dtype) + K @ Y)
        Z = torch.linalg.solve_triangular(L, Y.T, upper=False).T
        self.C = self.C - Z @ Z.T
        gain = self.C @ K.T
        self.W = self.W + gain @ (V - K @ self.W)


class Ops:
    """The fused op and two products for the weight."""

    def __init__(self, C: torch.Tensor, W: torch.Tensor) -> None:
        self.C, self.W = C.clone(), W.clone()

    def __call__(self, K: torch.Tensor, V: torch.Tensor) -> None:
        innovation = torch.addmm(V, K, self.W, alpha=-1.0)
        gain, _ = rk.ops.rls_update_(self.C, K)
        self.W.addmm_(gain, innovation)


class Filter:
    """RLSFilter: the same with all checks, probes, residual and cost; with or without the deviation bounds."""

    def __init__(self, prior: rk.Prior, W: torch.Tensor, track_bounds: bool) -> None:
        self.filter = rk.RLSFilter(W, prior, layout="in_out", form="plain", track_bounds=track_bounds)

    @property
    def C(self) -> torch.Tensor:
        return self.filter.state.covariance()

    @property
    def W(self) -> torch.Tensor:
        return self.filter.weight

    def __call__(self, K: torch.Tensor, V: torch.Tensor) -> None:
        self.filter.update(K, V)


class AlphaEdit:
    """The published solve: P and the cache of K'K are kept, a dense d x d system is solved for every batch."""

    def __init__(self, P: torch.Tensor, W: torch.Tensor) -> None:
        self.P, self.W = P, W.clone()
        self.cache = torch.zeros_like(P)

    def __call__(self, K: torch.Tensor, V: torch.Tensor) -> None:
        E = V - K @ self.W
        gram = K.T @ K
        system = self.P @ (gram + self.cache) + L2 * torch.eye(self.P.shape[0], dtype=K.dtype)
        self.W = self.W + torch.linalg.solve(system, self.P @ (K.T @ E))
        self.cache = self.cache + gram


def relative(got: torch.Tensor, expected: torch.Tensor) -> float:
    return float(torch.linalg.norm(got.double() - expected) / torch.linalg.norm(expected))


def main() -> None:
    parser = arguments(__doc__.splitlines()[0])
    parser.add_argument("--d", type=int, default=4096, help="dimension of a key")
    parser.add_argument("--u", type=int, default=100, help="keys of a batch")
    parser.add_argument("--v", type=int, default=4096, help="outputs")
    parser.add_argument("--repeat", type=int, default=15)
    parser.add_argument("--repeat-alphaedit", type=int, default=3)
    options = parser.parse_args()
    d, u, v = options.d, options.u, options.v
    generator = torch.Generator().manual_seed(0)

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    basis = torch.linalg.qr(randn(d, d * 4 // 5).double())[0]
    prior = rk.Prior.null_space(basis, L2)
    P = (basis @ basis.T).float()
    C, W = prior.factor.covariance().float(), randn(d, v) / math.sqrt(d)
    size = math.sqrt(L2 / (0.8 * d))  # k'C_0 k about 1: a batch tells about as much as was known
    batches = [(randn(u, d) * size, randn(u, v)) for _ in range(4)]

    contenders = {
        "plain torch": PlainTorch(C, W),
        "ops": Ops(C, W),
        "RLSFilter, no bounds": Filter(prior, W, track_bounds=False),
        "RLSFilter": Filter(prior, W, track_bounds=True),
        "AlphaEdit solve": AlphaEdit(P, W),
    }
    exact = PlainTorch(prior.factor.covariance(), W.double())
    errors: dict[str, dict[str, float]] = {name: {} for name in contenders}
    for K, V in batches[:2]:
        exact(K.double(), V.double())
        for step in contenders.values():
            step(K, V)
    for name, step in contenders.items():
        errors[name] = {"error_W": relative(step.W, exact.W)}
        if not isinstance(step, AlphaEdit):
            errors[name]["error_C"] = relative(step.C, exact.C)

    seconds = in_turns(
        {name: (lambda i, step=step: step(*batches[i % 4])) for name, step in contenders.items()},
        {name: options.repeat_alphaedit if name == "AlphaEdit solve" else options.repeat for name in contenders},
    )
    times = {name: summary(values) for name, values in seconds.items()}
    base = times["ops"]["median_ms"]
    rows = [
        {"variant": name, **times[name], "ratio_to_ops": times[name]["median_ms"] / base, **errors[name]}
        for name in contenders
    ]
    settings = {"d": d, "u": u, "v": v, "dtype": "float32", "prior": "null space of rank 4 d / 5, k'C_0 k about 1"}
    report("update", settings, rows, options.json)


if __name__ == "__main__":
    main()
