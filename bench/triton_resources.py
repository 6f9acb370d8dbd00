"""What the compiler made of the Triton kernels for sm_90: registers, stack, shared memory, and innermost loops.

No GPU: launches of d = 4096 are compiled ahead of time (triton_launches.py). A column step of `append_kernel` is its
loop with sums between lanes (SHFL).
"""

from __future__ import annotations

import re
import tempfile
from pathlib import Path
from typing import Any

import torch
import triton
from cuda_resources import cuobjdump, output
from harness import arguments, report
from triton_launches import OPS, SIZES, D, compiled, distinct, launches_of

SHORT = 32
"""Loops of up to so many instructions are left out: a program that waits for a flag is in one."""

COUNTED = ("BAR", "SHFL", "LDS", "LDG", "LDL", "STL", "HGMMA", "HMMA", "FFMA", "DFMA", "MUFU")


def loops(sass: str) -> list[list[str]]:
    """Instructions of the innermost loops, of those longer than `SHORT`: from the target of a jump back to the jump."""
    code = [(int(at, 16), text) for at, text in re.findall(r"^\s+/\*([0-9a-f]{4,})\*/\s+(.*?);", sass, re.MULTILINE)]
    place = {at: i for i, (at, _) in enumerate(code)}
    spans = []
    for i, (at, text) in enumerate(code):
        jump = re.search(r"\bBRA\b.*?0x([0-9a-f]+)", text)
        if jump is not None and int(jump[1], 16) < at and (first := place.get(int(jump[1], 16))) is not None:
            spans.append((first, i))
    spans = [(a, b) for a, b in spans if b - a >= SHORT]
    inner = [(a, b) for a, b in spans if not any(a <= c and d <= b and (a, b) != (c, d) for c, d in spans)]
    return [[text for _, text in code[a : b + 1]] for a, b in inner]


def described(body: list[str]) -> str:
    """Its length, and what of it says most."""
    names = [re.sub(r"^@!?U?P[T\d]+ ", "", text).split()[0].split(".")[0] for text in body]
    counts = [f"{names.count(kind)} {kind}" for kind in COUNTED if kind in names]
    return f"{len(body)} instructions" + (f" ({', '.join(counts)})" if counts else "")


def rows_of(tool: str, op: str, dtype: torch.dtype, size: str) -> list[dict[str, Any]]:
    rows = []
    for launch in distinct(launches_of(op, dtype, SIZES[size])):
        made = compiled(launch)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "kernel.cubin"
            path.write_bytes(made.asm["cubin"])
            used = re.search(r"REG:(\d+) STACK:(\d+)", output(tool, "--dump-resource-usage", str(path)))
            sass = output(tool, "--dump-sass", str(path))
        assert used is not None
        found = [described(body) for body in loops(sass)]
        rows.append(
            {
                "op": op,
                "keys": SIZES[size],
                "dtype": str(dtype).removeprefix("torch."),
                "kernel": launch.kernel.fn.__name__,
                "warps": launch.options["num_warps"],
                "registers": int(used[1]),
                "stack_bytes": int(used[2]),
                "shared_bytes": made.metadata.shared,
                "loops": "; ".join(found),
            }
        )
    return rows


def main() -> None:
    parser = arguments((__doc__ or "").splitlines()[0])
    parser.add_argument("--ops", default=",".join(OPS), help="which, with commas between (all)")
    options = parser.parse_args()
    tool = cuobjdump()
    rows = [
        row
        for op in options.ops.split(",")
        for size in SIZES
        for dtype in (torch.float32, torch.float64)
        for row in rows_of(tool, op, dtype, size)
    ]
    report("triton_resources", {"d": D, "target": "sm_90", "triton": triton.__version__}, rows, options.json)


if __name__ == "__main__":
    main()
