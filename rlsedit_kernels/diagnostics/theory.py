"""The theorem and the proposition of the paper (arXiv 2601.15686), and the limits of the objective, in numbers.

Nothing is assumed here that is not computed: a weight comes from `RLSFilter`, or from a dense solve where what is
asked is no recursion (a ridge that grows with the stream).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from rlsedit_kernels.diagnostics.keys import Mixing, falling
from rlsedit_kernels.diagnostics.streams import Stream, make_stream
from rlsedit_kernels.diagnostics.truth import Truth
from rlsedit_kernels.filter import RLSFilter
from rlsedit_kernels.priors import Prior


@dataclass(frozen=True)
class Bounds:
    """Fact 7 of docs/mathematics.md after a number of batches; every figure beside its bound.

    Attributes:
        batches: written.
        parameter, parameter_bound: |W_t - W_0| and |E_all| / (2 lambda).
        anchor, anchor_bound: |K_0 (W_t - W_0)| and |E_all| / (2 mu); NaN where the prior has no anchor.
        gain, gain_bound: |C_t K_t'|_2 / sqrt(noise) and 1 / (2 lambda).
        key_bound: of the gain as well, s / (lambda^2 + s^2) with s = |K_t|_2 / sqrt(noise); infinite where s > lambda.
    """

    batches: int
    parameter: float
    parameter_bound: float
    anchor: float
    anchor_bound: float
    gain: float
    gain_bound: float
    key_bound: float

    @property
    def hold(self) -> bool:
        """Whether no figure exceeds its bound by more than rounding."""
        slack = 1.0 + 1e-6
        pairs = ((self.parameter, self.parameter_bound), (self.gain, self.gain_bound), (self.gain, self.key_bound))
        fine = all(value <= slack * bound for value, bound in pairs)
        return fine and (math.isnan(self.anchor) or self.anchor <= slack * self.anchor_bound)


def follow_bounds(stream: Stream, batches: int, at: Sequence[int]) -> list[Bounds]:
    """The bounds along a stream, from the batch solution in float64.

    lambda^2 is the smallest eigenvalue of S_0, forgotten like the rest of it, so that every prior has one.

    Args:
        stream: any.
        batches: how many are written.
        at: numbers of batches to look at.
    """
    truth, prior = Truth(stream), stream.prior
    weak, left, found = 1.0 / math.sqrt(prior.factor.largest), 1.0, []
    for count, batch in enumerate(stream.batches(), start=1):
        truth.add(batch)
        left *= batch.forget
        if count in at:
            exact, K = truth.now(), batch.K.to(torch.float64)
            lam, E = weak * math.sqrt(left), math.sqrt(truth.innovations)
            gain = float(torch.linalg.matrix_norm(exact.C @ K.mT, 2)) / math.sqrt(batch.noise)
            s = float(torch.linalg.matrix_norm(K, 2)) / math.sqrt(batch.noise)
            anchor, anchor_bound = _anchor(prior, exact.shift, left, E)
            found.append(
                Bounds(
                    batches=count,
                    parameter=float(exact.shift.norm()),
                    parameter_bound=E / (2.0 * lam),
                    anchor=anchor,
                    anchor_bound=anchor_bound,
                    gain=gain,
                    gain_bound=1.0 / (2.0 * lam),
                    key_bound=s / (lam**2 + s**2) if s <= lam else math.inf,
                )
            )
        if count == batches:
            break
    return found


def _anchor(prior: Prior, shift: torch.Tensor, left: float, errors: float) -> tuple[float, float]:
    """|K_0 (W - W_0)|, from the second moment K_0'K_0, and its bound."""
    if not prior.mu:
        return math.nan, math.nan
    if prior.kind == "anchor_keys":
        moved = float((prior.arrays["K0"] @ shift).norm())
    else:
        moved = math.sqrt(max(float((shift * (prior.arrays["second_moment"] @ shift)).sum()), 0.0))
    return moved, errors / (2.0 * prior.mu * math.sqrt(left))


def consistency(
    d: int = 32, u: int = 8, v: int = 4, batches: int = 3000, *, at: Sequence[int], seed: int = 0
) -> dict[str, list[tuple[float, float]]]:
    """Distances of W_t from where the proposition says that it goes, with targets K W + noise of one W.

    Returns:
        By name, pairs (batches, relative distance): "lambda fixed" from W by `RLSFilter` in float32; "lambda^2 = t"
        from the minimiser of the population with that ridge; "lambda^2 = t^1.5" from W_0; "mu^2 = t^1.5" of the
        anchored map K_0 W_t from K_0 W_0.
    """
    stream = make_stream("consistent", d, u, v, seed)
    assert stream.population is not None
    W, W_0 = stream.population, torch.zeros(d, v, dtype=torch.float64, device="cpu")
    generator = torch.Generator().manual_seed(seed + 77)
    K_0 = torch.randn(d // 4, d, dtype=torch.float64, device="cpu", generator=generator)
    M = K_0.mT @ K_0
    rls = RLSFilter(stream.W_0, stream.prior, layout="in_out")
    S, rhs = torch.zeros(d, d, dtype=torch.float64, device="cpu"), torch.zeros(d, v, dtype=torch.float64, device="cpu")
    second = _second_moment(d, seed) * u
    eye, size = torch.eye(d, dtype=torch.float64, device="cpu"), float(W.norm())
    tempered = torch.linalg.solve(second + eye, second @ W)
    found: dict[str, list[tuple[float, float]]] = {}
    for count, batch in enumerate(stream.batches(), start=1):
        rls.update(batch.K, batch.V)
        K, V = batch.K.to(torch.float64), batch.V.to(torch.float64)
        S.addmm_(K.mT, K)
        rhs.addmm_(K.mT, V)
        if count in at:
            grown = float(count) ** 1.5
            anchored = torch.linalg.solve(S + eye + grown * M, rhs)
            distances = {
                "lambda fixed": float((rls.weight.double() - W).norm()) / size,
                "lambda^2 = t": float((torch.linalg.solve(S + count * eye, rhs) - tempered).norm()) / size,
                "lambda^2 = t^1.5": float((torch.linalg.solve(S + grown * eye, rhs) - W_0).norm()) / size,
                "mu^2 = t^1.5": float((K_0 @ (anchored - W_0)).norm() / (K_0 @ W).norm()),
            }
            for name, distance in distances.items():
                found.setdefault(name, []).append((count, distance))
        if count == batches:
            break
    return found


def _second_moment(d: int, seed: int) -> torch.Tensor:
    """E[k k'] of the keys of the stream "consistent", which are not quite Gaussian: |k|^2 = d.

    By 100,000 draws of the same rule from another seed.
    """
    mixing = Mixing(d, torch.Generator().manual_seed(1000 * seed + 2))
    X = torch.randn(100_000, d, dtype=torch.float64, device="cpu", generator=torch.Generator().manual_seed(seed + 991))
    X = X * falling(d, 0.5)
    X = X * (d**0.5 / X.norm(dim=1, keepdim=True))
    K = mixing.rows(X)
    return K.mT @ K / len(K)


def limits(
    values: Sequence[float], d: int = 32, u: int = 8, v: int = 4, batches: int = 6, seed: int = 0
) -> dict[str, list[tuple[float, float]]]:
    """What is left of a stream as one number grows, by `RLSFilter` in float64.

    Args:
        values: of lambda, of mu, and of 1 / noise.

    Returns:
        By name, pairs (value, figure): "lambda" |W_t - W_0|, "mu" |K_0 (W_t - W_0)| and "1 / noise" |V - K W_t| of all
        batches, each relative to what it is with the first value.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, dtype=torch.float64, device="cpu", generator=generator)

    written = [(normal(u, d) / d**0.5, normal(u, v)) for _ in range(max(1, min(batches, d // (2 * u))))]
    W_0, K_0 = normal(d, v), normal(d // 4, d)

    def ended(prior: Prior, noise: float = 1.0) -> torch.Tensor:
        rls = RLSFilter(W_0, prior, layout="in_out")
        for K, V in written:
            rls.update(K, V, noise)
        return rls.weight

    found: dict[str, list[tuple[float, float]]] = {"lambda": [], "mu": [], "1 / noise": []}
    for value in values:
        found["lambda"].append((value, float((ended(Prior.ridge(d, value)) - W_0).norm())))
        anchored = ended(Prior.anchor_keys(K_0, mu=value, lam=1.0)) - W_0
        found["mu"].append((value, float((K_0 @ anchored).norm())))
        W = ended(Prior.ridge(d, 1.0), 1.0 / value)
        found["1 / noise"].append((value, math.sqrt(sum(float((V - K @ W).square().sum()) for K, V in written))))
    return {name: [(x, y / pairs[0][1]) for x, y in pairs] for name, pairs in found.items()}


def slope(pairs: Sequence[tuple[float, float]]) -> float:
    """Slope of log y over log x, least squares."""
    x = torch.tensor([math.log(a) for a, _ in pairs], dtype=torch.float64, device="cpu")
    y = torch.tensor([math.log(b) for _, b in pairs], dtype=torch.float64, device="cpu")
    x = x - x.mean()
    return float((x * (y - y.mean())).sum() / x.square().sum())
