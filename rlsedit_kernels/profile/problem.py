"""The problem that all contenders are given: a layer, its priors, and batches of which all have the same difficulty."""

from __future__ import annotations

import math
from functools import cached_property

import torch

from rlsedit_kernels.priors import Prior
from rlsedit_kernels.priors.factor import PriorFactor

__all__ = ["Problem"]

CONDITION = 1e4
"""Of the anchor. Second moments of SmolLM2's keys have 4e2 to 1e3; time does not depend on it, error does."""

NULL = 0.8
"""Fraction of the directions that AlphaEdit's projector leaves free."""

_REFLECTIONS = 4
_BATCHES = 4


def _known(device: torch.device | str) -> torch.device:
    """A device whose clock is read rightly.

    Raises:
        ValueError: it is neither a CPU nor a CUDA device, or it is not there.
    """
    found = torch.device(device)
    if found.type not in ("cpu", "cuda"):
        raise ValueError(f"Problem: device must be a CPU or a CUDA device, got {str(device)!r}")
    if found.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"Problem: device {str(device)!r} is not there: torch finds no CUDA device")
    return found


def _mark(a: torch.Tensor) -> int:
    """The sum of all bits as whole numbers: changes with the values, whoever wrote them."""
    whole = torch.int32 if a.element_size() == 4 else torch.int64
    return int(a.detach().view(whole).sum(dtype=torch.int64))


def check_sizes(d: int, v: int, u: int, layers: int = 1, dtype: torch.dtype = torch.float32) -> None:
    """Refuse what `Problem` cannot be made of, without making it.

    Raises:
        TypeError, ValueError: an argument does not fit.
    """
    for name, value, least in (("d", d, 8), ("v", v, 1), ("u", u, 1), ("layers", layers, 1)):
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ValueError(f"Problem: {name} must be an int of at least {least}, got {value!r}")
    if dtype not in (torch.float32, torch.float64):
        raise TypeError(f"Problem: dtype must be torch.float32 or torch.float64, got {dtype}")


def least_bytes(d: int, v: int, u: int, dtype: torch.dtype) -> tuple[float, float]:
    """What a `Problem` takes at least: of its device, and of the host while its weight is drawn, twice in float32."""
    return float(dtype.itemsize * (d * v + _BATCHES * u * (d + v))), 8.0 * d * v


def solution_bytes(d: int, v: int) -> float:
    """What `Problem.exact` takes at least: C and a copy of it while it is made, then W, in float64."""
    return max(16.0 * d * d, 8.0 * d * d + 8.0 * d * v)


class Problem:
    """One edited layer and a stream of batches, the same numbers in every precision and on every device.

    The priors have known factors, so that nothing has to be factored to begin: with H a product of Householder
    reflections, the anchor is S_0 = H diag(s) H' with geometric s from 1 down to 1e-4, and AlphaEdit's projector is
    P = H diag(1 .. 1, 0 .. 0) H' of rank 0.8 d. Keys are scaled so that k'C_0 k is about 1: a batch tells about as
    much as was known.

    Args:
        d: dimension of a key, >= 8.
        v: dimension of a value, >= 1.
        u: keys of a batch, >= 1.
        layers: layers that each batch is written to, one problem each with the same numbers.
        dtype: torch.float32 or torch.float64, of weights, keys and states.
        device: where it all lives.
        seed: of all random numbers.

    Raises:
        TypeError, ValueError: an argument does not fit.

    Attributes:
        weight: W_0 (d, v) in row form.
        batches: keys (u, d) and targets (u, v); batch i of a stream is `batch(i)`.
    """

    def __init__(
        self,
        d: int,
        v: int,
        u: int,
        *,
        layers: int = 1,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        seed: int = 0,
    ) -> None:
        check_sizes(d, v, u, layers, dtype)
        self.d, self.v, self.u, self.layers = d, v, u, layers
        self.dtype, self.device, self.seed = dtype, _known(device), seed
        self._size = math.sqrt(1.0 / float((1.0 / self.spectrum).sum()))
        self._mirrors, self.weight, self.batches = self._drawn()
        self._marks = [_mark(one) for _, one in self._given()]

    def _drawn(self) -> tuple[list[torch.Tensor], torch.Tensor, list[tuple[torch.Tensor, torch.Tensor]]]:
        """Reflections, the first weight and the batches, from the seed."""
        generator = torch.Generator().manual_seed(self.seed)

        def randn(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float32, device="cpu")

        mirrors = [self._unit(randn(self.d)) for _ in range(_REFLECTIONS)]
        weight = self._own(randn(self.d, self.v) / math.sqrt(self.d))
        batches = [
            (self._own(randn(self.u, self.d) * self._size), self._own(randn(self.u, self.v))) for _ in range(_BATCHES)
        ]
        return mirrors, weight, batches

    def _given(self) -> list[tuple[str, torch.Tensor]]:
        """What all contenders are given, by the name that a step knows it by."""
        return [("problem.weight", self.weight), *((n, a) for b in self.batches for n, a in zip("KV", b, strict=True))]

    def restore(self) -> tuple[str, ...]:
        """Undo what a step has written to the weight and the batches, which other contenders are given too.

        Returns:
            Names of what was not as it was drawn: "problem.weight", "K", "V".
        """
        given = self._given()
        changed = [i for i, (_, one) in enumerate(given) if _mark(one) != self._marks[i]]
        if changed:
            _, weight, batches = self._drawn()
            first = [weight, *(one for batch in batches for one in batch)]
            for i in changed:
                given[i][1].detach().copy_(first[i])
        return tuple(dict.fromkeys(given[i][0] for i in changed))

    @property
    def spectrum(self) -> torch.Tensor:
        """Eigenvalues s (d,) of the anchor S_0, float64."""
        return torch.logspace(0.0, -math.log10(CONDITION), self.d, dtype=torch.float64, device="cpu")

    def batch(self, i: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys (u, d) and targets (u, v) of batch i of the stream; they come again after a while."""
        return self.batches[i % len(self.batches)]

    @cached_property
    def prior(self) -> Prior:
        """The anchor S_0 with its factor; the matrix itself is not in it (`information`)."""
        roots = self.spectrum.sqrt()
        H = self._orthogonal()
        root_inverse = (H * roots).mT.contiguous()
        H /= roots
        factor = PriorFactor(self.d, self.d, None, H, root_inverse, CONDITION, 1.0, "eigen")
        prior = Prior("anchor", self.d, {}, lam=math.sqrt(1.0 / CONDITION), mu=1.0)
        prior.__dict__["factor"] = factor  # known by construction: nothing to compute
        return prior

    def information(self) -> torch.Tensor:
        """S_0 (d, d) float64 on the device."""
        return self._conjugated(self.spectrum).to(self.device)

    def covariance(self) -> torch.Tensor:
        """C_0 = S_0^-1 (d, d), dtype of the problem, rounded once."""
        return self._own(self._conjugated(1.0 / self.spectrum))

    def projector(self) -> torch.Tensor:
        """P (d, d), dtype of the problem, rounded once."""
        return self._own(self._conjugated(self._mask()))

    def null_basis(self) -> torch.Tensor:
        """N (d, r), dtype of the problem, orthonormal: P = N N', r = `free`."""
        return self._own(self._orthogonal()[:, : self.free].contiguous())

    @property
    def l2(self) -> float:
        """AlphaEdit's ridge; C_0 = P / l2."""
        return self._size**2 * self.free

    @property
    def free(self) -> int:
        """Rank of the projector."""
        return max(1, int(NULL * self.d))

    def exact(self, batches: int, prior: str = "anchor") -> torch.Tensor:
        """W (d, v) after some batches from the float64 recursion, for C_0 of the anchor or P / L2 ("null_space")."""
        C = self._conjugated(1.0 / self.spectrum if prior == "anchor" else self._mask() / self.l2).to(self.device)
        W = self.weight.double()
        for i in range(batches):
            K, V = (a.double() for a in self.batch(i))
            Y = C @ K.mT
            factor = torch.linalg.cholesky(torch.eye(self.u, dtype=C.dtype, device=C.device) + K @ Y)
            W += torch.cholesky_solve(Y.mT, factor).mT @ (V - K @ W)
            if i + 1 < batches:
                Z = torch.linalg.solve_triangular(factor, Y.mT, upper=False)
                C.addmm_(Z.mT, Z, alpha=-1.0)
        return W

    def settings(self) -> dict[str, object]:
        """What the problem was, for a result."""
        return {
            "d": self.d,
            "v": self.v,
            "u": self.u,
            "layers": self.layers,
            "dtype": str(self.dtype).removeprefix("torch."),
            "device": str(self.device),
            "seed": self.seed,
        }

    def _own(self, a: torch.Tensor) -> torch.Tensor:
        return a.to(device=self.device, dtype=self.dtype)

    @staticmethod
    def _unit(x: torch.Tensor) -> torch.Tensor:
        return x.double() / x.double().norm()

    def _orthogonal(self) -> torch.Tensor:
        """H (d, d) float64, dense and orthogonal."""
        H = torch.eye(self.d, dtype=torch.float64, device="cpu")
        for w in self._mirrors:
            H.addr_(w, w @ H, alpha=-2.0)
        return H

    def _conjugated(self, values: torch.Tensor) -> torch.Tensor:
        """H diag(values) H' (d, d) float64, exactly symmetric, in O(d^2)."""
        A = torch.diag(values)
        for w in self._mirrors:
            image = A @ w
            step = 2.0 * image - 2.0 * (w @ image) * w
            A.addr_(w, step, alpha=-1.0).addr_(step, w, alpha=-1.0)
        return A.add_(A.mT.clone()).mul_(0.5)

    def _mask(self) -> torch.Tensor:
        return (torch.arange(self.d, device="cpu") < self.free).double()
