"""RLSFilter: a weight kept at the minimiser of a growing least-squares problem with two anchors."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from rlsedit_kernels.backends.precision import ieee_products
from rlsedit_kernels.ops import _checks
from rlsedit_kernels.priors import Prior
from rlsedit_kernels.states import CovarianceState
from rlsedit_kernels.states.batch import BatchFactor
from rlsedit_kernels.states.covariance import finite

_ROWS = 64
_COLUMNS = 1024

LAYOUTS = ("in_out", "out_in")
STATES = ("covariance",)


@dataclass(frozen=True)
class Step:
    """What one batch did; norms are Frobenius norms.

    Attributes:
        innovation_norm: |E|, E = V - K W before the batch (a priori error).
        residual_norm: |V - K W| after it (a posteriori error).
        objective: J_t, the minimum of the objective over all batches so far (docs/mathematics.md, fact 6).
        parameter_bound: |W_t - W_0| is at most this (fact 7); None where lambda = 0 or bounds are not tracked.
        anchor_bound: |K_0 (W_t - W_0)| is at most this (fact 7); None where mu = 0 or bounds are not tracked.
    """

    innovation_norm: float
    residual_norm: float
    objective: float
    parameter_bound: float | None
    anchor_bound: float | None


class RLSFilter:
    """Minimiser of sum_s |K_s W - V_s|^2 / noise_s + lambda^2 |W - W_0|^2 + mu^2 |K_0 (W - W_0)|^2.

    Args:
        weight: W_0, (d, v) for layout "in_out" (row form, `Conv1D`), (v, d) for "out_in" (`nn.Linear`). Kept
            in the dtype of the state: a float16 or bfloat16 weight gets a float32 master.
        prior: S_0 of the recursion.
        state: "covariance" (`CovarianceState`).
        layout: "in_out" or "out_in"; never guessed, because a square weight would hide a mistake.
        form: form of the covariance, as for `CovarianceState`.
        dtype: torch.float32 or torch.float64; None takes that of the weight, float32 for half precision.
        track_bounds: whether to form V - K W_0 as well, which the bounds need: a second product K W a batch
            and a copy of W_0.
        inplace: write to the tensor `weight` itself (its dtype must be that of the state), not to a copy.

    Raises:
        TypeError, ValueError: an argument does not fit.
    """

    def __init__(
        self,
        weight: torch.Tensor,
        prior: Prior,
        state: str = "covariance",
        *,
        layout: str,
        form: str = "auto",
        dtype: torch.dtype | None = None,
        track_bounds: bool = True,
        inplace: bool = False,
    ) -> None:
        if not isinstance(weight, torch.Tensor):
            raise TypeError(f"RLSFilter: weight must be a torch.Tensor, got {type(weight).__name__}")
        if not weight.dtype.is_floating_point:
            raise TypeError(f"RLSFilter: weight must be floating point, got {weight.dtype}; dequantise it first")
        if layout not in LAYOUTS:
            raise ValueError(f"RLSFilter: layout must be 'in_out' or 'out_in', got {layout!r}")
        if state not in STATES:
            raise ValueError(f"RLSFilter: state must be one of {', '.join(map(repr, STATES))}, got {state!r}")
        if not isinstance(prior, Prior):
            raise TypeError(f"RLSFilter: prior must be a Prior, got {type(prior).__name__}")
        axis = 0 if layout == "in_out" else 1
        if weight.dim() != 2 or weight.shape[axis] != prior.d:
            shape = "(d, v)" if axis == 0 else "(v, d)"
            raise ValueError(
                f"RLSFilter: weight must have shape {shape} for layout {layout!r} with d = prior.d = {prior.d}, "
                f"got {tuple(weight.shape)}"
            )
        if not bool(torch.isfinite(weight).all()):
            raise ValueError("RLSFilter: weight must be finite, got NaN or Inf")
        working = dtype or (weight.dtype if weight.dtype in _checks.DTYPES else torch.float32)
        if inplace and weight.dtype != working:
            raise TypeError(
                f"RLSFilter: inplace needs a weight of the dtype of the state, {working}, got {weight.dtype}"
            )
        self.layout = layout
        self.state = CovarianceState(prior, form=form, dtype=working, device=weight.device)
        self._weight = weight.detach() if inplace else weight.detach().to(working, copy=True)
        self._initial = self._weight.clone() if track_bounds else None
        self._objective = 0.0
        self._errors = 0.0  # |E_all|^2, innovations against W_0, each over its noise
        self._forgotten = 1.0  # product of the forgetting factors: what is left of the prior

    @property
    def weight(self) -> torch.Tensor:
        """The weight in its layout, dtype of the state. Not a copy: the next update changes it."""
        return self._weight

    @property
    def objective(self) -> float:
        """J_t of the batches so far."""
        return self._objective

    def update(self, K: torch.Tensor, V: torch.Tensor, noise: float = 1.0, forget: float = 1.0) -> Step:
        """Write a batch: keys K shall map to V.

        Args:
            K: (u, d) keys.
            V: (u, v) targets.
            noise: >= 0, the reciprocal of the weight of the batch; 0 is a hard write.
            forget: forgetting factor in (0, 1].

        Raises:
            TypeError, ValueError, BreakdownError: as `CovarianceState.update`; weight and state untouched.
        """
        K, V = self._pair("update", K, V)
        with ieee_products():
            innovation = torch.addmm(V, K, self._row_form(), alpha=-1.0)
            innovation_norm = _norm(innovation)
            prepared = self.state.prepare(K, noise, forget)
            self._check_size(prepared.gain, innovation_norm)
            self._row_form().addmm_(prepared.gain, innovation)
            self.state.write(prepared)
            whitened_norm, residual_norm = _after(prepared.factored, innovation)
            del prepared, innovation  # peak memory: the bounds need room for one more product
            self._objective = forget * self._objective + forget * whitened_norm**2
            self._track(K, V, noise, forget)
        return self._step(innovation_norm, residual_norm)

    def remove(self, K: torch.Tensor, V: torch.Tensor, noise: float = 1.0) -> Step:
        """Take back a batch: afterwards weight, covariance and objective are those of the stream without it.

        Args:
            K, V, noise: as they were when the batch was written (with forget = 1 since then).

        Returns:
            The step, with `innovation_norm` the error of the batch after removal and `residual_norm` before.

        Raises:
            LeverageError: it cannot be removed in this precision; weight and state untouched.
        """
        K, V = self._pair("remove", K, V)
        with ieee_products():
            residual = torch.addmm(V, K, self._row_form(), alpha=-1.0)
            gain = self.state.remove(K, noise)
            self._row_form().addmm_(gain, residual, alpha=-1.0)
            innovation = torch.addmm(V, K, self._row_form(), alpha=-1.0)
            self._objective -= float((innovation.double() * residual.double()).sum()) / noise
            self._track(K, V, noise, 1.0, sign=-1.0)
        return self._step(_norm(innovation), _norm(residual))

    def _check_size(self, gain: torch.Tensor, innovation_norm: float) -> None:
        """No weight may become Inf: the product must fit the dtype with room for the sum."""
        size, limit = _norm(gain) * innovation_norm, 0.25 * torch.finfo(gain.dtype).max
        if not size < limit:
            raise ValueError(
                f"update: the change of the weight may reach {size:.1e}, which {gain.dtype} cannot hold; scale V"
            )

    def _row_form(self) -> torch.Tensor:
        """W (d, v), a view."""
        return self._weight if self.layout == "in_out" else self._weight.mT

    def _pair(self, op: str, K: object, V: object) -> tuple[torch.Tensor, torch.Tensor]:
        K = self.state._keys(op, K)
        outputs = self._row_form().shape[1]
        if not isinstance(V, torch.Tensor):
            raise TypeError(f"{op}: V must be a torch.Tensor, got {type(V).__name__}")
        if not V.dtype.is_floating_point:
            raise TypeError(f"{op}: V must be floating point, got {V.dtype}")
        if tuple(V.shape) != (K.shape[0], outputs):
            raise ValueError(
                f"{op}: V must have shape (u, v) with u = K.shape[0] = {K.shape[0]} and v = {outputs}, "
                f"got {tuple(V.shape)}"
            )
        if V.device != K.device:
            raise ValueError(f"{op}: V must be on the device of the state, {K.device}, got {V.device}")
        return K, finite(op, "V", V.detach().to(K.dtype))

    def _track(self, K: torch.Tensor, V: torch.Tensor, noise: float, forget: float, sign: float = 1.0) -> None:
        self._forgotten *= forget
        if self._initial is None:
            return
        W_0 = self._initial if self.layout == "in_out" else self._initial.mT
        error = _norm(torch.addmm(V, K, W_0, alpha=-1.0)) ** 2
        self._errors = forget * self._errors + sign * (error / noise if noise > 0.0 else math.inf if error else 0.0)

    def _step(self, innovation_norm: float, residual_norm: float) -> Step:
        return Step(
            innovation_norm=innovation_norm,
            residual_norm=residual_norm,
            objective=self._objective,
            parameter_bound=self._bound(self.state.prior.lam),
            anchor_bound=self._bound(self.state.prior.mu),
        )

    def _bound(self, weight: float | None) -> float | None:
        """|E_all| / (2 lambda), with lambda^2 forgotten like the rest of the prior."""
        if not weight or self._initial is None:
            return None
        return math.sqrt(max(self._errors, 0.0)) / (2.0 * weight * math.sqrt(self._forgotten))


def _after(factored: BatchFactor, innovation: torch.Tensor) -> tuple[float, float]:
    """|root' E| and |E - G root root' E|, the residual, block of columns by block: no buffer of the size of E."""
    whitened_norms, residual_norms = [], []
    for block in innovation.split(_COLUMNS, dim=1):
        error = block.to(factored.G.dtype)
        whitened = factored.root.mT @ error
        whitened_norms.append(_norm(whitened))
        residual_norms.append(_norm(torch.addmm(error, factored.G, factored.root @ whitened, alpha=-1.0)))
    return math.hypot(*whitened_norms), math.hypot(*residual_norms)


def _norm(A: torch.Tensor) -> float:
    """Frobenius norm, accumulated in float64, without a float64 copy of A."""
    return math.hypot(*(float(torch.linalg.vector_norm(part, dtype=torch.float64)) for part in A.split(_ROWS)))
