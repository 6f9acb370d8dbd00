"""The machine: what it is, what it can do, and how much memory is left."""

from __future__ import annotations

import contextlib
import ctypes
import platform
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from rlsedit_kernels._version import __version__
from rlsedit_kernels.backends import backends
from rlsedit_kernels.backends.precision import ieee_products
from rlsedit_kernels.profile.counting import Count
from rlsedit_kernels.profile.stages import Clock

__all__ = ["Ceilings", "Peak", "ceilings", "free_bytes", "machine", "used_bytes"]

_COPY_BYTES = {"cpu": 2**28, "cuda": 2**31}
_PRODUCT = {"cpu": 2048, "cuda": 8192}
_ROUNDS = 9


@dataclass(frozen=True)
class Ceilings:
    """What this machine reaches, measured in the same run.

    Attributes:
        bytes_per_s: of a copy, read and written bytes together.
        flops_per_s: of a square matrix product, IEEE, by dtype ("float32", "float64").
    """

    bytes_per_s: float
    flops_per_s: dict[str, float]

    def reached(self, work: Count, seconds: float) -> float | None:
        """The time that work takes at the ceilings over the time that it took; None where nothing was counted.

        Flops and bytes are taken to overlap perfectly; those in float64 have a ceiling of their own.
        """
        if seconds <= 0.0 or (work.flops == 0.0 and work.bytes == 0.0):
            return None
        narrow = (work.flops - work.wide) / self.flops_per_s["float32"]
        return max(narrow + work.wide / self.flops_per_s["float64"], work.bytes / self.bytes_per_s) / seconds


def ceilings(device: torch.device) -> Ceilings:
    """The best of a few copies and matrix products: what a step could reach."""
    rates = {
        str(dtype).removeprefix("torch."): _product_rate(dtype, device) for dtype in (torch.float32, torch.float64)
    }
    return Ceilings(_copy_rate(device), rates)


def _copy_rate(device: torch.device) -> float:
    source = torch.ones(_COPY_BYTES.get(device.type, 2**28) // 4, device=device)
    target = torch.empty_like(source)
    return 2.0 * source.numel() * source.element_size() / _best(lambda: target.copy_(source), device)


def _product_rate(dtype: torch.dtype, device: torch.device) -> float:
    n = _PRODUCT.get(device.type, 2048)
    a = torch.randn(n, n, dtype=dtype, device=device)
    out = torch.empty_like(a)
    with ieee_products():
        return 2.0 * n**3 / _best(lambda: torch.mm(a, a, out=out), device)


def _best(action: Any, device: torch.device) -> float:
    seconds = []
    action()
    for _ in range(_ROUNDS):
        with Clock(device) as clock:
            action()
        seconds.append(clock.seconds)
    return min(seconds)


def free_bytes(device: torch.device) -> float:
    """Memory that can still be taken on the device; infinite where the system does not tell."""
    if device.type == "cuda":
        return float(torch.cuda.mem_get_info(device)[0])
    try:
        lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return float("inf")
    return next((1024.0 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable")), float("inf"))


def used_bytes(device: torch.device) -> float | None:
    """Memory in use now: the allocator's count on a GPU, the resident set elsewhere (Linux); None where unknown."""
    if device.type == "cuda":
        return float(torch.cuda.memory_allocated(device))
    with contextlib.suppress(OSError, AttributeError, TypeError):  # glibc keeps what was freed: give it back first
        ctypes.CDLL(None).malloc_trim(0)
    try:
        return _status("VmRSS")
    except OSError:
        return None


class Peak:
    """Most memory that a block takes beyond what is in use before it: `bytes`, None where that cannot be read.

    On a GPU the allocator's own count; on Linux the high-water mark of the resident set.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._before: float | None = None
        self.bytes: float | None = None

    def __enter__(self) -> Peak:
        self._before = used_bytes(self._device)
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
            return self
        try:
            Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
        except OSError:
            self._before = None
        return self

    def __exit__(self, *_: object) -> None:
        if self._before is None:
            return
        cuda = self._device.type == "cuda"
        now = float(torch.cuda.max_memory_allocated(self._device)) if cuda else _status("VmHWM")
        self.bytes = max(0.0, now - self._before)


def _status(field: str) -> float:
    for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
        if line.startswith(field + ":"):
            return 1024.0 * int(line.split()[1])
    raise OSError(f"/proc/self/status has no {field}")


def machine(device: torch.device | None = None) -> dict[str, Any]:
    """Device, versions and threads: what a figure means nothing without."""
    found: dict[str, Any] = {
        "cpu": _cpu(),
        "threads": torch.get_num_threads(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "rlsedit_kernels": __version__,
        "backends": [row.name for row in backends() if row.available],
        "date": time.strftime("%Y-%m-%d"),
    }
    if device is not None and device.type == "cuda":
        found["gpu"] = torch.cuda.get_device_name(device)
        found["cuda"] = torch.version.cuda
    return found


def _cpu() -> str:
    """Name of the processor, with family and model where they are told: a virtual machine may have the make alone for a
    name, whatever its generation is."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or "unknown"
    told: dict[str, str] = {}
    for line in lines:
        name, _, value = line.partition(":")
        told.setdefault(name.strip(), value.strip())  # of the first processor
    kind = [f"{word} {told[name]}" for word, name in (("family", "cpu family"), ("model", "model")) if name in told]
    return " ".join(filter(None, (told.get("model name", "unknown"), f"({', '.join(kind)})" if kind else "")))
