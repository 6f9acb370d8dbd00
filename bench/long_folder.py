"""Memory of a process that writes a long stream into a folder: `python bench/long_folder.py [--json FILE]`.

A tiny model, one step of z*, batches of ten. Resident memory after each tenth of the stream, what is on the disk, and
the time that a resume takes at the end.
"""

from __future__ import annotations

import argparse
import json
import logging
import resource
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "helpers"))

import torch
from support.editors import differing, editor, everything, resumed

from rlsedit.facts import Fact


def resident() -> float:
    """MiB in use now."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 2**20


def on_disk(folder: Path, part: str) -> float:
    """MiB."""
    return sum(path.stat().st_size for path in (folder / "rlsedit" / part).rglob("*")) / 2**20


def measure(edits: int, batch: int) -> dict[str, object]:
    """One stream; memory relative to what it was after a tenth of it."""
    one = editor(steps=1, contexts=0)
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        one.save(folder, every=20)
        tenth = edits // 10
        for begin in range(0, edits, batch):
            part = [
                Fact(f"e{i}", "The twin city of {} is", f"Lima {i}", ("Oslo", "Quito", "Tokyo")[i % 3])
                for i in range(begin, begin + batch)
            ]
            one.edit(part)
            if (begin + batch) % tenth == 0:
                rows.append({"edits": begin + batch, "MiB": round(resident(), 2)})
        expected = everything(one)
        one.close()
        del one
        since = time.perf_counter()
        again = resumed(folder)
        seconds = time.perf_counter() - since
        same = differing(everything(again), expected) == []
        again.close()
        sizes = {part: round(on_disk(folder, part), 1) for part in ("base", "records", "snapshots")}
    first = float(rows[0]["MiB"])
    return {
        "edits": edits,
        "batch": batch,
        "memory": rows,
        "largest growth after the first tenth, percent": round(
            100 * (max(float(row["MiB"]) for row in rows) / first - 1), 2
        ),
        "on the disk, MiB": sizes,
        "seconds of a resume": round(seconds, 2),
        "resumed to the same bits": same,
        "torch": torch.__version__,
    }


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--edits", type=int, default=5000)
    parser.add_argument("--batch", type=int, default=10)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    text = json.dumps(measure(args.edits, args.batch), indent=1)
    sys.stdout.write(text + "\n")
    if args.json:
        args.json.write_text(text + "\n")


if __name__ == "__main__":
    main()
