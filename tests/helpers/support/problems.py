"""The golden problems: five priors, six batches each, with solutions from an independent solver."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch

import rlsedit_kernels as rk

FOLDER = Path(__file__).resolve().parents[2] / "golden"


@dataclass(frozen=True)
class Problem:
    """One stream: its prior, batches, and the arrays of the file by name."""

    name: str
    prior: rk.Prior
    noises: tuple[float, ...]
    forget: float
    arrays: dict[str, np.ndarray]

    def batch(self, t: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, float]:
        """(K, V, noise) of batch t."""
        K, V = (torch.from_numpy(self.arrays[f"{name}{t}"]).to(dtype) for name in "KV")
        return K, V, self.noises[t]

    @property
    def steps(self) -> range:
        return range(len(self.noises))


def _prior(entry: dict, arrays: dict[str, np.ndarray]) -> rk.Prior:
    prior = entry["prior"]
    scalars = {name: value for name, value in prior.items() if name != "kind"}
    given = {name.removeprefix("prior_"): A for name, A in arrays.items() if name.startswith("prior_")}
    if prior["kind"] == "ridge":
        return rk.Prior.ridge(arrays["K0"].shape[1], **scalars)
    if prior["kind"] == "null_space":
        return rk.Prior.null_space(given["projector"], **scalars)
    if prior["kind"] == "precision":
        return rk.Prior.precision(given["S0"])
    maker = getattr(rk.Prior, prior["kind"])
    return maker(*given.values(), **scalars)


@cache
def problems() -> tuple[Problem, ...]:
    """All problems of the folder."""
    found = []
    for entry in json.loads((FOLDER / "index.json").read_text()):
        with np.load(FOLDER / entry["file"]) as file:
            arrays = {name: file[name] for name in file.files}
        name = entry["file"].removesuffix(".npz")
        found.append(Problem(name, _prior(entry, arrays), tuple(entry["noises"]), entry["forget"], arrays))
    return tuple(found)
