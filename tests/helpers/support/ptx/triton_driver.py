"""Triton's kernels as Triton compiles them for a GPU, run on a CPU: a driver that launches their PTX.

Triton's interpreter runs the Python of a kernel with NumPy. What Triton makes of it (layouts, pipelines, tensor-core
products, barriers) is looked at only where the compiled code runs.
"""

from __future__ import annotations

import ctypes
from functools import cache
from typing import Any

import torch
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase
from triton.compiler import CompiledKernel
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from support import pretended
from support.emulated import ptx_architecture
from support.ptx import library, module

MOST_SHARED = 227 * 1024

_TYPES = {"i1": ctypes.c_bool, "i32": ctypes.c_int32, "i64": ctypes.c_int64, "u32": ctypes.c_uint32} | {
    "u64": ctypes.c_uint64,
    "fp32": ctypes.c_float,
    "fp64": ctypes.c_double,
}


class Driver(DriverBase):
    """What a launch asks of a device."""

    def __init__(self) -> None:
        """Nothing to be found."""

    @classmethod
    def is_active(cls) -> bool:
        return True

    def map_python_to_cpp_type(self, ty: str) -> str:
        raise NotImplementedError

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", int(ptx_architecture().rstrip("a")), 32)

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cuda", 0)

    def get_benchmarker(self) -> Any:
        raise NotImplementedError


@cache
def _compiled(ptx: str, name: str, counting: bool) -> int:
    path = library.compile_kernel(module.kernels(ptx)[name])
    return ctypes.CDLL(str(path))._handle


def _arguments(kernel: CompiledKernel, values: tuple[Any, ...]) -> list[Any]:
    """The values of the parameters that are no constants, and the two scratch pointers that Triton appends."""
    found: list[Any] = []
    for kind, value in zip(kernel.src.signature.values(), values, strict=True):
        if kind == "constexpr":
            continue
        if kind.startswith("*"):
            found.append(ctypes.c_void_p(value.data_ptr()))
        else:
            found.append(_TYPES[kind](value))
    return [*found, ctypes.c_void_p(None), ctypes.c_void_p(None)]


def _launch(kernel: CompiledKernel, *call: Any) -> None:
    grid, values = call[:3], call[9:]
    if kernel.metadata.shared > MOST_SHARED:
        raise RuntimeError(f"{kernel.name} asks for {kernel.metadata.shared} bytes of shared memory")
    if 0 in grid:
        return
    code, threads = _compiled(kernel.asm["ptx"], kernel.name, library.counting), 32 * kernel.metadata.num_warps
    library.launch(code, grid, threads, kernel.metadata.shared, _arguments(kernel, values), kernel.name)


def install() -> None:
    """Let Triton launch on the emulator, tensors of the pretended GPU too."""
    driver.set_active(Driver())
    CompiledKernel.launch_metadata = lambda *_: None
    CompiledKernel.run = property(lambda kernel: lambda *call: _launch(kernel, *call))
    run = JITFunction.run

    def launched(self: JITFunction, *args: Any, **kwargs: Any) -> Any:
        args, kwargs = pretended.unwrapped((args, kwargs))
        return pretended.noted(lambda: run(self, *args, **kwargs), (args, kwargs), True)

    JITFunction.run = launched
