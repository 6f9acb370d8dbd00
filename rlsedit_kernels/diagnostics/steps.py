"""What a trial follows: any object that writes batches. Ours by form, and published sequences in plain torch.

A step is written by its author; only `update` and `weight` are needed:

    class MyEditor:
        def __init__(self, stream): ...                                   # stream.prior, stream.W_0 (d, v)
        def update(self, K, V, noise, forget) -> None: ...                # K (u, d), V (u, v) float32; raise to refuse
        weight: Tensor                                                    # (d, v), the weight as it is now
        def covariance(self) -> Tensor: ...                               # optional, (d, d): errors of C and gain
        def health(self) -> Health: ...                                   # optional: status and drift
"""

from __future__ import annotations

from collections.abc import Callable
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


class WoodburyStep:
    """C <- C - C K'(noise I + K C K')^-1 K C by LU in float32, C not kept symmetric; W by the new C.

    Args:
        jitter: None inverts the prior in float64 and rounds; a number adds it to S_0 in float32 and inverts there,
            which is what released code does (arXiv 2601.15686).
        dtype: of everything.
    """

    def __init__(self, stream: Stream, jitter: float | None, dtype: torch.dtype = torch.float32) -> None:
        S = stream.prior.information()
        if jitter is None:
            self.C = torch.linalg.inv(S).to(dtype)
        else:
            S = S.to(dtype)
            self.C = torch.linalg.inv(S + jitter * S.diagonal().mean() * torch.eye(len(S), dtype=dtype))
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
        self.S = stream.prior.information().to(dtype)
        self.weight = stream.W_0.to(dtype, copy=True)

    def update(self, K: torch.Tensor, V: torch.Tensor, noise: float, forget: float) -> None:
        K, V = K.to(self.S.dtype), V.to(self.S.dtype)
        self.S = forget * self.S + K.mT @ K / noise
        gain = torch.cholesky_solve(K.mT / noise, torch.linalg.cholesky(self.S))
        self.weight = self.weight + gain @ (V - K @ self.weight)

    def covariance(self) -> torch.Tensor:
        return torch.linalg.inv(self.S)


def _filter(**arguments: object) -> MakeStep:
    return lambda stream: FilterStep(stream, **arguments)


STEPS: dict[str, tuple[str, MakeStep]] = {
    "plain": ("C in float32", _filter(form="plain", guard="off")),
    "whitened": ("C in whitened coordinates, float32", _filter(form="whitened", guard="off")),
    "inverse-root": ("C = A A', float32", _filter(form="inverse_root", guard="off")),
    "square-root-gain": (
        "R'R = S by streaming QR, weight by gains, float32",
        _filter(state="square_root", solution="gain", guard="off"),
    ),
    "square-root": (
        "R'R = S by streaming QR, right-hand side carried, float32",
        _filter(state="square_root", guard="off"),
    ),
    "auto": ("what form='auto' takes, unguarded", _filter(guard="off")),
    "guarded": ("form='auto' with guard='auto', the default", _filter()),
    "plain-float64": ("C and weight in float64", _filter(form="plain", dtype=torch.float64, guard="off")),
    "whitened-float64": ("whitened, float64", _filter(form="whitened", dtype=torch.float64, guard="off")),
    "auto-float64": ("form='auto', guarded, float64", _filter(dtype=torch.float64)),
    "woodbury": (
        "published: Woodbury by LU, C not symmetrised, float32",
        lambda stream: WoodburyStep(stream, None),
    ),
    "woodbury-jitter": (
        "published: the same, prior inverted in float32 with jitter 1e-6",
        lambda stream: WoodburyStep(stream, 1e-6),
    ),
    "normal-equations": ("published: Cholesky of a float32 S each batch", NormalEquationsStep),
}
"""Steps by name: (what it is, how it is made from a stream)."""
