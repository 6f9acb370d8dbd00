"""One step of a stream as it is kept: all it takes to repeat it bit for bit, and to take rows of a batch back."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..facts import Fact
from . import tensors as files
from .errors import StoreError

__all__ = ["KINDS", "Entry", "LayerRows", "Record", "encode", "load"]

FORMAT = 1
KINDS = ("batch", "remove", "finish", "undo", "reset")
"""Writes facts; takes edits back; the method's step at the end of a sequence; takes the step before back; all of it."""


@dataclass(frozen=True)
class LayerRows:
    """One batch at one layer, in the precision of the edit.

    Attributes:
        keys: K (u, d).
        residual: E (u, v), what was handed to the solve.
        target: K (W - W_0) + E (u, v), the pseudo-target V = K W + E less K W_0.
        bare: (u, d) keys of the bare prompts where the method reads them.
        seen: keys of the editor underneath (SimIE), whose rows are others.
        change: (d, v), of a method without a solve (fine-tuning), in the place of all others.
    """

    keys: Tensor | None = None
    residual: Tensor | None = None
    target: Tensor | None = None
    bare: Tensor | None = None
    seen: Tensor | None = None
    change: Tensor | None = None

    def to(self, device: torch.device | str) -> LayerRows:
        """On another device."""
        parts = {name: value for name in _ROWS if (value := getattr(self, name)) is not None}
        return LayerRows(**{name: value.to(device) for name, value in parts.items()})


_ROWS = ("keys", "residual", "target", "bare", "seen", "change")


@dataclass(frozen=True)
class Record:
    """One step.

    Attributes:
        number: 1, 2, ... in the order written.
        kind: one of `KINDS`.
        time: UTC, ISO 8601.
        facts: of a batch, in the order of its rows.
        removed: ids that the step takes out of the model: those named, or those a batch replaces.
        owners: index of the fact of each row; empty where row i is that of fact i.
        noise: of the batch.
        layers: what was written at each layer.
        sums: hash of each weight (its float32 master for a half-precision model) behind the step.
        sizes: |W - W_0|^2 of each layer behind the step.
        report: figures of the batch.
    """

    number: int
    kind: str
    time: str
    facts: tuple[Fact, ...] = ()
    removed: tuple[str, ...] = ()
    owners: tuple[int, ...] = ()
    noise: float = 0.0
    layers: Mapping[int, LayerRows] = field(default_factory=dict)
    sums: Mapping[int, str] = field(default_factory=dict)
    sizes: Mapping[int, float] = field(default_factory=dict)
    report: Mapping[str, Any] = field(default_factory=dict)

    @property
    def ids(self) -> tuple[str, ...]:
        """Ids of the facts of a batch."""
        return tuple(fact.id for fact in self.facts)

    def rows_of(self, positions: set[int]) -> Tensor:
        """Indices of the rows of the facts at these positions, ascending."""
        owners = self.owners or tuple(range(len(self.facts)))
        return torch.tensor(
            [i for i, owner in enumerate(owners) if owner in positions], dtype=torch.int64, device="cpu"
        )

    def entry(self, digest: str = "") -> Entry:
        """What is kept of the record in memory."""
        about = tuple((fact.subject, sys.intern(fact.prompt), sys.intern(fact.relation)) for fact in self.facts)
        return Entry(self.number, self.kind, self.ids, self.removed, about, digest)


@dataclass(frozen=True, slots=True)
class Entry:
    """A record without tensors and texts.

    Attributes:
        number, kind, ids, removed: as in `Record`.
        about: (subject, prompt, relation) of each fact.
        digest: of its file.
        damaged: whether its file is no longer whole; ids then come from the ledger.
    """

    number: int
    kind: str
    ids: tuple[str, ...]
    removed: tuple[str, ...]
    about: tuple[tuple[str, str, str], ...]
    digest: str = ""
    damaged: bool = False


def encode(record: Record, parent: str) -> Iterator[bytes]:
    """The file of a record; `parent` is the hash of the file before it."""
    metadata = {
        "format": FORMAT,
        "number": record.number,
        "kind": record.kind,
        "time": record.time,
        "parent": parent,
        "facts": [fact.to_dict() for fact in record.facts],
        "removed": record.removed,
        "owners": record.owners,
        "noise": record.noise,
        "sums": {str(n): value for n, value in record.sums.items()},
        "sizes": {str(n): value for n, value in record.sizes.items()},
        "report": dict(record.report),
    }
    parts = {
        f"{n}.{name}": value
        for n, rows in record.layers.items()
        for name in _ROWS
        if (value := getattr(rows, name)) is not None
    }
    return files.blocks(parts, metadata)


def load(path: Path, device: torch.device | str | None = None) -> tuple[Record, str]:
    """A record and the hash of its parent; tensors only where a device is given.

    Raises:
        StoreError: the file is not whole or of another format.
    """
    content: Any = files.read_metadata(path)
    try:
        if content["format"] != FORMAT or content["kind"] not in KINDS:
            raise StoreError(f"{path}: format must be {FORMAT}, got {content['format']!r}")
        layers: dict[int, dict[str, Tensor]] = {}
        if device is not None:
            for key, value in files.read(path, device).items():
                layer, _, name = key.partition(".")
                layers.setdefault(int(layer), {})[name] = value
        record = Record(
            number=content["number"],
            kind=content["kind"],
            time=content["time"],
            facts=tuple(Fact(**fact) for fact in content["facts"]),
            removed=tuple(content["removed"]),
            owners=tuple(content["owners"]),
            noise=content["noise"],
            layers={n: LayerRows(**parts) for n, parts in layers.items()},
            sums={int(n): value for n, value in content["sums"].items()},
            sizes={int(n): value for n, value in content["sizes"].items()},
            report=content["report"],
        )
        return record, content["parent"]
    except (KeyError, TypeError, AttributeError) as error:
        raise StoreError(f"{path}: is no record of edits: {error!r}") from None


def figures(report: object) -> dict[str, Any]:
    """A report's dataclass as JSON-ready values."""
    return asdict(report)  # type: ignore[call-overload]
