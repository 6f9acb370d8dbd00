"""How the native parts were built and what they can do here: what is no op."""

from __future__ import annotations

import importlib
from typing import Any


def build_info() -> dict[str, Any]:
    """Compiler, flags, torch headers and engines of the native library.

    Returns:
        version, compiler, flags, build_type, torch_target, torch_headers, blas, and per dtype the engines that
        were compiled and the one in use on this processor; {"reason": ...} where the native parts are missing.
    """
    try:
        native = importlib.import_module("rlsedit_kernels._info")
    except ImportError as error:
        return {"reason": f"the native parts are not installed: {error}"}
    return {**native.build_info(), **native.capabilities()}
