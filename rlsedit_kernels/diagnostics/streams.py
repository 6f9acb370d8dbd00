"""Streams of batches that are hard in one way each, from a seed, at O(d u) a batch; their truth can be worked out.

Keys and targets are values of float32, so that every dtype sees the same numbers. Targets are random unless said
otherwise: nothing about them is easy, and |W_t - W_0| in the S-norm does not grow with the stream.
"""

from __future__ import annotations

import math
import re
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from rlsedit_kernels.diagnostics.keys import Mixing, falling, of_length
from rlsedit_kernels.priors import Prior

KEY = 500.0
"""|k|^2 of the keys under a ridge, about that of an MLP's inner activations."""


@dataclass(frozen=True)
class Batch:
    """K (u, d) and V (u, v), float32; noise > 0; forget in (0, 1]."""

    K: torch.Tensor
    V: torch.Tensor
    noise: float = 1.0
    forget: float = 1.0


@dataclass(frozen=True)
class Stream:
    """A prior, a first weight, and batches that can be gone through again and again.

    Attributes:
        name: as `make_stream` takes it.
        summary: one line on what is hard about it.
        prior: S_0.
        W_0: (d, v) float32.
        batches: starts the stream anew; may be endless.
        population: (d, v) float64, the W that targets were made with (zero where they are random); None if unknown.
    """

    name: str
    summary: str
    prior: Prior
    W_0: torch.Tensor
    batches: Callable[[], Iterator[Batch]]
    population: torch.Tensor | None = None

    @property
    def d(self) -> int:
        """Dimension of a key."""
        return self.prior.d

    @property
    def v(self) -> int:
        """Dimension of a target."""
        return self.W_0.shape[1]


@dataclass(frozen=True)
class Size:
    """Dimensions of a stream: d of a key, u keys a batch, v of a target; and its seed."""

    d: int
    u: int
    v: int
    seed: int

    def generator(self, offset: int = 0) -> torch.Generator:
        return torch.Generator().manual_seed(1000 * self.seed + offset)

    def normal(self, generator: torch.Generator, rows: int | None = None) -> torch.Tensor:
        return torch.randn(rows or self.u, self.d, dtype=torch.float64, device="cpu", generator=generator)


Keys = Callable[[torch.Generator, int], torch.Tensor]
"""(generator, t) -> keys (u, d) of batch t, float64."""

_CONDITION = re.compile(r"condition-(\d+(?:\.\d+)?(?:e[+-]?\d+)?)")


def make_stream(name: str, d: int, u: int, v: int = 4, seed: int = 0) -> Stream:
    """The stream of that name.

    Args:
        name: one of `STREAMS`, or "condition-X" with X >= 1, the condition of the prior.
        d, u, v: dimensions of a key, a batch and a target.
        seed: of everything random.

    Raises:
        ValueError: no such stream, or sizes below 1 (d below 2).
    """
    if d < 2 or u < 1 or v < 1:
        raise ValueError(f"make_stream: sizes must be d >= 2, u >= 1, v >= 1, got d = {d}, u = {u}, v = {v}")
    size = Size(d, u, v, seed)
    if name in STREAMS:
        summary, make = STREAMS[name]
        return make(name, summary, size)
    match = _CONDITION.fullmatch(name)
    if match is None or not 1.0 <= float(match[1]) < math.inf:
        raise ValueError(
            f"make_stream: name must be condition-X with X >= 1, or one of {', '.join(STREAMS)}; got {name!r}"
        )
    return _conditioned(float(match[1]), 1.0)(name, f"prior of condition {float(match[1]):.0e}, k'C_0 k = 1", size)


def _stream(
    name: str,
    summary: str,
    size: Size,
    prior: Prior,
    keys: Keys,
    *,
    targets: Callable[[torch.Generator, int, torch.Tensor], torch.Tensor] | None = None,
    noise: Callable[[int], float] = lambda _t: 1.0,
    forget: float = 1.0,
    population: torch.Tensor | None = None,
) -> Stream:
    """A stream from rules for its keys, targets and noise."""

    def random(generator: torch.Generator, _t: int, K: torch.Tensor) -> torch.Tensor:
        V = torch.randn(K.shape[0], size.v, dtype=torch.float64, device="cpu", generator=generator)
        return V if population is None else V + K @ population

    rule = targets or random

    def batches() -> Iterator[Batch]:
        generator, t = size.generator(1), 0
        while True:
            K = keys(generator, t).to(torch.float32)
            V = rule(generator, t, K.to(torch.float64)).to(torch.float32)
            yield Batch(K, V, noise(t), forget)
            t += 1

    known = (
        torch.zeros(size.d, size.v, dtype=torch.float64, device="cpu")
        if targets is None and population is None
        else population
    )
    return Stream(name, summary, prior, torch.zeros(size.d, size.v, device="cpu"), batches, known)


def _spread(size: Size, decades: float, squared: float) -> Keys:
    """Keys of length sqrt(squared) whose standard deviations fall over `decades`, in mixed directions."""
    mixing, sigma = Mixing(size.d, size.generator(2)), falling(size.d, decades)
    return lambda generator, _t: of_length(mixing.rows(size.normal(generator) * sigma), squared)


Make = Callable[[str, str, Size], Stream]


def _ridge(lam: float, decades: float = 2.0) -> Make:
    def make(name: str, summary: str, size: Size) -> Stream:
        return _stream(name, summary, size, Prior.ridge(size.d, lam), _spread(size, decades, KEY))

    return make


def _conditioned(condition: float, level: float, shape: str = "geometric") -> Make:
    """A prior of a given condition and spectrum; every key with k'C_0 k = level."""

    def make(name: str, summary: str, size: Size) -> Stream:
        values = _spectrum(size.d, condition, shape)
        mixing, inner, sigma = (
            Mixing(size.d, size.generator(3)),
            Mixing(size.d, size.generator(2)),
            falling(size.d, 1.5),
        )

        def keys(generator: torch.Generator, _t: int) -> torch.Tensor:
            K = inner.rows(size.normal(generator) * sigma)
            energy = (mixing.rows_transposed(K).square() / values).sum(dim=1, keepdim=True)
            return K * (level / energy).sqrt()

        return _stream(name, summary, size, Prior.precision(mixing.matrix(values)), keys)

    return make


def _spectrum(d: int, condition: float, shape: str) -> torch.Tensor:
    """Eigenvalues from 1 to 1 / condition: geometric, a few massive ones above a floor, or a few weak ones below."""
    if shape == "geometric":
        return torch.logspace(0.0, -torch.tensor(condition).log10().item(), d, dtype=torch.float64, device="cpu")
    few = max(1, d // 64)
    values = torch.full((d,), 1.0 / condition if shape == "massive" else 1.0, dtype=torch.float64, device="cpu")
    values[:few] = 1.0 if shape == "massive" else 1.0 / condition
    return values


def _anchored(name: str, summary: str, size: Size) -> Stream:
    """15,000 x the second moment of the keys themselves: the papers' setting."""
    mixing, sigma = Mixing(size.d, size.generator(2)), falling(size.d, 1.3)
    scale = (KEY / float(sigma.square().sum())) ** 0.5
    moment = mixing.matrix((scale * sigma).square())
    prior = Prior.anchor(15_000.0 * moment, mu=1.0)
    return _stream(name, summary, size, prior, lambda g, _t: mixing.rows(size.normal(g) * sigma * scale))


def _correlated(name: str, summary: str, size: Size) -> Stream:
    """Every key 0.99 of the one before it: a slow walk through key space."""
    mixing, sigma = Mixing(size.d, size.generator(2)), falling(size.d, 1.0)
    last: weakref.WeakKeyDictionary[torch.Generator, torch.Tensor] = (
        weakref.WeakKeyDictionary()
    )  # one each time through

    def keys(generator: torch.Generator, t: int) -> torch.Tensor:
        now = size.normal(generator, 1)[0] if t == 0 else last[generator]
        rows = []
        for fresh in size.normal(generator):
            now = 0.99 * now + (1.0 - 0.99**2) ** 0.5 * fresh
            rows.append(now)
        last[generator] = now
        return of_length(mixing.rows(torch.stack(rows) * sigma), KEY)

    return _stream(name, summary, size, Prior.ridge(size.d, 1.0), keys)


def _repeated(name: str, summary: str, size: Size) -> Stream:
    """Two batches of keys, written over and over."""
    pool = of_length(size.normal(size.generator(4), 2 * size.u), KEY)
    return _stream(
        name, summary, size, Prior.ridge(size.d, 1.0), lambda _g, t: pool[: size.u] if t % 2 else pool[size.u :]
    )


def _nearly_dependent(name: str, summary: str, size: Size) -> Stream:
    """Keys of a batch that differ by a part in 10,000."""

    def keys(generator: torch.Generator, _t: int) -> torch.Tensor:
        common = size.normal(generator, 1)
        return of_length(common + 1e-4 * size.normal(generator), KEY)

    return _stream(name, summary, size, Prior.ridge(size.d, 1.0), keys)


def _sized(low: float, high: float, lam: float) -> Make:
    """Keys of lengths spread evenly over the decades from `low` to `high`."""

    def make(name: str, summary: str, size: Size) -> Stream:
        def keys(generator: torch.Generator, _t: int) -> torch.Tensor:
            K = of_length(size.normal(generator), 1.0)
            at = torch.rand(size.u, 1, dtype=torch.float64, device="cpu", generator=generator)
            return K * (low * (high / low) ** at)

        return _stream(name, summary, size, Prior.ridge(size.d, lam), keys)

    return make


def _conflict(name: str, summary: str, size: Size) -> Stream:
    """The same keys, now to V and now to -V."""
    generator = size.generator(4)
    pool = of_length(size.normal(generator, size.d), KEY)
    wanted = torch.randn(size.d, size.v, dtype=torch.float64, device="cpu", generator=generator)
    at: dict[int, torch.Tensor] = {}

    def keys(source: torch.Generator, t: int) -> torch.Tensor:
        at.clear()
        at[t] = torch.randint(size.d, (size.u,), generator=source, device="cpu")
        return pool[at[t]]

    def targets(_source: torch.Generator, t: int, _K: torch.Tensor) -> torch.Tensor:
        return wanted[at[t]] * (1.0 if t % 2 else -1.0)

    return _stream(name, summary, size, Prior.ridge(size.d, 1.0), keys, targets=targets)


def _consistent(name: str, summary: str, size: Size) -> Stream:
    population = (
        torch.randn(size.d, size.v, dtype=torch.float64, device="cpu", generator=size.generator(5)) / size.d**0.5
    )
    keys = _spread(size, 0.5, float(size.d))
    return _stream(name, summary, size, Prior.ridge(size.d, 1.0), keys, population=population)


def _noisy(first: float, factor: float, last: float) -> Make:
    """Noise that changes by `factor` with every batch, up or down to `last`."""

    def make(name: str, summary: str, size: Size) -> Stream:
        limit = max if factor < 1.0 else min
        return _stream(
            name, summary, size, Prior.ridge(size.d, 1.0), _spread(size, 1.0, KEY),
            noise=lambda t: limit(first * factor ** min(t, 10**5), last),
        )  # fmt: skip

    return make


def _forgetting(forget: float, excited: float) -> Make:
    """Forgetting; keys move in a fraction of all directions only, so that the rest of C grows as 1 / forget^t."""

    def make(name: str, summary: str, size: Size) -> Stream:
        mixing = Mixing(size.d, size.generator(2))
        sigma = torch.zeros(size.d, dtype=torch.float64, device="cpu")
        sigma[: max(1, round(excited * size.d))] = 1.0

        def keys(generator: torch.Generator, _t: int) -> torch.Tensor:
            return of_length(mixing.rows(size.normal(generator) * sigma), KEY)

        return _stream(name, summary, size, Prior.ridge(size.d, 10.0), keys, forget=forget)

    return make


STREAMS: dict[str, tuple[str, Make]] = {
    "easy": ("a strong ridge, keys in all directions alike", _ridge(10.0, 0.0)),
    "anchored": ("15,000 x the second moment of the keys, the papers' setting", _anchored),
    "condition-1": ("prior of condition 1, k'C_0 k = 1", _conditioned(1.0, 1.0)),
    "condition-1e4": ("prior of condition 1e4, k'C_0 k = 1", _conditioned(1e4, 1.0)),
    "condition-1e6": ("prior of condition 1e6, k'C_0 k = 1", _conditioned(1e6, 1.0)),
    "condition-1e8": ("prior of condition 1e8, k'C_0 k = 1", _conditioned(1e8, 1.0)),
    "condition-1e10": ("prior of condition 1e10, k'C_0 k = 1", _conditioned(1e10, 1.0)),
    "condition-1e12": ("prior of condition 1e12, k'C_0 k = 1", _conditioned(1e12, 1.0)),
    "loud-1e8": ("prior of condition 1e8, k'C_0 k = 100", _conditioned(1e8, 100.0)),
    "massive-1e8": ("one direction in 64 with 1e8 times the precision", _conditioned(1e8, 1.0, "massive")),
    "cliff-1e8": ("one direction in 64 with 1e-8 of the precision (nearly singular)", _conditioned(1e8, 1.0, "cliff")),
    "weak-1": ("ridge, lambda 1, |k|^2 = 500, spread over two decades", _ridge(1.0)),
    "weak-0.1": ("ridge, lambda 0.1", _ridge(0.1)),
    "weak-0.01": ("ridge, lambda 0.01", _ridge(0.01)),
    "weak-0.001": ("ridge, lambda 0.001: nearly a hard write", _ridge(0.001)),
    "correlated": ("every key 0.99 of the one before it", _correlated),
    "repeated": ("two batches of keys, over and over, with new targets", _repeated),
    "dependent": ("keys of a batch differ by a part in 10,000", _nearly_dependent),
    "huge": ("keys of length 10 to 10,000", _sized(1e1, 1e4, 1.0)),
    "tiny": ("keys of length 1e-6 to 1e-3", _sized(1e-6, 1e-3, 1.0)),
    "mixed": ("keys of length 1e-4 to 1e4", _sized(1e-4, 1e4, 1.0)),
    "conflict": ("the same keys, now to V and now to -V", _conflict),
    "consistent": ("targets K W + noise of one W: W_t tends to it", _consistent),
    "growing-noise": ("noise from 1 up to 1e8, half a percent more a batch", _noisy(1.0, 1.005, 1e8)),
    "falling-noise": ("noise from 1 down to 1e-6, half a percent less a batch", _noisy(1.0, 0.995, 1e-6)),
    "forgetting": ("forgetting factor 0.999, all directions excited", _forgetting(0.999, 1.0)),
    "wind-up": ("forgetting factor 0.999, half of the directions never excited", _forgetting(0.999, 0.5)),
}  # fmt: skip
