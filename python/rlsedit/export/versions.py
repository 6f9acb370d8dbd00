"""Versions of what an export was made with."""

from __future__ import annotations

from ..report import environment

__all__ = ["versions"]

_PACKAGES = ("rlsedit-kernels", "torch", "transformers", "safetensors")


def versions() -> dict[str, str | None]:
    """Package -> version, None where it is not installed as a package."""
    return environment.versions(_PACKAGES)
