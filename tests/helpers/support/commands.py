"""`rlsedit edit` on a tiny model on disk: its arguments, what it is given on standard input, and what it leaves."""

from __future__ import annotations

import io
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from rlsedit.store.check import reading

from . import language_models as lm

PAIRS = ["--batch", "2", "--no-evaluate"]


def edit(root: Path, source: Path | str, out: Path, *more: str) -> list[str]:
    """Edits of the model under `root` (`lm.on_disk`) in batches of two."""
    return ["edit", str(root / "llama"), "--facts", str(source), "--out", str(out), "--text", str(root / "text.txt"),
            *lm.SMALL_EDITS, *PAIRS, *more]  # fmt: skip


def resume(model: Path, source: Path | str, out: Path, *more: str) -> list[str]:
    """The folder of an earlier `edit` goes on."""
    return ["edit", str(model), "--facts", str(source), "--out", str(out), "--device", "cpu", *PAIRS, "--resume", *more]


def given(monkeypatch: pytest.MonkeyPatch, *lines: object) -> None:
    """Put records, or lines as they are, on standard input."""
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(encoded(*lines))))


def written(path: Path, records: Iterable[object]) -> Path:
    """A file of JSON lines."""
    path.write_bytes(encoded(*records))
    return path


def encoded(*lines: object) -> bytes:
    """JSON lines of records, and lines as they are."""
    return b"".join(line if isinstance(line, bytes) else json.dumps(line).encode() + b"\n" for line in lines)


def arriving(monkeypatch: pytest.MonkeyPatch, sizes: Iterator[int]) -> None:
    """Let the lines of a stream arrive in these numbers, whatever the speed of the reader."""

    def arrived(queue: Any, batch: int, stop: Any) -> Any:
        found: list[Any] = []
        size = next(sizes)
        while len(found) < size:
            item = queue.get()
            if item is None:
                queue.put(None)
                return found or None
            found.append(item)
        return found

    monkeypatch.setattr("rlsedit.cli.serving._arrived", arrived)


def answers(capsys: pytest.CaptureFixture[str]) -> list[dict[str, Any]]:
    """What was printed since it was asked last, as JSON lines."""
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def states(out: Path) -> dict[str, str]:
    """The state of each request, by its id."""
    with reading(out) as (ledger, _):
        return {row.fact.id: row.state for row in ledger.edits()}


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return dict(AutoModelForCausalLM.from_pretrained(folder, dtype="auto").state_dict())


def same(one: Path, other: Path) -> bool:
    """Whether two models have the same bits."""
    a, b = weights(one), weights(other)
    return all(torch.equal(a[name], b[name]) for name in a)
