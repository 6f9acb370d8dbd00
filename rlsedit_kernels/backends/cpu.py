"""Loader of the native CPU library: C++ kernels for x86-64 and AArch64 behind torch's stable ABI.

The library implements the schemas of `ops/schemas.py`, and `HELPERS`, in the private namespace
`rlsedit_kernels_cpu`, which is defined here, in Python, before the library is loaded. What goes wrong is reported as a
reason.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch

from rlsedit_kernels.ops.schemas import SCHEMAS

NAMESPACE = "rlsedit_kernels_cpu"

ENGINE_VARIABLE = "RLSEDIT_CPU_ENGINE"
ENGINES = ("baseline", "avx2", "avx512")
"""What the variable may ask for; the library, which reads it itself, takes the best engine up to that one."""

HELPERS: dict[str, str] = {"add_product_": "(Tensor(a!) A, Tensor left, Tensor right, float alpha) -> ()"}
"""Parts of ops that states use by themselves, where the ops of a tensor run on this library (`states/adding.py`)."""

_PACKAGE = Path(__file__).resolve().parent.parent
_LIBRARY = _PACKAGE / "_C_cpu.so"
_NOTE = _PACKAGE / "_native_build.txt"  # written by setup.py when it could not build the library

_definitions: list[torch.library.Library] = []


def _define() -> None:
    """Declare the private ops once; a second definition of an op raises."""
    if not _definitions:
        library = torch.library.Library(NAMESPACE, "DEF")
        for op, schema in (SCHEMAS | HELPERS).items():
            library.define(op + schema)
        _definitions.append(library)


def load_library(path: Path, note: Path) -> tuple[bool, str]:
    """Load the library at `path`; a missing or broken one gives (False, reason) and never raises.

    Args:
        path: the shared library.
        note: text file with the reason why it was not built, where there is one.

    Returns:
        Whether the kernels can be called, and if not, why.
    """
    if not path.is_file():
        if note.is_file():
            return False, f"the native CPU library was not built: {note.read_text(encoding='utf-8').strip()}"
        return False, "the native CPU library was not built: run `python setup.py build_ext --inplace`"
    _define()
    try:
        torch.ops.load_library(str(path))
    except (OSError, RuntimeError) as error:
        return False, f"the native CPU library cannot be loaded by torch {torch.__version__}: {error}"
    has = torch._C._dispatch_has_kernel_for_dispatch_key
    missing = [op for op in SCHEMAS | HELPERS if not has(f"{NAMESPACE}::{op}", "CPU")]
    if missing:
        return False, f"the native CPU library lacks {', '.join(missing)}: build it again"
    return True, ""


@cache
def load() -> tuple[bool, str]:
    """Whether the native CPU kernels can be called here, and if not, why.

    Raises:
        ValueError: `RLSEDIT_CPU_ENGINE` names no engine.
    """
    asked = os.environ.get(ENGINE_VARIABLE, "")
    if asked not in ("", *ENGINES):
        raise ValueError(f"{ENGINE_VARIABLE} must be empty or one of {', '.join(map(repr, ENGINES))}, got {asked!r}")
    return load_library(_LIBRARY, _NOTE)


def kernels() -> dict[str, Callable[..., object]]:
    """The native kernels by op name; empty where the library is not available."""
    if not load()[0]:
        return {}
    namespace = getattr(torch.ops, NAMESPACE)
    return {op: getattr(namespace, op).default for op in SCHEMAS}
