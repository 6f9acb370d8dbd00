"""What an edit changed: linear weights before and after, read when they are asked for."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..models.adapter import Adapter
from ..models.families import FAMILIES
from .checkpoint import DTYPES, Checkpoint
from .fingerprint import config_fields
from .structure import Structure, config_of

__all__ = ["UNCHANGED", "Change", "between", "change_of_layer", "changes_of_model", "given", "rounded"]

UNCHANGED = "the model does not differ from the one the editor was made with: nothing to export"


@dataclass(frozen=True)
class Change:
    """One edited weight.

    Attributes:
        parameter: its name in the model, such as "model.layers.4.mlp.down_proj.weight".
        tensor: its name on disk, the same but for a few families.
        layout: "out_in" (`nn.Linear`) or "in_out" (`Conv1D`).
        dtype: in which it is stored.
        shape: as it is stored.
        before: W_0, in the stored layout and dtype.
        after: W, in the stored layout; float32 or float64 where a master of it is there.
    """

    parameter: str
    tensor: str
    layout: str
    dtype: torch.dtype
    shape: tuple[int, int]
    before: Callable[[], Tensor]
    after: Callable[[], Tensor]

    @property
    def module(self) -> str:
        """Name of the linear module in the model."""
        return self.parameter.removesuffix(".weight")

    def is_nothing(self) -> bool:
        """Whether W is W_0, bit for bit."""
        after = self.after()
        return torch.equal(self.before().to(after.dtype), after)

    def difference(self) -> Tensor:
        """W - W_0 (out, in), float64."""
        change = self.after().double() - self.before().double()
        return change if self.layout == "out_in" else change.T


def rounded(change: Change) -> Tensor:
    """W in the dtype it is stored in, rounded once, contiguous and on the CPU.

    Raises:
        ValueError: wrong shape, a dtype coarser than the stored one, or a value that is not finite after rounding.
    """
    after = change.after().detach()
    if tuple(after.shape) != change.shape:
        raise ValueError(f"{change.tensor} must have shape {change.shape}, got {tuple(after.shape)}")
    if after.dtype != change.dtype and not _holds(after.dtype, change.dtype):
        raise ValueError(
            f"{change.tensor} is stored in {change.dtype}; needs a weight of that dtype or a wider one, so that it is "
            f"rounded once, got {after.dtype}"
        )
    result = after.to(device="cpu", dtype=change.dtype).contiguous()
    if not bool(result.isfinite().all()):
        raise ValueError(f"{change.tensor} must be finite in {change.dtype}, got NaN or Inf")
    return result


def between(base: Checkpoint, edited: Checkpoint) -> list[Change]:
    """The weights in which two folders differ, found file by file.

    Raises:
        ValueError: the folders hold other tensors, other shapes or dtypes, or differ in something that is not a linear
            weight; or they do not differ at all.
    """
    structure = Structure.of_folder(base.folder)
    mine, theirs = config_fields(config_of(base.folder)), config_fields(config_of(edited.folder))
    if other := [name for name in mine if mine[name] != theirs[name]]:
        raise ValueError(
            f"base and edited model must be of one architecture; {other[0]} is {mine[other[0]]!r} in "
            f"{base.folder} and {theirs[other[0]]!r} in {edited.folder}"
        )
    ours = {structure.parameter(name): name for name in base.entries}
    others = {structure.parameter(name): name for name in edited.entries}
    for one, names, another in ((base, ours, others), (edited, others, ours)):
        for parameter, name in names.items():
            if parameter not in another and parameter in structure.names and not one.has_copy(name):
                where = edited.folder if one is base else base.folder
                raise ValueError(f"{name} is in {one.folder} and not in {where}; needs two copies of one model")
    found = []
    for parameter in (name for name in ours if name in others):
        if not base.same_bytes(ours[parameter], edited, others[parameter]):
            found.append(_changed(base, ours[parameter], edited, others[parameter], parameter, structure))
    if not found:
        raise ValueError(f"{edited.folder} does not differ from {base.folder}: nothing to export")
    return found


def given(base: Checkpoint, weights: Mapping[str | int, Tensor]) -> list[Change]:
    """The weights that are to replace those of a folder.

    Args:
        base: the folder.
        weights: by tensor or parameter name, in the stored layout; or by layer, for the module that is edited in this
            family, in row form (d, v).

    Raises:
        ValueError: a name or layer that is not there, something that is not a linear weight, nothing at all.
    """
    structure = Structure.of_folder(base.folder)
    tensors = {structure.parameter(name): name for name in base.entries}
    found = []
    for key, weight in weights.items():
        parameter = _edited_parameter(base, key) if isinstance(key, int) else structure.parameter(key)
        if parameter not in tensors:
            raise ValueError(f"weights: {key!r} is not in {base.folder}")
        name = tensors[parameter]
        layout = _linear(structure, parameter, name, base.entries[name].shape, base.folder)
        stored = weight.T if isinstance(key, int) and layout == "out_in" else weight
        change = _change(base, name, parameter, layout, lambda stored=stored: stored)  # type: ignore[misc]
        if tuple(stored.shape) != change.shape:
            raise ValueError(f"weights: {key!r} must have shape {change.shape}, got {tuple(stored.shape)}")
        found.append(change)
    if not found:
        raise ValueError("weights must hold at least one weight, got none")
    return found


def changes_of_model(adapter: Adapter, before: Mapping[int, Tensor], after: Mapping[int, Tensor]) -> list[Change]:
    """The edited layers of a model in memory that differ from what they were.

    Args:
        adapter: the model.
        before: W_0 of each layer, row form (d, v), in the dtype of the model.
        after: W of each layer, row form (d, v), float32 masters where the model is bf16 or fp16.

    Raises:
        ValueError: no layer has changed.
    """
    found = []
    for layer in sorted(after):
        change = change_of_layer(adapter, layer, before[layer], after[layer])
        if not change.is_nothing():
            found.append(change)
    if not found:
        raise ValueError(UNCHANGED)
    return found


def change_of_layer(adapter: Adapter, layer: int, before: Tensor, after: Tensor) -> Change:
    """An edited layer of a model in memory, or the part of it that is given, in row form as for `changes_of_model`."""
    module = adapter.edited(layer)
    parameter = next(name for name, part in adapter.model.named_modules() if part is module) + ".weight"
    first, last = _stored(before, adapter.layout), _stored(after, adapter.layout)
    shape = (first.shape[0], first.shape[1])
    return Change(parameter, parameter, adapter.layout, first.dtype, shape, _holding(first), _holding(last))


def _changed(
    base: Checkpoint, name: str, edited: Checkpoint, other: str, parameter: str, structure: Structure
) -> Change:
    mine, theirs = base.entries[name], edited.entries[other]
    if (mine.code, mine.shape) != (theirs.code, theirs.shape):
        raise ValueError(
            f"{name} is {mine.code} {list(mine.shape)} in {base.folder} and {theirs.code} {list(theirs.shape)} in "
            f"{edited.folder}; needs the same dtype and shape (edit and save in the dtype of the base)"
        )
    layout = _linear(structure, parameter, name, mine.shape, base.folder)
    return _change(base, name, parameter, layout, lambda: edited.tensor(other))


def _change(base: Checkpoint, name: str, parameter: str, layout: str, after: Callable[[], Tensor]) -> Change:
    entry = base.entries[name]
    if entry.code not in DTYPES:
        raise ValueError(f"{name} must be one of {sorted(DTYPES)}, got {entry.code}; needs unquantised weights")
    shape = (entry.shape[0], entry.shape[1])
    return Change(parameter, name, layout, DTYPES[entry.code], shape, lambda: base.tensor(name), after)


def _linear(structure: Structure, parameter: str, name: str, shape: Sequence[int], where: object) -> str:
    linear = structure.linear(parameter)
    if linear is None or len(shape) != 2:
        raise ValueError(
            f"{name} in {where} has changed and is no weight of a linear layer (shape {list(shape)}); only linear "
            f"weights can be exported as an edit: was the model fine-tuned, or is this another base?"
        )
    return linear[1]


def _edited_parameter(base: Checkpoint, layer: int) -> str:
    kind = base.config.get("model_type")
    if kind not in FAMILIES:
        raise ValueError(f"weights: the edited module of {kind!r} is not known; name tensors in the place of layers")
    family = FAMILIES[kind]
    return f"{family.layers}.{layer}.{family.module}.weight"


def _stored(rows: Tensor, layout: str) -> Tensor:
    return rows.detach() if layout == "in_out" else rows.detach().T


def _holding(value: Tensor) -> Callable[[], Tensor]:
    return lambda: value


def _holds(wide: torch.dtype, narrow: torch.dtype) -> bool:
    """Whether every value of `narrow` is one of `wide`."""
    return torch.promote_types(wide, narrow) == wide and wide.is_floating_point
