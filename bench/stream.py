"""Does a batch cost the same, in time and memory, after 200 batches as after 20?

Two states of one stream, one 20 batches old and one 200, are updated in turns. Memory is the resident set of the
process; the peak of an update is its high-water mark, reset before the update (Linux).
"""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Callable
from pathlib import Path

import torch
from harness import arguments, in_turns, report, summary

import rlsedit_kernels as rk


def status(field: str) -> int:
    """A field of /proc/self/status in bytes."""
    for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {field}")


def release() -> None:
    """Give freed memory back to the system, so that the resident set is what is in use."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)


def peak_of(action: Callable[[], object]) -> int:
    """Bytes by which the resident set rises at most while `action` runs, above what is in use before it."""
    release()
    before = status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
    action()
    return status("VmHWM") - before


def main() -> None:
    parser = arguments(__doc__.splitlines()[0])
    parser.add_argument("--d", type=int, default=4096)
    parser.add_argument("--u", type=int, default=100)
    parser.add_argument("--v", type=int, default=4096)
    parser.add_argument("--early", type=int, default=20)
    parser.add_argument("--late", type=int, default=200)
    parser.add_argument("--repeat", type=int, default=15)
    options = parser.parse_args()
    d, u, v = options.d, options.u, options.v
    generator = torch.Generator().manual_seed(0)
    batches = [(torch.randn(u, d, generator=generator), torch.randn(u, v, generator=generator)) for _ in range(8)]
    W = torch.randn(d, v, generator=generator) / d**0.5
    rows = []
    state_bytes = 4 * d * d + 8 * d * v  # what the filter keeps: C, W and the W_0 of its bounds
    for form in ("plain", "whitened"):
        prior = rk.Prior.ridge(d, 100.0)  # nothing to factor
        dense = 0 if form == "plain" else int(0.75 * d / u) + 1  # batches after which a matrix is kept
        ages = {"early": max(options.early, dense), "late": max(options.late, dense + options.late)}
        filters, resident = {}, {}
        for name, age in ages.items():
            filters[name] = rk.RLSFilter(W, prior, layout="in_out", form=form)
            for i in range(age):
                filters[name].update(*batches[i % 8])
                if i + 1 in ages.values():
                    release()
                    resident[name, i + 1] = status("VmRSS")
        growth = resident["late", ages["late"]] - resident["late", ages["early"]]
        peaks = {name: peak_of(lambda rls=rls: rls.update(*batches[0])) for name, rls in filters.items()}
        seconds = in_turns(
            {name: (lambda i, rls=rls: rls.update(*batches[i % 8])) for name, rls in filters.items()},
            dict.fromkeys(filters, options.repeat),
        )
        first = summary(seconds["early"])["median_ms"]
        for name in filters:
            time = summary(seconds[name])
            rows.append(
                {
                    "form": form,
                    "batches": ages[name],
                    **time,
                    "ratio_to_early": time["median_ms"] / first,
                    "peak_extra_percent": 100.0 * peaks[name] / state_bytes,
                    "memory_growth_MB": growth / 1e6 if name == "late" else 0.0,
                }
            )
        del filters
    settings = {"d": d, "u": u, "v": v, "dtype": "float32", "prior": "ridge", "state_MB": state_bytes / 1e6}
    report("stream", settings, rows, options.json)


if __name__ == "__main__":
    main()
