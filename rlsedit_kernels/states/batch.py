"""One batch seen by a state: the factored u x u system, the gain and the columns of the downdate.

Everything a commit could fail on is found here, before anything is written.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from rlsedit_kernels import ops
from rlsedit_kernels.errors import BreakdownError, LeverageError
from rlsedit_kernels.states.products import Change, Products, Stack
from rlsedit_kernels.states.reading import scalars
from rlsedit_kernels.states.scaled import Scaled

PIVOT_SLACK = 32.0
"""A pivot of chol(noise I + G) may fall below the noise by this many times u eps max(G) before it is called
a breakdown: the rounding error of G itself."""

TRUNCATION = 8.0
"""Eigenvalues of G below this many times max(u, 8) eps max(G) count as zero when noise = 0. Where hard writes or
restrictions have left nothing of C in some directions max(K C_0 K') stands for max(G): there G is rounding alone."""

CAREFUL_FROM = 2e-5
"""From this value of (unit roundoff) max(K C K') / noise on, a batch is worked out in float64: what it leaves
of C is then smaller than C by the reciprocal, and a difference formed in working precision would lose it."""

STACKED_FROM = 1e-10
"""From this value of (float64 unit roundoff) max(K C K') / noise on, a batch of a root is factored without forming
noise I + F'F, where the noise is lost: by a QR factorisation, whose error is the square root of that."""

_STACKED_TO = 1e-2
"""It is taken while the noise is not lost in F either: up to this value of u (unit roundoff) sqrt(max(G) / noise)."""

LEVERAGE_MARGIN = 1e4
"""Removal is refused where 1 - leverage is below this many eps: four digits are then left at least."""


@dataclass(frozen=True)
class BatchFactor:
    """A batch with M = (noise I + G)^-1 in factored form, in the coordinates of the form that made it.

    Attributes:
        gain: (r, u) = Y M.
        change: what a commit subtracts: Z (r, w) with Z Z' = gain Y' from C, or X F' from a root of it; w = u, or
            the rank of G where the system was truncated.
        G: (u, u) = K Y.
        root: (u, w), root root' = M.
        pivot: smallest pivot of the factored system divided by the noise (>= 1 for a healthy state), or
            None where noise = 0.
        rank: w.
        batch: the keys as they were factored: gain, G and root are of these, in their units. None for those given.
    """

    gain: torch.Tensor
    change: Change
    G: torch.Tensor
    root: torch.Tensor
    pivot: float | None
    rank: int
    batch: Scaled | None = None


def needs_care(products: Products, noise: float, largest: float | None = None) -> bool:
    """Whether this batch tells so much more than the state knew that working precision, or G, would not do.

    The update is a difference, C - Y (noise I + G)^-1 Y'; with s = max(G) / noise it leaves about C / s in the
    direction of the keys, at a rounding error of eps |C|. Stored values may well be of working precision: errors
    that C brings along are contracted by the update, those of the difference itself are not.

    In float64 there is more to be had of a root only (`stacked`). `largest` is max(G), where it is known.
    """
    G, wide = products.G, products.G.dtype == torch.float64
    if noise == 0.0 or (wide and products.times is None):
        return False
    largest = float(G.diagonal().max()) if largest is None else largest
    return 0.5 * torch.finfo(G.dtype).eps * largest > (STACKED_FROM if wide else CAREFUL_FROM) * noise


def figures(G: torch.Tensor) -> list[torch.Tensor]:
    """Sum and largest diagonal element of G: numbers () on its device."""
    return [G.sum(), G.diagonal().max()]


def longest(inner: torch.Tensor, batch: Scaled) -> list[torch.Tensor]:
    """Norm () of the longest key in the coordinates of a form; nothing where they are the keys themselves."""
    if inner is batch.rows:
        return []
    norms = torch.linalg.vector_norm(inner, dim=1)
    return [(norms if batch.scales is None else norms.to(torch.float64) / batch.scales).max()]


@dataclass(frozen=True)
class Attempt:
    """noise I + G factored as it is, noise > 0: launched, and not looked at yet.

    With L L' = noise I + G a covariance changes by Z Z', Z = Y L^-T, and a root of it by X F',
    X = Y L^-T (L + sqrt(noise) I)^-1 (docs/mathematics.md, fact 12).

    Attributes:
        gain, change, G, root: of `BatchFactor`; NaN, or anything, where the factor does not exist.
        info: () int, 0 where the factor exists.
        pivot: () smallest diagonal element of L.

    L^-T is what `gain_solve` makes of the identity: factoring a second time costs less than a solve by torch.
    """

    gain: torch.Tensor
    change: Change
    G: torch.Tensor
    root: torch.Tensor
    info: torch.Tensor
    pivot: torch.Tensor

    @classmethod
    def of(cls, products: Products, noise: float) -> Attempt:
        """Launch it."""
        G, F = products.G, products.F
        gain, Z, info = ops.gain_solve(products.Y, G, noise)
        root = ops.gain_solve(torch.eye(G.shape[-1], dtype=G.dtype, device=G.device), G, noise)[1]
        pivot = root.diagonal().max().reciprocal()
        if F is None:
            return cls(gain, Change(Z), G, root, info, pivot)
        shifted = G.clone()
        shifted.diagonal().add_(noise)
        L = ops.cholesky(shifted)[0]
        L.diagonal().add_(noise**0.5)
        X = torch.linalg.solve_triangular(L, Z, upper=False, left=False)
        return cls(gain, Change(X, F), G, root, info, pivot)

    def found(self, noise: float, eps: float, largest: float, info: float, pivot: float) -> BatchFactor | None:
        """The batch, once `info`, `pivot` and max(G) have been read; None where it is singular to rounding."""
        if not _sound(self.G, noise, eps, largest, info, pivot):
            return None
        return BatchFactor(self.gain, self.change, self.G, self.root, pivot * pivot / noise, self.G.shape[-1])


def regular(products: Products, noise: float, eps: float) -> bool:
    """Whether `factor` will not have to go by eigenvalues, where `scale` counts."""
    G = products.G
    if noise == 0.0:
        return False
    if products.stack is not None:
        return True
    L, info = ops.cholesky(G + noise * torch.eye(G.shape[-1], dtype=G.dtype, device=G.device))
    return _sound(G, noise, eps, *scalars([G.diagonal().max(), info, L.diagonal().min()]))


def _sound(G: torch.Tensor, noise: float, eps: float, largest: float, info: float, pivot: float) -> bool:
    """Whether noise I + G with this smallest diagonal element of L is regular, rounding considered."""
    return info == 0 and pivot * pivot >= noise - PIVOT_SLACK * G.shape[-1] * eps * largest


def factor(products: Products, noise: float, eps: float, scale: float = 0.0) -> BatchFactor:
    """Factor noise I + G; for noise = 0, or a system singular to rounding, on the range of G.

    Of a root that is given in float64 the factor is that of F where G would have lost the noise.

    Args:
        products: of the batch.
        noise: >= 0.
        eps: machine epsilon of the form they were made with (they may be wider).
        scale: what rounding is to be compared with where it is more than G, as `restriction.scale` gives it.

    Raises:
        BreakdownError: G has a negative eigenvalue beyond its rounding error: the covariance is broken.
    """
    if noise > 0.0:
        if (stack := products.stack or stacked(products, noise)) is not None:
            return _of_stack(stack, products.G, noise)
        attempt = Attempt.of(products, noise)
        largest, info, pivot = scalars([products.G.diagonal().max(), attempt.info, attempt.pivot])
        if (found := attempt.found(noise, eps, largest, info, pivot)) is not None:
            return found
    return truncated(products, noise, eps, scale)


def truncated(products: Products, noise: float, eps: float, scale: float = 0.0) -> BatchFactor:
    """`factor` by eigenvalues, on the range of G."""
    G = products.G
    u = G.shape[-1]
    values, vectors = torch.linalg.eigh(G.to(torch.float64))
    low, high = float(values[0]), float(values[-1])
    tolerance = TRUNCATION * max(u, 8) * eps * max(abs(high), abs(low), scale)
    if low < -4.0 * tolerance - noise * 1e-3:
        raise BreakdownError(
            f"K C K' has the negative eigenvalue {low:.3e} beside {high:.3e}: the covariance is no longer positive "
            "semi-definite in this precision; nothing was written. Rebuild with refactor(batches)"
            + ("" if products.F is not None else ", or use form='inverse_root'")
            + (", or use dtype=torch.float64" if eps > torch.finfo(torch.float64).eps else "")
        )
    shifted = values.clamp_min(0.0) + noise
    keep = shifted > tolerance
    inverse_roots = (vectors[:, keep] / shifted[keep].sqrt()).to(G.dtype)
    Z = products.Y @ inverse_roots
    pivot = float(shifted[0]) / noise if noise > 0.0 else None
    change = Change(Z)
    if products.F is not None:
        change = _of_root(Z, products.F @ inverse_roots, shifted[keep], noise)
    return BatchFactor(Z @ inverse_roots.mT, change, G, inverse_roots, pivot, int(keep.sum()))


def stacked(products: Products, noise: float) -> Stack | None:
    """Q R = [F; sqrt(noise) I], so that R'R = noise I + F'F; None where G keeps the noise, or F loses it too.

    With Q_1 = F R^-1 the root becomes A - A Q_1 (I - sqrt(noise) (R' + sqrt(noise) I)^-1) Q_1', which changes it by
    orthonormal columns: an error in Y = A F, as large as the keys, would be one in what little is left of A.
    """
    F, times = products.F, products.times
    if F is None or times is None or not needs_care(products, noise):
        return None
    u, shift = F.shape[1], noise**0.5
    reach = float(torch.linalg.vector_norm(F, dim=0).max())
    if not 0.5 * u * torch.finfo(F.dtype).eps * reach < _STACKED_TO * shift:
        return None
    identity = torch.eye(u, dtype=F.dtype, device=F.device)
    Q, R = torch.linalg.qr(torch.cat([F, identity * shift]))
    signs = torch.where(R.diagonal() < 0.0, -1.0, 1.0).to(F.dtype)
    Q = (Q * signs)[: len(F)]
    return Stack(Q, R * signs[:, None], times(Q))


def _of_stack(stack: Stack, G: torch.Tensor, noise: float) -> BatchFactor:
    R, Z, shift = stack.R.clone(), stack.Z, noise**0.5
    gain = torch.linalg.solve_triangular(R.mT, Z, upper=False, left=False)
    root = torch.linalg.solve_triangular(R, torch.eye(len(R), dtype=R.dtype, device=R.device), upper=True)
    pivot = float(R.diagonal().min()) ** 2 / noise
    R.diagonal().add_(shift)
    left = torch.sub(Z, torch.linalg.solve_triangular(R.mT, Z, upper=False, left=False), alpha=shift)
    return BatchFactor(gain, Change(left, stack.Q), G, root, pivot, len(R))


def _of_root(Z: torch.Tensor, right: torch.Tensor, values: torch.Tensor, noise: float) -> Change:
    """The change of a root by eigenvalues s of noise I +- G: 1 -+ sqrt(noise / s), free of cancellation."""
    return Change(Z / (1.0 + (noise / values).sqrt()).to(Z.dtype), right)


def epsilons(*dtypes: torch.dtype) -> list[float]:
    """Machine epsilon of each."""
    return [torch.finfo(dtype).eps for dtype in dtypes]


def removal(
    products: Products, noise: float, eps: float, working: float | None = None, reach: float = 0.0
) -> tuple[torch.Tensor, Change, float]:
    """Gain and change for taking a batch back (docs/mathematics.md, facts 5 and 12).

    With Y = C K' and B = noise I - K Y = Q diag(s) Q': gain = Y B^-1, and C <- C + Z Z' with Z = Y Q s^-1/2.

    Args:
        products: of the batch, float64.
        noise: > 0, that of the batch when it was written.
        eps: machine epsilon of the form.
        working: that of gains and weights where a form is kept in a wider dtype: the gain multiplies the rounding of
            V - K W by 1 / (1 - leverage), whatever the form knows. None for `eps`.
        reach: |K C_0 K'|^1/2 / noise^1/2 of the longest key: what rounding a root has done to F is `eps` times that.

    Returns:
        gain (r, u), the change that is to be added, and the leverage, the largest eigenvalue of K Y / noise.

    Raises:
        LeverageError: the leverage is 1 to working precision.
    """
    values, vectors = torch.linalg.eigh(products.G)
    leverage = float(values[-1]) / noise
    if float(values[0]) < -LEVERAGE_MARGIN * eps * noise:  # no leverage is negative: this is the rounding error of C
        raise LeverageError(
            f"K C K' has the eigenvalue {float(values[0]):.3e} where 0 to noise = {noise:.3e} is possible: the batch "
            "is lost in the rounding errors of the state; nothing was changed. Rebuild with refactor(batches that stay)"
        )
    margin = LEVERAGE_MARGIN * max(eps, working or 0.0)
    margin = margin if products.F is None else max(margin, eps * reach)
    if not 1.0 - leverage > margin:
        raise LeverageError(
            f"the batch has leverage {leverage:.9g} and 1 - leverage must exceed {margin:.1e} in this precision: the "
            "state knows these directions by this batch alone, or the batch was never written; nothing was changed. "
            "Rebuild with refactor(batches that stay)"
        )
    left_over = noise - values
    root = vectors / left_over.sqrt()
    Z = products.Y @ root
    change = Change(Z) if products.F is None else _of_root(Z, products.F @ root, left_over, noise)
    return Z @ root.mT, change, leverage
