"""The solves as their authors publish them, a dense factorisation a batch: what the recursion is compared with.

`published(name, start)` gives a function of (keys, residual, bare keys) that keeps what the method keeps between
batches. Precision is that of the released code: float64 where it casts, else that of the state. RLSEdit's released code
is a recursion itself (`rlsedit_kernels.profile` has it): of "rlsedit" this is its objective, solved densely.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .priors import null_basis
from .solver import Start
from .ultraedit import Normaliser

Solve = Callable[[Tensor, Tensor, Tensor | None], Tensor]


def published(name: str, start: Start) -> Solve | None:
    """The published solve of a method; None where there is none (fine-tuning).

    Raises:
        ValueError: noise 0 for a solve that divides by it.
    """
    if start.config.noise == 0 and name not in _WITHOUT_NOISE:
        raise ValueError(
            f"EditConfig: noise must be positive for the published solve of {name!r}, got 0: it divides by it"
        )
    make = _SOLVES.get(name)
    return None if make is None else make(start)


def _eye(start: Start, dtype: torch.dtype) -> Tensor:
    return torch.eye(len(start.moment), dtype=dtype, device=start.device)


def _anchored(ridge: Callable[[Start], float], commit: bool) -> Callable[[Start], Solve]:
    """(mu^2 weight E[k k'] + ridge I + earlier K'K + K'K)^-1 K' E, float64 (MEMIT, ENCORE, RLSEdit)."""

    def make(start: Start) -> Solve:
        config = start.config
        system = config.mu**2 * config.mom2_weight * start.moment.to(start.device, torch.float64)
        system = system + ridge(start) * _eye(start, torch.float64)

        def solve(keys: Tensor, residual: Tensor, _bare: Tensor | None) -> Tensor:
            nonlocal system
            wide = keys.double()
            whole = system + wide.T @ wide / config.noise
            gain = torch.linalg.solve(whole, wide.T) / config.noise
            system = whole if commit else system
            return (gain @ residual.double()).to(residual.dtype)

        return solve

    return make


def _null_space(grows: bool) -> Callable[[Start], Solve]:
    """[P (K'K + M) + L2 I]^-1 P K' E, in the precision of the state (AlphaEdit, LangEdit)."""

    def make(start: Start) -> Solve:
        config, eye = start.config, _eye(start, start.dtype)
        moment, count = start.moment.to(start.device, torch.float64), config.langedit_samples
        basis = null_basis(moment, config.null_threshold)
        projector, past = (basis @ basis.T).to(start.dtype), torch.zeros_like(eye)

        def solve(keys: Tensor, residual: Tensor, _bare: Tensor | None) -> Tensor:
            nonlocal moment, count, projector, past
            past = past + keys.T @ keys / config.noise
            system = projector @ past + config.l2 * eye
            update = torch.linalg.solve(system, projector @ (keys.T @ residual) / config.noise)
            if grows:
                wide = keys.double()
                moment, count = (count * moment + wide.T @ wide) / (count + len(keys)), count + len(keys)
                values, vectors = torch.linalg.eigh(moment)
                null = vectors[:, values < config.null_threshold]
                projector = (null @ null.T).to(start.dtype)
            return update

        return solve

    return make


def _evoedit(start: Start) -> Solve:
    """P K'(K P K' + L2 I)^-1 E, then P - Q Q', by a singular value decomposition."""
    config = start.config
    basis = null_basis(start.moment, config.null_threshold)
    projector = (basis @ basis.T).to(start.device, start.dtype)

    def solve(keys: Tensor, residual: Tensor, _bare: Tensor | None) -> Tensor:
        nonlocal projector
        columns = projector @ keys.T
        small = keys @ columns + config.noise * config.l2 * torch.eye(len(keys), dtype=keys.dtype, device=keys.device)
        update = columns @ torch.linalg.solve(small, residual)
        left, sizes, _ = torch.linalg.svd(columns, full_matrices=False)
        keep = sizes > max(columns.shape) * torch.finfo(sizes.dtype).eps * sizes[0]
        projector = projector - left[:, keep] @ left[:, keep].T
        return update

    return solve


def _constrained(mixed: bool, exact: bool) -> Callable[[Start], Solve]:
    """C K'(K C K' + gamma I)^-1 E with C = E[k k']^-1, float64 (EMMET, ROME)."""

    def make(start: Start) -> Solve:
        moment = start.moment.to(start.device, torch.float64)
        inverse: Tensor | None = None

        def solve(keys: Tensor, residual: Tensor, bare: Tensor | None) -> Tensor:
            nonlocal inverse
            inverse = torch.linalg.inv(moment) if inverse is None or not exact else inverse
            left = (bare if mixed and bare is not None else keys).double()
            columns = inverse @ keys.double().T
            gamma = start.config.gamma if len(keys) > 1 and not exact else 0.0
            system = left @ columns + gamma * torch.eye(len(keys), dtype=torch.float64, device=keys.device)
            return (columns @ torch.linalg.solve(system, residual.double())).to(residual.dtype)

        return solve

    return make


def _lyaplock(start: Start) -> Solve:
    """[K'K + past K'K + a Z A]^-1 applied to all that is left of the three terms, float64."""
    config = start.config
    anchor = config.mu**2 * config.mom2_weight * start.moment.to(start.device, torch.float64)
    past, reached, shift = torch.zeros_like(anchor), None, None
    weight, limit = 1.0, 0.0

    def solve(keys: Tensor, residual: Tensor, _bare: Tensor | None) -> Tensor:
        nonlocal past, reached, shift, weight, limit
        wide, eye = keys.double(), _eye(start, torch.float64)
        gram, right = wide.T @ wide / config.noise, wide.T @ residual.double() / config.noise
        shift = torch.zeros_like(right) if shift is None else shift
        reached = torch.zeros_like(right) if reached is None else reached
        left = right - weight * (anchor @ shift) + reached - past @ shift
        update = torch.linalg.solve(gram + past + weight * anchor, eye) @ left
        shift, past = shift + update, past + gram
        reached = reached + gram @ shift
        loss = float(torch.sum(shift * (anchor @ shift)))
        limit = limit or config.lyap_alpha * loss
        weight = max(weight + loss / limit - 1.0, 1.0) if limit > 0 else weight
        return update.to(residual.dtype)

    return solve


def _simie(start: Start) -> Solve:
    """(lambda I + sum of K'K)^-1 K' E, in the precision of the state."""
    system = start.config.simie_ridge * _eye(start, start.dtype)

    def solve(keys: Tensor, residual: Tensor, _bare: Tensor | None) -> Tensor:
        nonlocal system
        system = system + keys.T @ keys
        return torch.linalg.solve(system, keys.T @ residual)

    return solve


def _ultraedit(start: Start) -> Solve:
    """(K'K + I)^-1 K'V, V from normalised features, in the precision of the state."""
    eye, normaliser = _eye(start, start.dtype), None

    def solve(keys: Tensor, gradients: Tensor, _bare: Tensor | None) -> Tensor:
        nonlocal normaliser
        features = torch.cat([keys, gradients], 1)
        zero = torch.zeros_like(features[0])
        normaliser = (normaliser or Normaliser(0, zero, zero)).with_batch(features)
        seen, wanted = normaliser(features).split([keys.shape[1], gradients.shape[1]], 1)
        values = -start.config.ultraedit_rate * seen.square().sum(1, keepdim=True) * wanted
        return torch.linalg.solve(keys.T @ keys + eye, keys.T @ values)

    return solve


_MEMIT = _anchored(lambda _start: 0.0, False)
_SOLVES: dict[str, Callable[[Start], Solve]] = {
    "rlsedit": _anchored(lambda start: start.config.lam**2, True),
    "memit": _MEMIT,
    "memit_seq": _anchored(lambda _start: 0.0, True),
    "encore": _anchored(lambda start: start.config.norm_weight, True),
    "alphaedit": _null_space(False),
    "langedit": _null_space(True),
    "evoedit": _evoedit,
    "emmet": _constrained(False, False),
    "rome": _constrained(True, True),
    "r_rome": _constrained(False, True),
    "pmet": _MEMIT,
    "prune": _MEMIT,
    "rect": _MEMIT,
    "lyaplock": _lyaplock,
    "simie": _simie,
    "ultraedit": _ultraedit,
}
_WITHOUT_NOISE = {"evoedit", "emmet", "rome", "r_rome", "simie", "ultraedit", "ft"}
"""Methods whose published solve does not divide by the noise of the configuration."""
