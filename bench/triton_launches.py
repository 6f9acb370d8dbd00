"""What the functions of `triton_kernels` would launch, without a GPU: for tests that compile it, and a benchmark.

Host functions run on meta tensors with the launch caught: what is compiled is what would be launched, strides, tiles
and specialisations included.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from rlsedit_kernels import triton_kernels
from rlsedit_kernels.triton_kernels import tuning

OPS = tuple(triton_kernels.KERNELS)
TARGETS = {
    "sm_80": (GPUTarget("cuda", 80, 32), "cuda", 166_912),
    "sm_90": (GPUTarget("cuda", 90, 32), "cuda", 232_448),
    "gfx942": (GPUTarget("hip", "gfx942", 64), "hip", 65_536),
}
"""Target, architecture of the tuning table, bytes of shared memory that a program may take."""

TYPES = {torch.float32: "*fp32", torch.float64: "*fp64", torch.int32: "*i32"}
SIZES = {"few": 8, "many": 100}
D, V = 4096, 1024


@dataclass
class Launch:
    """One call of a kernel: the function, its arguments by name, and the options of the launch."""

    kernel: JITFunction
    arguments: dict[str, Any]
    options: dict[str, Any]


def _call(
    op: str, dtype: torch.dtype, u: int, precision: str, d: int, v: int, turned: bool, layers: tuple[int, ...]
) -> None:
    """The op on meta tensors."""

    def made(*shape: int) -> torch.Tensor:
        *lead, m, n = *layers, *shape
        tensor = torch.empty(*lead, *((n, m) if turned else (m, n)), dtype=dtype, device="meta")
        return tensor.mT if turned else tensor

    C, K, Z, B, T = made(d, d), made(u, d), made(d, u), made(d, v), made(u, v)
    arguments = {
        "gain_products": (C, K),
        "key_products": (B, K),
        "cholesky": (made(5, u, u),),
        "gain_solve": (Z, made(u, u), 0.5),
        "downdate_": (C, Z, -1.0),
        "downdate_gain_products_": (C, Z, K, -1.0),
        "rls_update_": (C, K, 0.5, 0.9),
        "qr_append_": (C, K),
        "qr_append_rhs_": (C, B, K, T),
        "qr_gain": (C, K),
        "weight_update_": (B, K, T, Z),
    }[op]
    triton_kernels.KERNELS[op](*arguments, input_precision=precision)


def launches_of(
    op: str,
    dtype: torch.dtype,
    u: int,
    architecture: str = "cuda",
    *,
    d: int = D,
    v: int = V,
    turned: bool = False,
    layers: tuple[int, ...] = (),
) -> list[Launch]:
    """What a call with u keys would launch, with the tiles and the precision of an architecture ("cuda", "hip").

    turned: every matrix has adjacent rows. layers: leading dimensions.
    """
    launches: list[Launch] = []
    run, asked = JITFunction.run, tuning._architecture

    def note(self: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        options = {name: kwargs.pop(name) for name in list(kwargs) if name not in self.arg_names}
        launches.append(Launch(self, {**dict(zip(self.arg_names, args, strict=False)), **kwargs}, options))

    JITFunction.run, tuning._architecture = note, lambda: architecture
    try:
        _call(op, dtype, u, "tf32x3" if architecture == "cuda" else "ieee", d, v, turned, layers)
    finally:
        JITFunction.run, tuning._architecture = run, asked
    return launches


def source(launch: Launch) -> ASTSource:
    """What Triton would compile for this launch: types, constants, ones and multiples of 16."""
    signature, constants, attributes = {}, {}, {}
    for i, parameter in enumerate(launch.kernel.params):
        value = launch.arguments[parameter.name]
        free = not parameter.do_not_specialize
        if parameter.is_constexpr or (isinstance(value, int) and value == 1 and free):
            signature[parameter.name], constants[(i,)] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[parameter.name] = TYPES[value.dtype]
            attributes[(i,)] = [["tt.divisibility", 16]]
        else:
            signature[parameter.name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            if value % 16 == 0 and free:
                attributes[(i,)] = [["tt.divisibility", 16]]
    return ASTSource(launch.kernel, signature, constants, attributes)


def key(launch: Launch) -> tuple[object, ...]:
    """Launches that compile to the same code."""
    made = source(launch)
    return (
        launch.kernel.fn.__name__,
        tuple(made.signature.items()),
        tuple(sorted((k, str(v)) for k, v in made.constants.items())),
        tuple(sorted(made.attrs)),
        tuple(sorted(launch.options.items())),
    )


def distinct(launches: list[Launch]) -> list[Launch]:
    """One of each that compile to the same code."""
    return list({key(launch): launch for launch in launches}.values())


def compiled(launch: Launch, target: GPUTarget = TARGETS["sm_90"][0]) -> Any:
    """What Triton makes of it."""
    return triton.compile(source(launch), target=target, options=launch.options)
