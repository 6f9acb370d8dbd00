"""Loader of the CUDA library: C++ kernels for NVIDIA GPUs from Ampere on, behind torch's stable ABI.

The library implements the schemas of `ops/schemas.py`, with an argument `precision` behind the others, in the private
namespace `rlsedit_kernels_cuda`, which is defined here before the library is loaded. An op that it lacks falls to the
next back end. What goes wrong is reported as a reason.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch

from rlsedit_kernels.ops.schemas import SCHEMAS

NAMESPACE = "rlsedit_kernels_cuda"

PRECISIONS = {"tf32x3": 0, "ieee": 1}
"""How products of float32 are formed: three products of tf32 on the tensor cores (the default), or IEEE float32."""

MOST_BATCH, MOST_DIMS = 65535, 4
"""Matrices that a call of the library takes, and leading dimensions, however they lie: beyond, a call is several."""

_PACKAGE = Path(__file__).resolve().parent.parent
_LIBRARY = _PACKAGE / "_C_cuda.so"
_NOTE = _PACKAGE / "_cuda_build.txt"  # written by setup.py when it could not build the library

_definitions: list[torch.library.Library] = []


def _schemas() -> dict[str, str]:
    """The private schemas: those of the public ops with `precision`."""
    return {op: schema.replace(") ->", ", int precision=0) ->") for op, schema in SCHEMAS.items()}


def _define() -> None:
    """Declare the private ops once; a second definition of an op raises."""
    if not _definitions:
        library = torch.library.Library(NAMESPACE, "DEF")
        for op, schema in _schemas().items():
            library.define(op + schema)
        _definitions.append(library)


def implemented(key: str = "CUDA") -> tuple[str, ...]:
    """Ops of the private namespace that have a kernel for dispatch key `key`."""
    if not _definitions:
        return ()
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
    return tuple(op for op in _schemas() if has_kernel(f"{NAMESPACE}::{op}", key))


def serves(capability: tuple[int, int], architectures: str) -> bool:
    """Whether code for `architectures` ("80-real 90a-real 100-virtual") runs on a device of this compute capability.

    Machine code runs on devices of the same major version from its own minor version on (with an "a", on that version
    only); PTX ("virtual", or neither word) on every later device.
    """
    major, minor = capability
    for name in architectures.split():
        number, _, kind = name.partition("-")
        own = divmod(int(number.rstrip("af")), 10)
        if kind != "real" and (major, minor) >= own and not number.endswith("a"):
            return True
        if kind != "virtual" and own[0] == major and (minor == own[1] if number.endswith("a") else minor >= own[1]):
            return True
    return False


def load_library(path: Path, note: Path, key: str = "CUDA") -> tuple[bool, str]:
    """Load the library at `path`; a missing or broken one gives (False, reason) and never raises.

    Args:
        path: the shared library.
        note: text file with the reason why it was not built, where there is one.
        key: dispatch key of its kernels ("CPU" for the build with which tests run the kernels on a CPU).

    Returns:
        Whether there are kernels that can be called, and if not, why.
    """
    if not path.is_file():
        why = (
            note.read_text(encoding="utf-8").strip() if note.is_file() else "run `python setup.py build_ext --inplace`"
        )
        return False, f"the CUDA library was not built: {why}"
    _define()
    try:
        torch.ops.load_library(str(path))
        if key == "CUDA" and (reason := _not_here(path)):
            return False, reason
    except (OSError, RuntimeError, AttributeError) as error:
        return False, f"the CUDA library cannot be loaded by torch {torch.__version__}: {error.__cause__ or error}"
    if not implemented(key):
        return False, "the CUDA library has no kernels: build it again"
    return True, ""


def _not_here(path: Path) -> str:
    """Why a library that could be loaded cannot be used, or nothing."""
    if not torch.cuda.is_available():
        return "there is no GPU here"
    read = ctypes.CDLL(str(path)).rlsedit_cuda_architectures
    read.restype = ctypes.c_char_p
    built = read().decode()
    for i in range(torch.cuda.device_count()):
        capability = torch.cuda.get_device_capability(i)
        if not serves(capability, built):
            gpu = f"GPU {i} ({torch.cuda.get_device_name(i)}, {capability[0]}.{capability[1]})"
            return f"the CUDA library was built for {built}, not for {gpu}: build it on this machine"
    return ""


@cache
def load() -> tuple[bool, str]:
    """Whether CUDA kernels can be called here, and if not, why."""
    return load_library(_LIBRARY, _NOTE)


def _in_pieces(function: Callable[..., Any], arguments: Sequence[Any]) -> Any:
    """`function` of the arguments, matrix by matrix where one call of the library does not take all of them."""
    batch = arguments[0].shape[:-2]
    if batch.numel() <= MOST_BATCH and (len(batch) <= MOST_DIMS or batch.numel() == 0):
        return function(*arguments)
    step = MOST_BATCH // batch[1:].numel() if len(batch) <= MOST_DIMS else 0  # of the first dimension; 0: one leaves it
    places = [slice(i, i + step) for i in range(0, batch[0], step)] if step else range(batch[0])
    join = torch.cat if step else torch.stack
    parts = [
        _in_pieces(function, [a[place] if isinstance(a, torch.Tensor) else a for a in arguments]) for place in places
    ]
    if parts[0] is None:
        return None
    if isinstance(parts[0], torch.Tensor):
        return join(parts)
    return tuple(join(tensors) for tensors in zip(*parts, strict=True))


def kernel(op: str) -> Callable[..., object]:
    """The kernel of an op of the private namespace, with `input_precision` as a keyword, as the Triton kernels have it.

    The function takes what the op takes; `input_precision` is "tf32x3" (the default), "ieee" or None for the default.
    Float64 is IEEE whatever is asked for. A single pass of tf32 is not offered: a recurrence in it breaks down within
    tens of batches.
    """
    function = getattr(getattr(torch.ops, NAMESPACE), op).default

    def call(*arguments: Any, input_precision: str | None = None) -> object:
        if input_precision is None:
            return _in_pieces(function, arguments)
        if input_precision not in PRECISIONS:
            known = ", ".join(map(repr, PRECISIONS))
            raise ValueError(f"{op}: input_precision must be one of {known}, got {input_precision!r}")
        return _in_pieces(partial(function, precision=PRECISIONS[input_precision]), arguments)

    call.__name__ = op
    return call


def kernels(key: str = "CUDA") -> dict[str, Callable[..., object]]:
    """The kernels of public ops by name; empty where the library is not available."""
    if key == "CUDA" and not load()[0]:
        return {}
    return {op: kernel(op) for op in implemented(key)}
