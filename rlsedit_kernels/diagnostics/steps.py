"""What a trial follows: any object that writes batches. Ours by form, and published sequences in plain torch.

A step is written by its author; only `update` and `weight` are needed:

    class MyEditor:
        def __init__(self, stream): ...                                   # stream.prior, stream.W_0 (d, v)
        def update(self, K, V, noise, forget) -> None: ...                # K (u, d), V (u, v) float32; raise to refuse
        weight: Tensor                                                    # (d, v), the weight as it is now
        def covariance(self) -> Tensor: ...                               # optional, (d, d): errors of C and gain
        def health(self) -> Health: ...                                   # optional: status and drift

Batches lie where W_0 lies, on the device that `run_trials` was given; the prior lies on the CPU.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol, runtime_checkable

import torch

from rlsedit_kernels.diagnostics.streams import Stream
from rlsedit_kernels.filter import RLSFilter
from rlsedit_kernels.states import Health


class Step(Protocol):
    """The least that a trial needs of an editor's step."""

    @property
    def weight(self) -> torch.Tensor:
        """W (d, v) as it is."""

    def update(self, K: torch.Tensor, V: torch.Tensor, noise: float, forget: float) -> None:
        """Write a batch; an exception ends the trial."""


@runtime_checkable
class HasCovariance(Protocol):
    """A step that can show its covariance."""

    def covariance(self) -> torch.Tensor:
        """C (d, d)."""


@runtime_checkable
class HasHealth(Protocol):
    """A step that knows how accurate it is."""

    def health(self) -> Health:
        """Status and measures."""


MakeStep = Callable[[Stream], Step]


class FilterStep:
    """`RLSFilter` as a step.

    Args:
        stream: gives the prior and the first weight.
        arguments: of `RLSFilter`, such as form="whitened" or state="square_root".
    """

    def __init__(self, stream: Stream, **arguments: object) -> None:
        self.filter = RLSFilter(stream.W_0, stream.prior, layout="in_out", **arguments)  # type: ignore[arg-type]

    @property
    def weight(self) -> torch.Tensor:
        return self.filter.weight

    def update(self, K: torch.Tensor, V: torch.Tensor, noise: float, forget: float) -> None:
        self.filter.update(K, V, noise, forget)

    def covariance(self) -> torch.Tensor:
        return self.filter.state.to(dtype=torch.float64).covariance()

    def health(self) -> Health:
        return self.filter.health()


class ReleasedStep:
    """RLSEdit's released code (arXiv 2601.15686) as a step: S_0 is made symmetric, factored and inverted in float32, a
    jitter is added where that factor fails, and each batch takes a Cholesky factor: F = C K', L L' = noise I + K F,
    C <- C - F (L L')^-1 F', W by the new C.

    That code has no noise and no forgetting: here they are those of the recursion.

    Args:
        dtype: of everything.
    """

    def __init__(self, stream: Stream, dtype: torch.dtype = torch.float32) -> None:
        self.C = _inverse_with_jitter(stream.prior.information().to(stream.W_0.device, dtype))
        self.weight = stream.W_0.to(dtype, copy=True)

    def update(self, K: torch.Tensor, V: torch.Tensor, noise: float, forget: float) -> None:
        K, V = K.to(self.C.dtype), V.to(self.C.dtype)
        F = self.C @ K.mT
        system = K @ F
        system.diagonal().add_(forget * noise)
        upper = torch.linalg.cholesky(system, upper=True)
        G = torch.linalg.solve_triangular(upper, F, upper=True, left=False)
        self.C = (self.C - G @ G.mT) / forget
        self.weight = self.weight + self.C @ K.mT @ (V - K @ self.weight) / noise

    def covariance(self) -> torch.Tensor:
        return self.C


def _inverse_with_jitter(S: torch.Tensor, tries: int = 5) -> torch.Tensor:
    """S^-1 by Cholesky; where that fails with a jitter of 1e-6 mean(diagonal of S), ten times as much at each try, and
    behind the last one by singular values."""
    S = 0.5 * (S + S.mT)
    jitter = 1e-6 * max(float(S.diagonal().abs().mean()), 1.0)
    for _ in range(tries):
        factor, info = torch.linalg.cholesky_ex(S)
        if int(info) == 0:
            return torch.cholesky_inverse(factor)
        S = S + jitter * torch.eye(len(S), dtype=S.dtype, device=S.device)
        jitter *= 10.0
    return torch.linalg.pinv(S)


class WoodburyStep:
    """C <- C - C K'(noise I + K C K')^-1 K C as one writes it first, by LU and not kept symmetric; W by the new C. The
    prior is inverted in float64 and rounded.

    Args:
        dtype: of everything.
    """

    def __init__(self, stream: Stream, dtype: torch.dtype = torch.float32) -> None:
        self.C = torch.linalg.inv(stream.prior.information()).to(stream.W_0.device, dtype)
        self.weight = stream.W_0.to(dtype, copy=True)

    def update(self, K: torch.Tensor, V: torch.Tensor, noise: float, forget: float) -> None:
        K, V = K.to(self.C.dtype), V.to(self.C.dtype)
        Y = self.C @ K.mT
        system = K @ Y
        system.diagonal().add_(forget * noise)
        self.C = (self.C - Y @ torch.linalg.solve(system, K @ self.C)) / forget
        self.weight = self.weight + self.C @ (K.mT @ (V - K @ self.weight)) / noise

    def covariance(self) -> torch.Tensor:
        return self.C


class NormalEquationsStep:
    """S <- S + K'K / noise in float32, and a Cholesky solve of S with every batch."""

    def __init__(self, stream: Stream, dtype: torch.dtype = torch.float32) -> None:
        self.S = stream.prior.information().to(stream.W_0.device, dtype)
        self.weight = stream.W_0.to(dtype, copy=True)

    def update(self, K: torch.Tensor, V: torch.Tensor, noise: float, forget: float) -> None:
        K, V = K.to(self.S.dtype), V.to(self.S.dtype)
        self.S = forget * self.S + K.mT @ K / noise
        gain = torch.cholesky_solve(K.mT / noise, torch.linalg.cholesky(self.S))
        self.weight = self.weight + gain @ (V - K @ self.weight)

    def covariance(self) -> torch.Tensor:
        return torch.linalg.inv(self.S)


FORMS: dict[str, tuple[str, dict[str, object]]] = {
    "plain": ("C itself", {"form": "plain", "guard": "off"}),
    "whitened": ("C = T C~ T' with the prior's root T", {"form": "whitened", "guard": "off"}),
    "inverse-root": ("C = A A'", {"form": "inverse_root", "guard": "off"}),
    "square-root-gain": ("R'R = S, weight by gains", {"state": "square_root", "solution": "gain", "guard": "off"}),
    "square-root": ("R'R = S, right-hand side carried", {"state": "square_root", "guard": "off"}),
    "auto": ("form='auto' without its guard", {"guard": "off"}),
    "guarded": ("form='auto' with guard='auto': the defaults", {}),
}
"""Ours by name: (what is kept, arguments of `RLSFilter`)."""

PUBLISHED: dict[str, tuple[str, MakeStep]] = {
    "released": ("RLSEdit's released code: prior inverted in float32, with a jitter where that fails", ReleasedStep),
    "woodbury": ("Woodbury by LU, C not symmetrised, prior inverted in float64", WoodburyStep),
    "normal-equations": ("Cholesky of a float32 S with every batch", NormalEquationsStep),
}
"""Sequences of other people's code, written in plain torch, float32: (what it is, maker)."""

DTYPES = {"float32": torch.float32, "float64": torch.float64}


def filter_step(form: str, dtype: str = "float32") -> MakeStep:
    """A maker of `RLSFilter` in one of `FORMS`.

    Raises:
        ValueError: no such form or dtype.
    """
    if form not in FORMS:
        raise ValueError(f"filter_step: form must be one of {', '.join(FORMS)}, got {form!r}")
    if dtype not in DTYPES:
        raise ValueError(f"filter_step: dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    return lambda stream: FilterStep(stream, dtype=DTYPES[dtype], **FORMS[form][1])


def make_steps(
    forms: Sequence[str], dtypes: Sequence[str] = ("float32",), published: bool = True
) -> dict[str, MakeStep]:
    """Makers by name: "plain", "plain float64", ..., and the published ones.

    Args:
        forms: of `FORMS`; names of `PUBLISHED` as well, which have one dtype.
        dtypes: of `DTYPES`.
        published: whether all of `PUBLISHED` come along.

    Raises:
        ValueError: no such form or dtype.
    """
    steps: dict[str, MakeStep] = {}
    for dtype in dtypes:
        for form in forms:
            if form in PUBLISHED:
                steps[form] = PUBLISHED[form][1]
            else:
                steps[form if dtype == "float32" else f"{form} {dtype}"] = filter_step(form, dtype)
    return steps | {name: make for name, (_, make) in PUBLISHED.items() if published}
