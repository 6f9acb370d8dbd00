"""What a state knows about its own accuracy, and the probes by which it knows."""

from __future__ import annotations

from dataclasses import asdict, dataclass

import torch

from rlsedit_kernels.priors import PriorFactor
from rlsedit_kernels.states.coordinates import unwhiten, unwhiten_transposed, whiten
from rlsedit_kernels.states.keys import Keys
from rlsedit_kernels.states.reading import blocks

PROBES = 4
DRIFT_WARNING = {"plain": 3e-3, "whitened": 3e-3, "inverse_root": 3e-4, "square_root": 3e-4}
DRIFT_BROKEN = {"plain": 0.3, "whitened": 0.3, "inverse_root": 0.02, "square_root": 0.02}
"""By form, because a root is measured in another norm (`Probes.drift`); W is off by 1e-4 to 1e-2 at the warning."""

RHO_WARNING = {"plain": 1e-4, "whitened": 1e-3, "inverse_root": 10.0}
"""From this rho on, in the coordinates of the form, W may be off by more than 1e-3."""

WEIGHT_WARNING = 1e-3
"""Estimated relative error of W, from rounding it, that is worth a warning."""

ERROR_WARNING = 3e-2
"""The same for the error of the probes in the S-norm, which sees the worst directions more than W does."""
ROOTS = ("inverse_root", "square_root")
_TINY = torch.finfo(torch.float64).tiny


@dataclass(frozen=True)
class Health:
    """Report of `CovarianceState.health()` and `SquareRootState.health()`.

    Attributes:
        status: "ok", "warning" or "broken".
        form: the form in use ("square_root" for a triangular factor), or "undecided" before the first keys of an
            automatic choice.
        reason: why this form.
        dtype: of keys and gains.
        storage: dtype in which the covariance is kept.
        steps: batches committed less batches removed.
        rank: dimension of the space in which edits live.
        columns: columns of a low-rank representation; equal to `rank` once `dense`.
        dense: whether a matrix is kept.
        prior: how the prior was factored ("scalar", "basis", "eigen", "cholesky"; "none" where there is none).
        condition: that of the prior on its range; infinite where there is none, and rho too.
        lifted: eigenvalues of a singular second moment that were raised.
        rho: unit roundoff of the storage * lambda_max(C_0) * largest |k|^2 / noise (|k|^2 of a hard write).
        smallest_pivot: smallest pivot of chol(noise I + G) over the noise so far; below 1 means breakdown.
        largest_leverage: largest leverage of a removed batch, None if none was removed.
        careful_steps: batches that were worked out in float64 because they told far more than was known.
        drift: largest relative error of C S x - x over random probes x, in whitened coordinates; for the inverse
            root, of the quadratic form x'S C S x.
        messages: what a user should know or do, one sentence each.
        worst_drift: the largest drift beyond its warning that was seen, 0 if none; W keeps what it was given then.
        repairs: how often the guard has rebuilt the state or moved it to a safer form.
        weight_error: estimated error of W in the S-norm, relative to W - W_0, from rounding it to its dtype with every
            batch (`RLSFilter.health` only).
        smallest_eigenvalue, largest_eigenvalue: of C in whitened coordinates, in the directions that hard writes and
            restrictions leave; at most 1 without forgetting, below 0 C is indefinite (`thorough` only, as all below).
        asymmetry: |C - C'| / |C|.
        error: sqrt(r'S r / z'S z), r = C (S z) - z, the largest over the probes, with S by inverting C in float64.
    """

    status: str
    form: str
    reason: str
    dtype: str
    storage: str
    steps: int
    rank: int
    columns: int
    dense: bool
    prior: str
    condition: float
    lifted: int
    rho: float
    smallest_pivot: float | None
    largest_leverage: float | None
    careful_steps: int
    drift: float
    messages: tuple[str, ...]
    worst_drift: float = 0.0
    repairs: int = 0
    weight_error: float | None = None
    smallest_eigenvalue: float | None = None
    largest_eigenvalue: float | None = None
    asymmetry: float | None = None
    error: float | None = None

    @property
    def ok(self) -> bool:
        """Whether the state takes batches: its status is not "broken". With "warning" W may be off: see `messages`."""
        return self.status != "broken"

    def as_dict(self) -> dict[str, object]:
        """The fields as a dictionary, for JSON."""
        return asdict(self)


class Probes:
    """Random vectors z = T x and their images S z, carried along exactly in float64 at O(d u) a batch.

    C (S z) = z whatever has been written; how far the state is from that, in whitened coordinates, is an
    estimate of its relative error without any history.

    Each vector is one stretch of memory: products with a few of them cost a CPU a third of what they cost side by side.
    """

    def __init__(self, z: torch.Tensor, image: torch.Tensor) -> None:
        self.z = _apart(z)
        self.image = _apart(image)
        self._whitened: torch.Tensor | None = None

    @classmethod
    def start(cls, factor: PriorFactor, device: torch.device, seed: int = 20) -> Probes:
        """Images under S_0 of the prior itself."""
        x = _directions(factor.rank, seed)
        if factor.root is None or factor.root_inverse is None:
            scale = factor.scale or 1.0
            return cls((x * scale).to(device), _image(factor, x).to(device))
        x = x.to(factor.root.device)
        return cls((factor.root @ x).to(device), _image(factor, x).to(device))

    def to(self, device: torch.device) -> Probes:
        """An independent copy on a device."""
        return Probes(self.z.to(device, copy=True), self.image.to(device, copy=True))

    def saved(self) -> dict[str, torch.Tensor]:
        """Copies as files have them, in rows."""
        layout = torch.contiguous_format
        return {"z": self.z.clone(memory_format=layout), "image": self.image.clone(memory_format=layout)}

    def write(self, K: Keys, noise: float, forget: float) -> None:
        """S <- forget S + K'K / noise."""
        if forget != 1.0:
            self.image *= forget
        self._add(K, 1.0 / noise)

    def remove(self, K: Keys, noise: float) -> None:
        """S <- S - K'K / noise."""
        self._add(K, -1.0 / noise)

    def _add(self, K: Keys, factor: float) -> None:
        for rows in blocks(K.rows):  # no float64 copy of all keys
            wide = rows.to(torch.float64)
            self.image.mT.addmm_(self.z.mT @ wide.mT, wide, alpha=factor)

    def begin_again(self, form, factor: PriorFactor, seed: int) -> None:  # type: ignore[no-untyped-def]
        """New probes for a covariance that has become singular (noise 0, a restriction): z = C y, S z = y."""
        image = _image(factor, _directions(factor.rank, seed).to(self.z.device))
        self.z, self.image, self._whitened = _apart(apply(form, factor, image)), _apart(image), None

    def drift(self, form, factor: PriorFactor) -> float:  # type: ignore[no-untyped-def]
        """max over probes of |T^-1 (C S z - z)| / |T^-1 z|; of |z'S C S z / z'S z - 1| for the forms that keep a root.

        The first sees the rounding errors of C in directions that nothing has told about yet, multiplied by
        what the keys have told: for a covariance these reach W, for a root they do not (W off by 2e-4 at a
        first measure of 0.2). The second is weighted like W; W is off by 2 to 50 times as much.
        """
        if form is not None and form.maps:
            x, inner = self.whitened(factor), unwhiten_transposed(factor, self.image)
            product = form.apply(inner)
            if form.name in ROOTS:
                return _largest((inner * product).sum(dim=0) / (self.image * self.z).sum(dim=0) - 1.0)
            return _largest((product - x).norm(dim=0) / x.norm(dim=0).clamp_min(_TINY))
        product = apply(form, factor, self.image)
        if form is not None and form.name in ROOTS:
            return _largest((self.image * product).sum(dim=0) / (self.image * self.z).sum(dim=0) - 1.0)
        error = whiten(factor, product - self.z).norm(dim=0)
        return _largest(error / self.whitened(factor).norm(dim=0).clamp_min(_TINY))

    def whitened(self, factor: PriorFactor) -> torch.Tensor:
        """T^-1 z, worked out once: z stays what it is until `begin_again`."""
        if self._whitened is None:
            self._whitened = whiten(factor, self.z)
        return self._whitened


def apply(form, factor: PriorFactor, y: torch.Tensor) -> torch.Tensor:  # type: ignore[no-untyped-def]
    """C y (d, p) of a form in float64 arithmetic, so that only the error of the state itself is seen."""
    if form is None:
        return unwhiten(factor, unwhiten_transposed(factor, y))
    if not form.maps:
        return form.apply(y)
    return unwhiten(factor, form.apply(unwhiten_transposed(factor, y)))


def _apart(x: torch.Tensor) -> torch.Tensor:
    """x (d, p) with adjacent elements in each of its columns."""
    return x.mT.contiguous().mT


def _largest(ratio: torch.Tensor) -> float:
    return float(ratio.abs().max()) if bool(torch.isfinite(ratio).all()) else float("inf")


def _image(factor: PriorFactor, x: torch.Tensor) -> torch.Tensor:
    """S_0 T x = T^-1' x."""
    if factor.root_inverse is None:
        return x / (factor.scale or 1.0)
    return (factor.root_inverse.mT @ x.to(factor.root_inverse.device)).to(x.device)


def _directions(rank: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rank, min(PROBES, rank), dtype=torch.float64, generator=generator, device="cpu")
    return x / x.norm(dim=0)
