"""A toy model with layers of linear maps, and the calls with which the stand-ins of other code bases read it."""

from __future__ import annotations

from types import SimpleNamespace

import torch
from torch import Tensor

LAYERS, D, V, U = 3, 48, 10, 4


class Toy:
    """Weights (v, d) by layer; keys of a layer depend on the layers below it, as in a network."""

    def __init__(self, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.generator = generator
        self.config = SimpleNamespace(_name_or_path=f"toy/{seed}")
        self.weights = [torch.randn(V, D, generator=generator) / D**0.5 for _ in range(LAYERS)]
        self.mix = [torch.randn(D, V, generator=generator) for _ in range(LAYERS)]
        samples = torch.randn(LAYERS, 6 * D, D, generator=generator) * torch.logspace(-1.2, 0.6, D)
        self.moments = samples.mT @ samples / (6 * D)

    def to(self, device: torch.device | str) -> Toy:
        """What takes part in a forward pass moves; second moments stay on the CPU."""
        self.weights = [weight.to(device) for weight in self.weights]
        self.mix = [weight.to(device) for weight in self.mix]
        return self

    def states(self, inputs: Tensor, upto: int) -> Tensor:
        """Keys (d, u) of layer `upto` for inputs (d, u)."""
        keys = inputs
        for layer in range(upto):
            keys = torch.tanh(keys + self.mix[layer] @ (self.weights[layer] @ keys) / V)
        return keys


def requests(count: int, seed: int) -> list[dict[str, Tensor]]:
    """Requests with an input and a target each."""
    generator = torch.Generator().manual_seed(seed)
    return [
        {"input": torch.randn(D, generator=generator), "target": torch.randn(V, generator=generator)}
        for _ in range(count)
    ]


def hparams(**changes: float) -> SimpleNamespace:
    """Hyper-parameters by the names that those code bases use."""
    values = dict(layers=list(range(LAYERS)), L2=2.0, mom2_update_weight=30.0, nullspace_threshold=0.3)
    return SimpleNamespace(**{**values, "lambda_reg": 0.0, "mu_reg": 1.0, "P_loc": "absent", **changes})


def compute_ks(model: Toy, wanted: list[dict[str, Tensor]], layer: int) -> Tensor:
    """Keys (u, d)."""
    inputs = torch.stack([request["input"] for request in wanted], 1)
    return model.states(inputs.to(model.weights[0].device), layer).T


def residuals(model: Toy, wanted: list[dict[str, Tensor]]) -> Tensor:
    """Targets less present outputs of the last layer, (v, u), with a graph, as targets that were optimised have one."""
    keys = compute_ks(model, wanted, LAYERS - 1).T
    targets = torch.stack([request["target"] for request in wanted], 1).to(keys.device)
    return targets.requires_grad_() - model.weights[-1] @ keys


def projectors(model: Toy, threshold: float) -> Tensor:
    """P (layers, d, d) from the second moments."""
    found = []
    for moment in model.moments:
        values, vectors = torch.linalg.eigh(moment.double())
        null = vectors[:, values < threshold]
        found.append((null @ null.T).float())
    return torch.stack(found)
