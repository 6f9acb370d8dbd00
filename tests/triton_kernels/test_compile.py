"""Every launch that real sizes make is compiled ahead of time, for architectures that are not here.

Host functions run on meta tensors with the launch caught: what is compiled is what would be launched, strides, tiles
and specialisations included.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from rlsedit_kernels import triton_kernels
from rlsedit_kernels.triton_kernels import tuning

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


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[Launch]:
    caught: list[Launch] = []

    def run(self: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        options = {name: kwargs.pop(name) for name in list(kwargs) if name not in self.arg_names}
        caught.append(Launch(self, {**dict(zip(self.arg_names, args, strict=False)), **kwargs}, options))

    monkeypatch.setattr(JITFunction, "run", run)
    return caught


def calls(op: str, dtype: torch.dtype, u: int, precision: str) -> None:
    """The op on meta tensors."""

    def made(*shape: int) -> torch.Tensor:
        return torch.empty(*shape, dtype=dtype, device="meta")

    C, K, Z, B, T = made(D, D), made(u, D), made(D, u), made(D, V), made(u, V)
    functions: dict[str, Callable[..., object]] = {
        **triton_kernels.KERNELS,
        "weight_update_": triton_kernels.weight_update_,
    }
    arguments = {
        "gain_products": (C, K),
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
    functions[op](*arguments, input_precision=precision)


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


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("op", [*triton_kernels.KERNELS, "weight_update_"])
def test_compiles_and_fits(op, size, dtype, target, launches, monkeypatch) -> None:
    gpu, architecture, shared = TARGETS[target]
    monkeypatch.setattr(tuning, "_architecture", lambda: architecture)
    calls(op, dtype, SIZES[size], "tf32x3" if architecture == "cuda" else "ieee")
    distinct = {key(launch): launch for launch in launches}
    assert distinct
    for launch in distinct.values():
        compiled = triton.compile(source(launch), target=gpu, options=launch.options)
        name = launch.kernel.fn.__name__
        assert compiled.metadata.shared <= shared, f"{name} wants {compiled.metadata.shared} bytes of shared memory"
        assert "cubin" in compiled.asm or "hsaco" in compiled.asm


@pytest.mark.parametrize("op", [*triton_kernels.KERNELS, "weight_update_"])
def test_one_key_compiles(op, launches, monkeypatch) -> None:
    """Triton turns an argument that is 1 into a constant: other code."""
    monkeypatch.setattr(tuning, "_architecture", lambda: "cuda")
    calls(op, torch.float32, 1, "tf32x3")
    for launch in {key(launch): launch for launch in launches}.values():
        triton.compile(source(launch), target=TARGETS["sm_90"][0], options=launch.options)


@pytest.mark.parametrize(("op", "count"), [("qr_append_", 1), ("qr_append_rhs_", 1), ("qr_gain", 2)])
def test_panels_take_no_launches_of_their_own(op, count, launches, monkeypatch) -> None:
    """Programs wait for panels on the device; a launch a panel would cost more than the panel."""
    monkeypatch.setattr(tuning, "_architecture", lambda: "cuda")
    calls(op, torch.float32, 100, "tf32x3")
    assert len(launches) == count


def test_programs_that_wait_release_and_acquire(launches, monkeypatch) -> None:
    """What a panel stored is made visible before its flag, and nothing older is kept once the flag is seen."""
    monkeypatch.setattr(tuning, "_architecture", lambda: "cuda")
    calls("qr_append_", torch.float32, 100, "tf32x3")
    ptx = triton.compile(source(launches[0]), target=TARGETS["sm_90"][0], options=launches[0].options).asm["ptx"]
    assert re.search(r"\b(atom|ld)\.global\.gpu\.acquire\b", ptx)
    assert re.search(r"\batom\.global\.gpu\.release\.exch\b", ptx)
    assert ".global.nc" not in ptx


@pytest.mark.parametrize("op", ["qr_append_", "qr_append_rhs_", "qr_gain"])
def test_the_number_of_rows_is_no_part_of_the_code(op, launches, monkeypatch) -> None:
    """The last batch of a stream, smaller than the others, does not wait for a compilation of seconds."""
    monkeypatch.setattr(tuning, "_architecture", lambda: "cuda")
    seen = []
    for u in (65, 100, 112):
        launches.clear()
        calls(op, torch.float32, u, "tf32x3")
        seen.append({key(launch) for launch in launches})
    assert seen[0] == seen[1] == seen[2]


def test_two_programs_of_the_products_share_a_multiprocessor(launches, monkeypatch) -> None:
    """Of Hopper, with its 227 KB of shared memory."""
    monkeypatch.setattr(tuning, "_architecture", lambda: "cuda")
    calls("gain_products", torch.float32, 100, "tf32x3")
    product = next(launch for launch in launches if launch.kernel.fn.__name__ == "gain_products_kernel")
    compiled = triton.compile(source(product), target=TARGETS["sm_90"][0], options=product.options)
    assert 2 * (compiled.metadata.shared + 1024) <= 227 * 1024


def test_float32_products_run_on_tensor_cores_of_hopper(launches, monkeypatch) -> None:
    """3xTF32 is three tensor-core products, not a loop of fused multiply-adds."""
    monkeypatch.setattr(tuning, "_architecture", lambda: "cuda")
    calls("gain_products", torch.float32, 100, "tf32x3")
    product = next(launch for launch in launches if launch.kernel.fn.__name__ == "gain_products_kernel")
    ptx = triton.compile(source(product), target=TARGETS["sm_90"][0], options=product.options).asm["ptx"]
    assert ".tf32" in ptx


def test_the_innovation_has_work_for_every_multiprocessor(launches, monkeypatch) -> None:
    """K W has 32 tiles here: its shared dimension is cut, and a third launch adds the parts."""
    monkeypatch.setattr(tuning, "_architecture", lambda: "cuda")
    calls("weight_update_", torch.float32, 100, "tf32x3")
    assert [launch.kernel.fn.__name__ for launch in launches] == ["product_kernel", "sum_kernel", "product_kernel"]
    assert launches[0].arguments["span"] == 512


def test_a_whole_commit_is_five_launches(launches, monkeypatch) -> None:
    monkeypatch.setattr(tuning, "_architecture", lambda: "cuda")
    calls("rls_update_", torch.float32, 100, "tf32x3")
    assert len(launches) == 5
