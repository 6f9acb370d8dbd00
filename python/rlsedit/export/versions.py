"""Versions of what an export was made with."""

from __future__ import annotations

from importlib import metadata

__all__ = ["versions"]

_PACKAGES = ("rlsedit-kernels", "torch", "transformers", "safetensors")


def versions() -> dict[str, str | None]:
    """Package -> version, None where it is not installed as a package."""
    found: dict[str, str | None] = {}
    for name in _PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
    return found
