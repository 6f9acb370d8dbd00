"""A batch whose squares leave the range of its dtype, in other units: the same batch, by powers of two.

(K, noise) and (s K, s^2 noise) tell the same, and a hard write of k and v the same as one of s k and s v, each key with
an s of its own. K C K' of keys of 1e-30 is 0 in float32, and a hard write of them wrote nothing; one of a short key
beside a long one was taken for a multiple of that. Products and factor of a batch are therefore those of the scaled
keys; its gain is diag(s) times theirs.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from rlsedit_kernels.states.keys import Keys

_SMALL = {torch.float32: 2.0**-60, torch.float64: 2.0**-500}
"""Noise below which K C K' may be lost while it is not small beside the noise, where |k|^2 is below it too."""

_UNLIKE = {torch.float32: 2.0**7, torch.float64: 2.0**20}
"""Keys of a hard write have one s unless some are longer than others by more than this: what is shorter by as much
again counts as a multiple of a longer one otherwise (`batch.TRUNCATION`)."""

_LEAST = 2.0**-1000
"""Of keys that are no longer nothing is to be had, nor of those that are 0."""


@dataclass(frozen=True)
class Scaled:
    """The batch as it is factored.

    Attributes:
        rows: (u, d) = diag(s) K, in the dtype of K; K itself where s is None.
        noise: s^2 times that of the batch.
        scales: s (u,) float64, powers of two; None for 1.
    """

    rows: torch.Tensor
    noise: float
    scales: torch.Tensor | None = None

    def gain(self, gain: torch.Tensor) -> torch.Tensor:
        """The gain (d, u) of the batch from that of the scaled keys."""
        return gain if self.scales is None else (gain.to(torch.float64) * self.scales).to(gain.dtype)

    def units(self, E: torch.Tensor) -> torch.Tensor:
        """diag(s) E for what belongs to the keys row by row (u, v), such as their errors; float64."""
        return E.to(torch.float64) if self.scales is None else E.to(torch.float64) * self.scales[:, None]

    def given(self, E: torch.Tensor) -> torch.Tensor:
        """The same back in the units of the batch."""
        return E.to(torch.float64) if self.scales is None else E.to(torch.float64) / self.scales[:, None]


def needed(dtype: torch.dtype, largest: float, noise: float) -> bool:
    """Whether a batch is factored in other units: every hard write, and noise as small as the squares of its keys.

    Args:
        dtype: of the keys.
        largest: the largest |k|^2.
        noise: of the batch, forgetting included.
    """
    return noise < _SMALL[dtype] and (noise == 0.0 or largest < _SMALL[dtype])


def scaled(keys: Keys, noise: float) -> Scaled:
    """The batch in units in which nothing that counts is lost.

    Args:
        keys: of the batch.
        noise: of the batch, forgetting included.
    """
    if not needed(keys.rows.dtype, keys.largest, noise):
        return Scaled(keys.rows, noise)
    scales = factors(lengths(keys.rows), noise, keys.rows.dtype)
    return Scaled(times(keys.rows, scales), noise_of(noise, scales), scales)


def noise_of(noise: float, scales: torch.Tensor) -> float:
    """s^2 times the noise."""
    s = float(scales.max()) if noise > 0.0 else 0.0
    return noise * s * s


def factors(sizes: torch.Tensor, noise: float, dtype: torch.dtype) -> torch.Tensor:
    """s (u,) float64 for keys of these lengths (u,), float64, and of this dtype: by which no key is longer than 1.

    One s brings the longest of them, or the root of the noise, to 1/2 or more. Each key of a hard write has one of its
    own where their lengths are unlike; where they are not dependent keys go on to share what is written by length.
    """
    largest = sizes.amax().clamp_min(noise**0.5)
    smallest = torch.where(sizes > _LEAST, sizes, largest).amin()
    unlike = (largest > _UNLIKE[dtype] * smallest) & (noise == 0.0)
    sizes = torch.where(unlike, sizes, largest)
    sizes = sizes.clamp_min(_LEAST)
    # size = mantissa 2^e, so that the quotient is a power of two, and exact
    return torch.where(sizes > _LEAST, torch.frexp(sizes).mantissa / sizes, 1.0)


def times(K: torch.Tensor, scales: torch.Tensor | None) -> torch.Tensor:
    """diag(s) K (u, d) in the dtype of K: exact, but for numbers that are nothing beside others."""
    return K if scales is None else (K.to(torch.float64) * scales[:, None]).to(K.dtype)


def lengths(K: torch.Tensor) -> torch.Tensor:
    """|k| (u,) float64 of keys (u, d), whatever their size."""
    wide = K.to(torch.float64)
    largest = wide.abs().amax(dim=1).clamp_min(torch.finfo(torch.float64).tiny)
    return largest * torch.linalg.vector_norm(wide / largest[:, None], dim=1)
