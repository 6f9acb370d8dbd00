"""The edit alone, in one file: useless without its base model, and refused by any other.

W_0 + (W - W_0) is not W in floating point. A delta therefore holds, for each edited weight, either
    bits      the bit patterns of W and W_0, exclusive-or: the same size as W, and W comes back to the last bit, or
    factors   B, A with W = round(W_0 + B A), where the change is of low rank: much smaller, and exact to rounding.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from ..paths import atomic_save_tensors
from .changes import Change, rounded
from .checkpoint import DTYPES, Checkpoint
from .fingerprint import config_fields, digest, fingerprint
from .lowrank import low_rank, noise_edge
from .structure import Structure, config_of, layout_of
from .versions import versions

__all__ = ["Delta", "DeltaEntry", "apply_delta", "delta_changes", "load_delta", "save_delta", "write_delta"]

FORMAT = 1
_KEY = "rlsedit_delta"
_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_PARTS = {"bits": ("bits",), "factors": ("left", "right")}


@dataclass(frozen=True)
class DeltaEntry:
    """One edited weight of a delta.

    Attributes:
        name: parameter of the model.
        layout: "out_in" or "in_out".
        dtype: of the stored weight, such as "bfloat16".
        shape: as stored.
        form: "bits" or "factors".
        rank: of the factors, None for bits.
        before, after: SHA-256 of the bytes of W_0 and of W.
        payload: SHA-256 of what the file holds for this weight.
        error: |W' - W|_F / |W|_F of the weight W' that comes back; 0 for bits.
    """

    name: str
    layout: str
    dtype: str
    shape: tuple[int, int]
    form: str
    rank: int | None
    before: str
    after: str
    payload: str
    error: float


@dataclass(frozen=True)
class Delta:
    """A delta on disk: what it says of itself; weights are read when they are asked for.

    Attributes:
        path: the file.
        base: name of the base model, for people.
        config: architecture fields of the base model.
        fingerprint: of the base model, see `rlsedit.export.fingerprint`.
        method: editing method, or None.
        edits: number of edits, or None.
        versions: of the packages that made it.
        entries: one for each edited weight.
    """

    path: Path
    base: str
    config: Mapping[str, Any]
    fingerprint: str
    method: str | None
    edits: int | None
    versions: Mapping[str, str | None]
    entries: tuple[DeltaEntry, ...]

    def weight(self, entry: DeltaEntry, before: Tensor) -> Tensor:
        """W out of W_0, in the stored layout and dtype.

        Raises:
            ValueError: W_0 is not that of the base model, or the file is damaged.
        """
        self._check(entry, digest(before), before.dtype)
        parts = self._read(entry)
        if entry.form == "factors":
            return _restored(before, parts[0], parts[1], entry.layout)
        kind = _BITS[before.element_size()]
        after = torch.bitwise_xor(before.contiguous().view(kind), parts[0].to(before.device)).view(before.dtype)
        if digest(after) != entry.after:
            raise ValueError(
                f"{self.path}: what comes back for {entry.name} is not what was saved; the file is damaged"
            )
        return after

    def _check(self, entry: DeltaEntry, before: str, dtype: torch.dtype) -> None:
        if (named := str(dtype).removeprefix("torch.")) != entry.dtype:
            raise ValueError(
                f"{self.path}: {entry.name} must be {entry.dtype} as in the base model, got {named}; load the model "
                f"with dtype=torch.{entry.dtype}"
            )
        if before == entry.after:
            raise ValueError(f"{self.path}: {entry.name} holds this edit already; it goes onto the base model only")
        if before != entry.before:
            raise ValueError(
                f"{self.path}: {entry.name} is not that of the base model {self.base!r} the delta was made from: "
                f"another model, or one that has been edited"
            )

    def _read(self, entry: DeltaEntry) -> list[Tensor]:
        try:
            with safe_open(self.path, framework="pt") as file:
                parts = [file.get_tensor(f"{entry.name}:{part}") for part in _PARTS[entry.form]]
        except SafetensorError as error:
            raise ValueError(f"{self.path} cannot be read: {error}") from None
        if _digest_all(parts) != entry.payload:
            raise ValueError(f"{self.path}: the bytes for {entry.name} are not those that were saved; it is damaged")
        return parts


def save_delta(
    base: str | os.PathLike[str] | Checkpoint,
    changes: Sequence[Change],
    out: str | os.PathLike[str],
    *,
    form: str = "auto",
    method: str | None = None,
    edits: int | None = None,
) -> Delta:
    """Write the changes of a model folder as a delta; see `write_delta`."""
    folder = base.folder if isinstance(base, Checkpoint) else Path(base)
    config = config_fields(config_of(folder))
    return write_delta(changes, out, config=config, base=folder.resolve().name, form=form, method=method, edits=edits)


def write_delta(
    changes: Sequence[Change],
    out: str | os.PathLike[str],
    *,
    config: Mapping[str, Any],
    base: str,
    form: str = "auto",
    method: str | None = None,
    edits: int | None = None,
) -> Delta:
    """Write changes as one safetensors file, whole or not at all.

    Args:
        changes: at least one.
        out: the file.
        config: what `config_fields` gives for the base model.
        base: its name.
        form: "bits", "factors", or "auto": factors for a weight where they are smaller and exact to rounding.
        method, edits: said in the file.

    Raises:
        ValueError: an unknown form, a weight that is not finite or of a coarser dtype than the stored one.
        OSError: it cannot be written.
    """
    if form not in ("auto", *_PARTS):
        raise ValueError(f"form must be 'auto', 'bits' or 'factors', got {form!r}")
    tensors: dict[str, Tensor] = {}
    entries = []
    for change in changes:
        entry, parts = _entry(change, form)
        entries.append(entry)
        tensors.update({f"{entry.name}:{p}": value for p, value in zip(_PARTS[entry.form], parts, strict=True)})
    about = {
        "format": FORMAT,
        "base": base,
        "config": dict(config),
        "fingerprint": _fingerprint(config, entries),
        "method": method,
        "edits": edits,
        "versions": versions(),
        "entries": [asdict(entry) for entry in entries],
    }
    atomic_save_tensors(out, tensors, {"format": "pt", _KEY: json.dumps(about)})
    return load_delta(out)


def load_delta(path: str | os.PathLike[str]) -> Delta:
    """Read what a delta says of itself.

    Raises:
        FileNotFoundError: no such file.
        ValueError: no delta, one of a later format, or one whose header has been altered.
    """
    file = Path(path)
    if not file.is_file():
        raise FileNotFoundError(f"delta: no file {file}")
    try:
        with safe_open(file, framework="pt") as stream:
            about, names = (stream.metadata() or {}).get(_KEY), set(stream.keys())
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{file} is no delta, or damaged: {error}") from None
    if about is None:
        raise ValueError(f"{file} is a safetensors file, but no delta of rlsedit")
    try:
        content = json.loads(about)
        if content["format"] != FORMAT:
            raise ValueError(f"{file} is a delta of format {content['format']}, this version reads {FORMAT}")
        entries = tuple(DeltaEntry(**{**row, "shape": tuple(row["shape"])}) for row in content["entries"])
        delta = Delta(
            file, content["base"], content["config"], content["fingerprint"], content["method"], content["edits"],
            content["versions"], entries,
        )  # fmt: skip
        wanted = {f"{entry.name}:{part}" for entry in entries for part in _PARTS[entry.form]}
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{file}: the header of the delta is incomplete: {type(error).__name__} {error}") from None
    if _fingerprint(delta.config, entries) != delta.fingerprint or wanted != names:
        raise ValueError(f"{file}: the header of the delta does not fit its content; it has been altered")
    return delta


@torch.no_grad()
def apply_delta(model: nn.Module, delta: Delta | str | os.PathLike[str]) -> Delta:
    """Put the edited weights into a model that was loaded from the base, all of them or none.

    Args:
        model: the base model, in the dtype of its files.
        delta: what `load_delta` gives, or the file.

    Raises:
        ValueError: another architecture or base model, one that has been edited, another dtype, a damaged file; the
            message names the weight, and the model is as it was.
    """
    delta = delta if isinstance(delta, Delta) else load_delta(delta)
    _same_architecture(delta, config_fields(model.config))
    pending: list[tuple[Tensor, Tensor]] = []
    for entry in delta.entries:
        try:
            module = model.get_submodule(entry.name.removesuffix(".weight"))
        except AttributeError:
            raise ValueError(f"{delta.path}: the model has no {entry.name}; needs {delta.base!r}") from None
        weight = getattr(module, "weight", None)
        if layout_of(module) != entry.layout or not isinstance(weight, Tensor) or tuple(weight.shape) != entry.shape:
            raise ValueError(
                f"{delta.path}: {entry.name} must be a plain linear layer of shape {entry.shape}, got "
                f"{type(module).__name__}; needs the base model without adapters and unquantised"
            )
        pending.append((weight, delta.weight(entry, weight.detach())))
    for weight, value in pending:
        weight.copy_(value)
    return delta


def delta_changes(base: Checkpoint, delta: Delta) -> list[Change]:
    """The changes of a delta against the folder of its base model; all are checked against it now.

    Raises:
        ValueError: another architecture or base model, or one that has been edited; the message names the weight.
    """
    _same_architecture(delta, config_fields(config_of(base.folder)))
    structure = Structure.of_folder(base.folder)
    tensors = {structure.parameter(name): name for name in base.entries}
    found = []
    for entry in delta.entries:
        name = tensors.get(entry.name)
        if name is None or base.entries[name].shape != entry.shape:
            raise ValueError(f"{delta.path}: {base.folder} has no {entry.name} of shape {entry.shape}")
        delta._check(entry, base.digest(name), DTYPES.get(base.entries[name].code, torch.uint8))
        found.append(
            Change(
                entry.name, name, entry.layout, getattr(torch, entry.dtype), entry.shape,
                lambda name=name: base.tensor(name),  # type: ignore[misc]
                lambda name=name, entry=entry: delta.weight(entry, base.tensor(name)),  # type: ignore[misc]
            )
        )  # fmt: skip
    return found


def _entry(change: Change, form: str) -> tuple[DeltaEntry, list[Tensor]]:
    before, after = change.before().detach().cpu().contiguous(), rounded(change)
    parts, rank, error, kind = [], None, 0.0, form
    if form != "bits":
        wide = change.after().detach().cpu()
        found = low_rank(change.difference().cpu(), noise_edge(before, wide.dtype))
        smaller = found.rank * sum(change.shape) * found.left.element_size() < after.nbytes
        fine = change.dtype != torch.float64 and wide.dtype in (torch.float32, torch.float64)
        kind = "factors" if form == "factors" or (smaller and fine) else "bits"
        if kind == "factors":
            parts, rank = [found.left, found.right], found.rank
            back = _restored(before, parts[0], parts[1], change.layout).double()
            error = float((back - after.double()).norm() / after.double().norm())
    if kind == "bits":
        bits = _BITS[after.element_size()]
        parts = [torch.bitwise_xor(before.view(bits), after.view(bits))]
    dtype = str(change.dtype).removeprefix("torch.")
    entry = DeltaEntry(
        change.parameter, change.layout, dtype, change.shape, kind, rank, digest(before), digest(after),
        _digest_all(parts), error,
    )  # fmt: skip
    return entry, parts


def _restored(before: Tensor, left: Tensor, right: Tensor, layout: str) -> Tensor:
    change = left.to(before.device).double() @ right.to(before.device).double()
    return (before.double() + (change if layout == "out_in" else change.T)).to(before.dtype)


def _digest_all(parts: Sequence[Tensor]) -> str:
    return "-".join(digest(part) for part in parts)


def _fingerprint(config: Mapping[str, Any], entries: Sequence[DeltaEntry]) -> str:
    return fingerprint(config, [(entry.name, entry.dtype, entry.shape, entry.before) for entry in entries])


def _same_architecture(delta: Delta, config: Mapping[str, Any]) -> None:
    for name, value in delta.config.items():
        if config.get(name) != value:
            raise ValueError(
                f"{delta.path}: was made from {delta.base!r} with {name} = {value!r}, this model has "
                f"{config.get(name)!r}"
            )
