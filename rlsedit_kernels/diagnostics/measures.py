"""How far what a step holds is from the batch solution, in numbers."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from rlsedit_kernels.diagnostics.truth import Exact


@dataclass(frozen=True)
class CovarianceError:
    """Of a covariance C beside the true C*, S* = R'R.

    Attributes:
        relative: largest |eigenvalue| of R C R' - I: the largest relative error of a quadratic form x'C x.
        plain: |C - C*| / |C*|, Frobenius.
        smallest: smallest eigenvalue of R C R'; 1 is exact, below 0 C is indefinite.
        asymmetry: |C - C'| / |C|, Frobenius.
        condition: ratio of the extreme eigenvalues of C; infinite where C is indefinite.
    """

    relative: float
    plain: float
    smallest: float
    asymmetry: float
    condition: float


def on_host(A: torch.Tensor) -> torch.Tensor:
    """A in float64 on the CPU, where the truth is worked out."""
    return A.detach().to("cpu", torch.float64)


def weight_errors(W: torch.Tensor, exact: Exact) -> tuple[float, float]:
    """|W - W*| / |W* - W_0| in the S-norm and in the Frobenius norm; infinite where W is not finite.

    Raises:
        ValueError: W is not (d, v).
    """
    if W.shape != exact.W_0.shape:
        raise ValueError(f"weight must have shape (d, v) = {tuple(exact.W_0.shape)}, got {tuple(W.shape)}")
    error = on_host(W) - exact.W
    return _ratio(exact.norm(error), exact.norm(exact.shift)), _ratio(float(error.norm()), float(exact.shift.norm()))


def gain_errors(gain: torch.Tensor, true: torch.Tensor, exact: Exact) -> tuple[float, float]:
    """|g - g*| / |g*| in the S-norm and in the Frobenius norm."""
    error = on_host(gain) - true
    return _ratio(exact.norm(error), exact.norm(true)), _ratio(float(error.norm()), float(true.norm()))


def covariance_error(C: torch.Tensor, exact: Exact) -> CovarianceError:
    """All of `CovarianceError`; infinite (smallest: -inf) where C is not finite.

    Raises:
        ValueError: C is not (d, d).
    """
    d = len(exact.W_0)
    if C.shape != (d, d):
        raise ValueError(f"covariance must have shape (d, d) = {(d, d)}, got {tuple(C.shape)}")
    wide = on_host(C)
    if not bool(torch.isfinite(wide).all()):
        return CovarianceError(math.inf, math.inf, -math.inf, math.inf, math.inf)
    symmetric = (wide + wide.mT) * 0.5
    inner = exact.weighted(exact.weighted(symmetric).mT)
    values = torch.linalg.eigvalsh((inner + inner.mT) * 0.5)
    own = torch.linalg.eigvalsh(symmetric)
    return CovarianceError(
        relative=float((values - 1.0).abs().max()),
        plain=_ratio(float((wide - exact.C).norm()), float(exact.C.norm())),
        smallest=float(values[0]),
        asymmetry=_ratio(float((wide - wide.mT).norm()), float(wide.norm())),
        condition=float(own[-1] / own[0]) if float(own[0]) > 0.0 else math.inf,
    )


def leverage(K: torch.Tensor, noise: float, exact: Exact) -> float:
    """Largest eigenvalue of K C K' / noise for a batch that is part of the stream: 1 means that only it knows."""
    return float(torch.linalg.matrix_norm(exact.half(K), 2)) ** 2 / noise


def _ratio(error: float, size: float) -> float:
    if not math.isfinite(error):
        return math.inf
    return error / size if size > 0.0 else (0.0 if error == 0.0 else math.inf)
