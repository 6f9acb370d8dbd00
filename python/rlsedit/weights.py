"""Edited weights in row form, with float32 masters for half-precision models and bit-exact undo."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .models.adapter import Adapter


class EditedWeights:
    """The weights of the edited layers; of a model that lies on many processes the parts that are here.

    A float32 or float64 weight is changed in place. A bf16 or fp16 weight is a rounding of a float32 master, so that
    many small changes are not rounded away one by one.

    Args:
        adapter: the model.
        layers: edited layers.

    Raises:
        ValueError: a weight holds NaN or Inf.
    """

    def __init__(self, adapter: Adapter, layers: Sequence[int]) -> None:
        self._adapter, self._together = adapter, adapter.processes.together
        self.whole = not adapter.processes.many
        views = {n: adapter.rows(n) for n in layers}
        with self._together("Editor"):
            for n, view in views.items():
                if not bool(view.isfinite().all()):
                    raise ValueError(
                        f"Editor: model must have finite weights, got NaN or Inf in {adapter.module} of layer {n}"
                    )
        self._masters = {
            n: view.to(torch.float32, copy=True)
            for n, view in views.items()
            if view.dtype in (torch.float16, torch.bfloat16)
        }
        self._levels: list[dict[int, tuple[Tensor, Tensor | None]]] = [{}]

    def dtype(self, layer: int) -> torch.dtype:
        """Precision in which this layer is edited: float32, or float64 for a float64 model."""
        return torch.float64 if self._view(layer).dtype == torch.float64 else torch.float32

    def wide(self, layer: int) -> Tensor:
        """The weight (d, v) as it is, in the precision of `dtype`: the parameter itself or its master; not a copy."""
        master = self._masters.get(layer)
        return self._view(layer) if master is None else master

    @torch.no_grad()
    def show(self, layer: int, value: Tensor) -> None:
        """Let the model see `value` (d, v), rounded to its dtype; taken back by `add`'s caller or `undo`."""
        self._save(layer)
        self._view(layer).copy_(value)

    @torch.no_grad()
    def put(self, layer: int, value: Tensor) -> None:
        """W becomes `value` (d, v), given in the precision of `dtype`; taken back by `undo`.

        Raises:
            ValueError: it does not fit.
        """
        wide = self.wide(layer)
        if value.shape != wide.shape or value.dtype != wide.dtype:
            raise ValueError(
                f"Editor: the weight of layer {layer} must be {wide.dtype} of shape {tuple(wide.shape)}, got "
                f"{value.dtype} of {tuple(value.shape)}"
            )
        self._save(layer)
        self._view(layer).copy_(value)
        if layer in self._masters:
            self._masters[layer] = value

    @torch.no_grad()
    def add(self, layer: int, update: Tensor) -> None:
        """W += update (d, v), remembering what was there until `keep` or `undo`.

        Raises:
            ValueError: the update, or the weight with it, is not finite; nothing is changed.
        """
        view, master = self._view(layer), self._masters.get(layer)
        with self._together(f"Editor: layer {layer}"):
            changed = (view if master is None else master) + update
            rounded = changed.to(view.dtype)
            if not bool(rounded.isfinite().all()):
                raise ValueError(f"Editor: the update of layer {layer} must be finite in {view.dtype}, got NaN or Inf")
        self._save(layer)
        view.copy_(rounded)
        if master is not None:
            self._masters[layer] = changed

    def _view(self, layer: int) -> Tensor:
        """The parameter; FSDP2 may have it elsewhere after a forward pass, so that it is asked for each time."""
        return self._adapter.rows(layer)

    def nest(self) -> None:
        """From here on `undo` goes back to this point only; `revert` and `keep` see all changes."""
        self._levels.append({})

    def keep(self) -> None:
        """Make the changes since the last `keep` final."""
        self._levels = [{}]

    def undo(self) -> None:
        """Put back, bit for bit, what was there at the last `keep` or `nest`."""
        self._put_back(self._levels[-1])
        self._levels[-1] = {}

    def revert(self) -> None:
        """Put back, bit for bit, what was there at the last `keep`."""
        while self._levels:
            self._put_back(self._levels.pop())
        self._levels = [{}]

    def _save(self, layer: int) -> None:
        self._levels[-1].setdefault(layer, (self._view(layer).clone(), self._masters.get(layer)))

    @torch.no_grad()
    def _put_back(self, saved: dict[int, tuple[Tensor, Tensor | None]]) -> None:
        for layer, (weight, master) in saved.items():
            self._view(layer).copy_(weight)
            if master is not None:
                self._masters[layer] = master
