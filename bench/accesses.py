"""How do the compiled GPU kernels reach memory? Rounds of shared memory and sectors of global memory, without a GPU.

What nvcc and Triton make of the kernels (PTX for sm_90a) runs on the emulator of the tests and is counted there: exact
numbers of instructions, bank conflicts and sectors, and nothing of time. A round is one in which the 32 banks of shared
memory serve a warp, a sector 32 bytes of global memory; "times the least": beside the fewest for the same words.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable
from typing import Any

import checkout  # noqa: F401
import torch
from cuda_resources import readable
from harness import arguments, report

BACKENDS = ("cuda", "triton")


def cases(d: int, u: int, v: int) -> dict[str, tuple[str, tuple[Any, ...]]]:
    """Op and arguments by what is tried."""
    made = torch.Generator("cpu").manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=made, device="cpu")

    A = normal(d, d) / d**0.5
    C = A @ A.mT + torch.eye(d, device="cpu")
    C = (C + C.mT) / 2
    K, V, W, gain = normal(u, d), normal(u, v), normal(d, v), 0.01 * normal(d, u)
    R, few = torch.linalg.cholesky(C).mT.contiguous(), min(u, 16)
    return {
        "rls_update_": ("rls_update_", (C, K, 1.0, 1.0)),
        "weight_update_, rows": ("weight_update_", (W, K, V, gain)),
        "weight_update_, nn.Linear": ("weight_update_", (W.mT.contiguous().mT, K, V, gain)),
        "downdate_gain_products_, 16 keys": (
            "downdate_gain_products_", (C, gain[:, :few].contiguous(), K[:few].contiguous(), -1.0)
        ),
        "qr_append_": ("qr_append_", (R, K)),
        "qr_gain": ("qr_gain", (R, K)),
    }  # fmt: skip


def kernels_of(backend: str) -> Callable[..., object]:
    """`call(op, *arguments)` on the emulator, in 3xTF32."""
    from support.ptx import triton_driver

    from rlsedit_kernels.backends import cuda
    from rlsedit_kernels.triton_kernels import KERNELS

    if backend == "triton":
        triton_driver.install()
    table = KERNELS if backend == "triton" else cuda.kernels("CPU")
    return lambda op, *args: table[op](*args, input_precision="tf32x3")


def counted(call: Callable[..., object], op: str, given: tuple[Any, ...]) -> list[Any]:
    """The kernels of a call, counted."""
    from support.ptx import profile

    with profile.counted() as found:
        call(op, *given)
    return found.kernels


def rows_of(backend: str, case: str, u: int, kernels: list[Any]) -> list[dict[str, Any]]:
    """A row for every kernel of a call."""
    names = readable([kernel.name for kernel in kernels])
    rows = []
    for kernel in kernels:
        row: dict[str, Any] = {"backend": backend, "case": case, "u": u, "kernel": names[kernel.name]}
        row |= {"blocks": kernel.blocks, "threads": kernel.threads}
        row["instructions_per_thread"] = {k: n / kernel.threads for k, n in kernel.instructions.items()}
        for space, name in (("shared", "rounds"), ("global", "sectors")):
            sites = [site for site in kernel.sites if site.space == space]
            row[name] = sum(site.cost for site in sites)
            row[f"least_{name}"] = sum(site.least for site in sites)
            row[f"worst_{name}"] = worst(sites)
        rows.append(row)
    return rows


def worst(sites: list[Any], count: int = 3) -> list[dict[str, Any]]:
    """Lines that cost most above the least."""
    lines: dict[tuple[str, str], list[int]] = {}
    for site in sites:
        sums = lines.setdefault((site.instruction, site.line), [0, 0])
        sums[0] += site.cost
        sums[1] += site.least
    ordered = sorted(lines.items(), key=lambda item: item[1][1] - item[1][0])[:count]
    return [
        {"instruction": name, "line": line, "cost": cost, "least": least}
        for (name, line), (cost, least) in ordered
        if cost > least
    ]


def printed(row: dict[str, Any]) -> str:
    instructions = sum(row["instructions_per_thread"].values())
    text = f"{row['backend']:7s} {row['case']:34s} u={row['u']:<4d} {row['kernel'][:40]:40s} {row['blocks']:4d} blocks"
    text += f" {instructions:7.0f} instructions a thread"
    for name in ("rounds", "sectors"):
        if least := row[f"least_{name}"]:
            text += f" {row[name] / row['blocks']:9.0f} {name} a block ({row[name] / least:.2f})"
    for name in ("rounds", "sectors"):
        for place in row[f"worst_{name}"]:
            if place["cost"] - place["least"] > 0.05 * row[name]:
                text += (
                    f"\n        {place['cost']} {name} for {place['least']}: {place['instruction']} at {place['line']}"
                )
    return text


def main() -> None:
    parser = arguments((__doc__ or "").splitlines()[0])
    parser.add_argument("--backends", nargs="+", default=BACKENDS, choices=BACKENDS)
    parser.add_argument("--only", help="cases whose names contain this")
    parser.add_argument("--d", type=int, default=512)
    parser.add_argument("--u", type=int, nargs="+", default=[100, 50])
    parser.add_argument("--v", type=int, default=256)
    options = parser.parse_args()
    from support import emulated

    if "cuda" in options.backends:  # for Triton's kernels alone nvcc is not needed
        emulated.use_ptx()
        try:
            emulated.load()
        except emulated.CannotEmulate as error:
            parser.error(str(error))
    rows = []
    for backend in options.backends:
        call = kernels_of(backend)
        for u in options.u:
            for case, (op, given) in cases(options.d, u, options.v).items():
                if options.only and options.only not in case:
                    continue
                found = rows_of(backend, case, u, counted(call, op, given))
                print("\n".join(map(printed, found)), flush=True)
                rows += found
    settings = {"d": options.d, "u": list(options.u), "v": options.v}
    if "triton" in options.backends:
        settings["triton"] = importlib.metadata.version("triton")
    report("accesses", settings, rows, options.json)


if __name__ == "__main__":
    main()
