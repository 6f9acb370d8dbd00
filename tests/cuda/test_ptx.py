"""Kernels as nvcc compiles them, on the emulator: instructions mean what the PTX ISA says, and mistakes are noticed."""

from __future__ import annotations

import ctypes
import math
import re
import struct
from typing import Any

import numpy as np
import pytest
import torch
from support import builders, emulated, tolerances
from support.ptx import library, module, profile

HEAD = ".version 9.0\n.target sm_90a\n.address_size 64\n"
NAN = math.nan


@pytest.fixture(scope="module", autouse=True)
def machine() -> Any:
    try:
        return library.machine()
    except emulated.CannotEmulate as error:
        pytest.skip(f"PTX on the CPU: {error}")


def kernel(body: str, parameters: int = 2, head: str = "") -> int:
    """A kernel whose parameters are pointers, in `%rd1`, `%rd2`, ...; `%r0` is the thread, `%rd0` four times it."""
    names = [f"p{i}" for i in range(parameters)]
    loads = "\n".join(f"ld.param.u64 %rd{i + 1}, [{name}];" for i, name in enumerate(names))
    text = f"""{HEAD}{head}
.visible .entry k({", ".join(f".param .u64 {name}" for name in names)})
.maxntid 64, 1, 1
{{
    .reg .pred %p<20>;
    .reg .b16 %rs<20>;
    .reg .b32 %r<40>;
    .reg .b64 %rd<40>;
    .reg .f32 %f<40>;
    .reg .f64 %fd<40>;
    {loads}
    mov.u32 %r0, %tid.x;
    mul.wide.u32 %rd0, %r0, 8;
    {body}
    ret;
}}"""
    path = library.compile_kernel(module.kernels(text)["k"])
    return ctypes.CDLL(str(path))._handle


def run(body: str, *arrays: np.ndarray, threads: int = 32, grid: int = 1, shared: int = 0, head: str = "") -> None:
    code = kernel(body, len(arrays), head)
    library.launch(code, (grid,), threads, shared, [ctypes.c_void_p(array.ctypes.data) for array in arrays])


REGISTERS = {"u32": "%r", "s32": "%r", "b32": "%r", "u64": "%rd", "s64": "%rd", "b64": "%rd", "f32": "%f", "f64": "%fd"}
FORMATS = {"u32": "I", "s32": "i", "b32": "I", "u64": "Q", "s64": "q", "b64": "Q", "f32": "f", "f64": "d"}


def bits(kind: str, value: float) -> int:
    raw = struct.pack(FORMATS[kind], value)
    return int.from_bytes(raw, "little")


def of_bits(kind: str, number: int) -> float:
    size = struct.calcsize(FORMATS[kind])
    return struct.unpack(FORMATS[kind], (number & (1 << 8 * size) - 1).to_bytes(size, "little"))[0]


LEAST = -(2**31)
# The instruction, types of its operands, their values, the type and value of its result (PTX ISA 9.0, section 9.7).
INSTRUCTIONS = [
    ("add.s32", "s32 s32", (2**31 - 1, 1), "s32", LEAST),
    ("sub.u32", "u32 u32", (0, 1), "u32", 2**32 - 1),
    ("mul.lo.s64", "s64 s64", (2**40, 2**40 + 3), "s64", 3 * 2**40),
    ("mul.hi.s32", "s32 s32", (-7, 2**30), "s32", -2),
    ("mul.hi.u32", "u32 u32", (2**32 - 1, 2**32 - 1), "u32", 2**32 - 2),
    ("mul.wide.s32", "s32 s32", (LEAST, 3), "s64", 3 * LEAST),
    ("mul.wide.u32", "u32 u32", (2**32 - 1, 3), "u64", 3 * (2**32 - 1)),
    ("mad.lo.s32", "s32 s32 s32", (7, -5, 1), "s32", -34),
    ("mad.wide.s32", "s32 s32 s64", (LEAST, 2, 5), "s64", 2 * LEAST + 5),
    ("div.s32", "s32 s32", (-7, 2), "s32", -3),
    ("rem.s32", "s32 s32", (-7, 2), "s32", -1),
    ("div.u32", "u32 u32", (2**32 - 1, 2), "u32", 2**31 - 1),
    ("div.s64", "s64 s64", (-(2**40), 3), "s64", -(2**40 // 3)),
    ("shl.b32", "b32 u32", (3, 31), "b32", 2**31),
    ("shl.b32", "b32 u32", (3, 32), "b32", 0),
    ("shr.u32", "u32 u32", (2**31, 40), "u32", 0),
    ("shr.s32", "s32 u32", (-8, 1), "s32", -4),
    ("shr.s32", "s32 u32", (-8, 99), "s32", -1),
    ("shr.s64", "s64 u32", (-(2**40), 63), "s64", -1),
    ("shl.b64", "b64 u32", (5, 62), "b64", 2**62),
    ("not.b32", "b32", (5,), "b32", 2**32 - 6),
    ("neg.s32", "s32", (LEAST,), "s32", LEAST),
    ("abs.s32", "s32", (-3,), "s32", 3),
    ("min.s32", "s32 s32", (-1, 1), "s32", -1),
    ("min.u32", "u32 u32", (2**32 - 1, 1), "u32", 1),
    ("max.s64", "s64 s64", (-(2**40), 1), "s64", 1),
    ("clz.b32", "b32", (1,), "u32", 31),
    ("clz.b32", "b32", (0,), "u32", 32),
    ("clz.b64", "b64", (2**33,), "u32", 30),
    ("bfi.b32", "b32 b32 u32 u32", (0b101, 0xFFFF0000, 4, 3), "b32", 0xFFFF0050),
    ("bfi.b64", "b64 b64 u32 u32", (7, 9, 32, 32), "b64", 7 * 2**32 + 9),
    ("bfi.b32", "b32 b32 u32 u32", (7, 9, 32, 2), "b32", 9),
    ("bfe.u32", "u32 u32 u32", (0xABCD, 4, 8), "u32", 0xBC),
    ("bfe.s32", "s32 u32 u32", (0xABCD, 4, 8), "s32", -0x44),
    ("bfe.s32", "s32 u32 u32", (1 << 3, 3, 1), "s32", -1),
    ("bfe.u32", "u32 u32 u32", (0xABCD, 4, 0), "u32", 0),
    ("prmt.b32", "b32 b32 b32", (0x33221100, 0x77665544, 0x7301), "b32", 0x77330011),
    ("prmt.b32", "b32 b32 b32", (0x000080FF, 0, 0x98F0), "b32", 0xFFFF00FF),
    ("xor.b64", "b64 b64", (2**63 + 5, 3), "b64", 2**63 + 6),
    ("fma.rn.f32", "f32 f32 f32", (1 + 2**-12, 1 + 2**-12, -1), "f32", 2**-11 + 2**-24),
    ("mul.f32", "f32 f32", (1 + 2**-12, 1 + 2**-12), "f32", 1 + 2**-11),
    ("add.rn.f64", "f64 f64", (1, 2**-53), "f64", 1),
    ("min.f32", "f32 f32", (NAN, 2), "f32", 2),
    ("max.f64", "f64 f64", (3, NAN), "f64", 3),
    ("abs.f64", "f64", (-3,), "f64", 3),
    ("neg.f32", "f32", (0,), "f32", -0.0),
    ("sqrt.rn.f32", "f32", (2,), "f32", np.float32(math.sqrt(2))),
    ("rcp.rn.f64", "f64", (3,), "f64", 1 / 3),
    ("div.rn.f32", "f32 f32", (1, 3), "f32", np.float32(1 / 3)),
    ("rsqrt.approx.ftz.f32", "f32", (1e-39,), "f32", math.inf),  # a denormal number is zero
    ("rsqrt.approx.ftz.f32", "f32", (4,), "f32", 0.5),
    ("cvt.s64.s32", "s32", (-5,), "s64", -5),
    ("cvt.u64.u32", "u32", (2**32 - 1,), "u64", 2**32 - 1),
    ("cvt.u32.u64", "u64", (2**33 + 7,), "u32", 7),
    ("cvt.rzi.s32.f32", "f32", (-2.9,), "s32", -2),
    ("cvt.rzi.s32.f32", "f32", (1e20,), "s32", 2**31 - 1),
    ("cvt.rzi.s32.f32", "f32", (NAN,), "s32", 0),
    ("cvt.rn.f32.s32", "s32", (2**24 + 1,), "f32", 2**24),
    ("cvt.f64.f32", "f32", (np.float32(0.1),), "f64", float(np.float32(0.1))),
    ("cvt.rn.f32.f64", "f64", (0.1,), "f32", np.float32(0.1)),
    ("cvt.rna.tf32.f32", "f32", (1 + 2**-11,), "b32", bits("f32", 1 + 2**-10)),  # ties go away from zero
    ("mov.b64", "f64", (1.5,), "b64", bits("f64", 1.5)),
]


@pytest.fixture(scope="module")
def computed(machine: Any) -> np.ndarray:
    """What one kernel stores that has all the instructions of the table."""
    memory, out = np.zeros((len(INSTRUCTIONS), 8), dtype=np.uint64), np.zeros(len(INSTRUCTIONS), dtype=np.uint64)
    body = []
    for row, (name, kinds, given, result, _) in enumerate(INSTRUCTIONS):
        operands = []
        for i, (kind, value) in enumerate(zip(kinds.split(), given, strict=True)):
            memory[row, i] = bits(kind, value)
            operands.append(f"{REGISTERS[kind]}{20 + i}")
            body.append(f"ld.global.{kind} {operands[-1]}, [%rd1+{64 * row + 8 * i}];")
        to = f"{REGISTERS[result]}10"
        body += [f"{name} {to}, {', '.join(operands)};", f"st.global.{result} [%rd2+{8 * row}], {to};"]
    run("\n".join(body), memory, out)
    return out


@pytest.mark.parametrize("row", range(len(INSTRUCTIONS)), ids=[f"{row[0]}-{row[2]}" for row in INSTRUCTIONS])
def test_arithmetic(row, computed) -> None:
    _, _, _, kind, expected = INSTRUCTIONS[row]
    found = of_bits(kind, int(computed[row]))
    assert bits(kind, found) == bits(kind, float(expected) if "f" in kind else expected), (found, expected)


@pytest.mark.parametrize(
    ("name", "a", "b", "expected"),
    [
        ("lt.f32", 1, 2, True), ("lt.f32", NAN, 2, False), ("ltu.f32", NAN, 2, True), ("ne.f32", NAN, 2, False),
        ("neu.f32", NAN, 2, True), ("leu.f32", 3, 2, False), ("num.f32", NAN, 2, False), ("nan.f32", NAN, 2, True),
        ("gt.s32", -1, 1, False), ("gt.u32", 2**32 - 1, 1, True), ("le.s32", 1, 1, True), ("geu.f32", 1, 2, False),
    ],
)  # fmt: skip
def test_comparisons(name, a, b, expected) -> None:
    kind = name.split(".")[1]
    memory, out = np.array([bits(kind, a), bits(kind, b)], dtype=np.uint64), np.zeros(1, dtype=np.uint32)
    x, y = f"{REGISTERS[kind]}1", f"{REGISTERS[kind]}2"
    body = f"ld.global.{kind} {x}, [%rd1]; ld.global.{kind} {y}, [%rd1+8]; setp.{name} %p1, {x}, {y};"
    run(body + " selp.b32 %r5, 1, 0, %p1; st.global.u32 [%rd2], %r5;", memory, out)
    assert bool(out[0]) == expected


SHUFFLES = {
    "idx": (lambda lane: 5, "5"),
    "bfly": (lambda lane: lane ^ 6, "6"),
    "down": (lambda lane: lane + 3 if lane + 3 < 32 else lane, "3"),
    "up": (lambda lane: lane - 3 if lane >= 3 else lane, "3"),
}


@pytest.mark.parametrize("mode", SHUFFLES)
def test_shuffles(mode) -> None:
    source, by = SHUFFLES[mode]
    out = np.zeros(32, dtype=np.uint32)
    segment = 0 if mode == "up" else 31
    body = (
        f"mul.wide.u32 %rd5, %r0, 4; add.s64 %rd5, %rd5, %rd1; shfl.sync.{mode}.b32 %r5|%p1, %r0, {by}, {segment}, -1;"
    )
    run(body + " st.global.u32 [%rd5], %r5;", out)
    assert out.tolist() == [source(lane) for lane in range(32)]


SHARED = ".extern .shared .align 16 .b8 memory[];\n"


def test_matrices_are_loaded_and_stored_by_rows() -> None:
    """ldmatrix: lane l has 4 bytes, from 4 (l mod 4) on, of row l / 4 of each matrix; stmatrix puts them back."""
    given, out, back = np.arange(128, dtype=np.uint32), np.zeros(128, dtype=np.uint32), np.zeros(128, dtype=np.uint32)
    body = """
    mov.b32 %r1, memory;
    shl.b32 %r2, %r0, 4;
    add.s32 %r3, %r1, %r2;
    mul.wide.u32 %rd5, %r0, 16;
    add.s64 %rd6, %rd5, %rd1; add.s64 %rd7, %rd5, %rd2; add.s64 %rd8, %rd5, %rd3;
    ld.global.v4.b32 {%r10, %r11, %r12, %r13}, [%rd6];
    st.shared.v4.b32 [%r3], {%r10, %r11, %r12, %r13};
    bar.sync 0;
    ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%r20, %r21, %r22, %r23}, [%r3];
    st.global.v4.b32 [%rd7], {%r20, %r21, %r22, %r23};
    stmatrix.sync.aligned.m8n8.x4.shared.b16 [%r3+512], {%r20, %r21, %r22, %r23};
    bar.sync 0;
    ld.shared.v4.b32 {%r10, %r11, %r12, %r13}, [%r3+512];
    st.global.v4.b32 [%rd8], {%r10, %r11, %r12, %r13};
    """
    run(body, given, out, back, shared=1024, head=SHARED)
    matrices = given.reshape(4, 8, 4)  # matrix, row, 4 bytes
    assert np.array_equal(out.reshape(32, 4).T, matrices.reshape(4, 32))
    assert np.array_equal(back, given)


@pytest.mark.parametrize(("m", "k"), [(8, 4), (16, 4), (16, 8), (16, 16)])
def test_products_of_float64(m, k) -> None:
    """Lane 4 g + t has A[g + 8 i][t + 4 j], B[t + 4 j][g] and D[g + 8 i][2 t, 2 t + 1]; i is counted before j."""
    rng = np.random.default_rng(m + k)
    A, B, D = rng.standard_normal((m, k)), rng.standard_normal((k, 8)), rng.standard_normal((m, 8))
    lanes = [divmod(lane, 4) for lane in range(32)]
    halves, parts = range(m // 8), range(k // 4)
    a = np.array([[A[g + 8 * i, t + 4 * j] for j in parts for i in halves] for g, t in lanes])
    b = np.array([[B[t + 4 * j, g] for j in parts] for g, t in lanes])
    d = np.array([[D[g + 8 * i, 2 * t + c] for i in halves for c in range(2)] for g, t in lanes])

    def registers(first: int, count: int) -> list[str]:
        return [f"%fd{first + i}" for i in range(count)]

    sums, left, right = registers(0, d.shape[1]), registers(10, a.shape[1]), registers(20, b.shape[1])
    moves = [("ld", "%rd1", sums), ("ld", "%rd2", left), ("ld", "%rd3", right), ("st", "%rd1", sums)]
    lines = []
    for op, base, names in moves:
        lines.append(f"mul.wide.u32 %rd5, %r0, {8 * len(names)}; add.s64 %rd6, %rd5, {base};")
        for i, name in enumerate(names):
            place = f"[%rd6+{8 * i}]"
            lines.append(f"ld.global.f64 {name}, {place};" if op == "ld" else f"st.global.f64 {place}, {name};")
    lists = ", ".join("{" + ", ".join(names) + "}" for names in (sums, left, right, sums))
    lines.insert(-1 - len(sums), f"mma.sync.aligned.m{m}n8k{k}.row.col.f64.f64.f64.f64 {lists};")
    run("\n".join(lines), d, a, b)
    expected = D + A @ B
    assert np.allclose(d, [[expected[g + 8 * i, 2 * t + c] for i in halves for c in range(2)] for g, t in lanes])


@pytest.mark.parametrize(
    ("body", "what"),
    [
        ("add.s64 %rd5, %rd1, 4; ld.global.v2.f32 {%f1, %f2}, [%rd5];", "misaligned access to global memory"),
        ("mov.u64 %rd5, 0; st.global.u32 [%rd5], 1;", "address 0"),
        ("mov.u32 %r1, memory; st.shared.u32 [%r1+64], 1;", "outside of shared memory"),
        ("mov.u32 %r1, memory; ld.shared.v4.f32 {%f1, %f2, %f3, %f4}, [%r1+8];", "misaligned access to shared memory"),
        ("mov.u32 %r1, memory; cp.async.cg.shared.global [%r1], [%rd1], 16, %r0;", "copies"),
        ("mov.u32 %r1, memory; cp.async.ca.shared.global [%r1], [%rd1], 4;", "copy that was not committed"),
        ("setp.lt.u32 %p1, %r0, 32; @%p1 bra $L; bar.sync 0; $L:", "barrier that not all threads reach"),
        ("$L: ld.acquire.gpu.global.u32 %r1, [%rd1]; setp.eq.u32 %p1, %r1, 0; @%p1 bra $L;", "waits for one that"),
        ("div.u32 %r1, %r0, 0;", "division by zero"),
        ("trap;", "a trap"),
    ],
)
def test_what_a_gpu_does_not_allow_is_an_error(body, what) -> None:
    with pytest.raises(RuntimeError, match=what):
        run(body, np.zeros(64, dtype=np.uint32), threads=64, shared=64, head=SHARED)


def test_more_threads_than_the_kernel_was_compiled_for() -> None:
    with pytest.raises(RuntimeError, match="more threads"):
        run("", np.zeros(1), threads=96)


@pytest.mark.parametrize("text", ["tanh.approx.f32 %f1, %f2;", "ld.acquire.sys.u32 %r1, [%rd1];", "brx.idx %r1, t;"])
def test_an_unknown_instruction_is_not_passed_over(text) -> None:
    with pytest.raises(module.Unknown):
        kernel(text)


def _counted(body: str, *arrays: np.ndarray, **settings: Any) -> profile.Counted:
    with profile.counted() as found:
        run(body, *arrays, **settings)
    return found.kernels[0]


@pytest.mark.parametrize(
    ("stride", "instruction", "rounds", "least"),
    [
        (4, "ld.shared.u32 %r5", 1, 1),
        (8, "ld.shared.u32 %r5", 2, 1),
        (128, "ld.shared.u32 %r5", 32, 1),
        (132, "ld.shared.u32 %r5", 1, 1),
        (0, "ld.shared.u32 %r5", 1, 1),  # one word for all
        (8, "ld.shared.v2.u32 {%r5, %r6}", 2, 2),  # 16 lanes at a time
        (16, "ld.shared.v4.u32 {%r5, %r6, %r7, %r8}", 4, 4),
        (32, "ld.shared.v4.u32 {%r5, %r6, %r7, %r8}", 8, 4),
    ],
)
def test_rounds_of_the_banks(stride, instruction, rounds, least) -> None:
    body = f"mov.u32 %r1, memory; mad.lo.s32 %r2, %r0, {stride}, %r1; {instruction}, [%r2];"
    counted = _counted(body, shared=32 * 132, head=SHARED)
    (site,) = counted.sites
    assert (site.space, site.accesses, site.lanes, site.cost, site.least) == ("shared", 1, 32, rounds, least)
    assert counted.instructions["shared"] == 32 == counted.threads


@pytest.mark.parametrize(("stride", "sectors", "least"), [(4, 4, 4), (8, 8, 4), (32, 32, 4), (64, 32, 4), (0, 1, 1)])
def test_sectors(stride, sectors, least) -> None:
    room = np.zeros(32 * 64 + 32, dtype=np.uint8)
    room = room[-room.ctypes.data % 32 :]
    counted = _counted(f"mad.wide.u32 %rd5, %r0, {stride}, %rd1; st.global.u32 [%rd5], %r0;", room)
    (site,) = counted.sites
    assert (site.space, site.cost, site.least) == ("global", sectors, least)


# Mistakes in the compiled code of the library: without them the op is right (pytest tests/ops --emulate-cuda --ptx).


def _swap_rows(text: str) -> str:
    """The left fragments of the second and third register exchanged."""
    pattern = r"(mma\.sync\.aligned\.m16n8k8[^{]*\{[^}]*\}, \{%r\d+,)(%r\d+),(%r\d+),"
    return re.sub(pattern, r"\1\3,\2,", text)


def _products() -> tuple[torch.Tensor, torch.Tensor]:
    C, K = builders.symmetric((), 70, torch.float32, 0), builders.key_batch((), 5, 70, torch.float32, 1)
    Y, _ = torch.ops.rlsedit_kernels_cuda.gain_products(C, K)
    return Y, C.double() @ K.double().mT


def _appended() -> tuple[torch.Tensor, torch.Tensor]:
    R, K = torch.eye(100), builders.key_batch((), 3, 100, torch.float32, 1)
    with emulated.beside(3):
        torch.ops.rlsedit_kernels_cuda.qr_append_(R, K)
    return R.mT @ R, torch.eye(100, dtype=torch.float64) + K.double().mT @ K.double()


MISTAKES = {
    "fragments": (_products, _swap_rows),
    "copies are not waited for": (_products, lambda text: re.sub(r"cp\.async\.wait_group \d+;", "", text)),
    "no barrier": (_appended, lambda text: re.sub(r"bar\.sync\s+0;", "", text)),
    "the panel before is not waited for": (
        _appended,
        lambda text: re.sub(r"ld\.acquire\.gpu\.global\.u32 (%r\d+), \[[^]]*\];", r"mov.u32 \1, 1000000;", text),
    ),
    "a wait without patience": (_appended, lambda text: re.sub(r"\b33554432\b", "0", text)),  # dataflow.h: it ends
}


@pytest.fixture
def ptx_kernels() -> None:
    """The kernels of the private namespace are those of nvcc; a process has one library."""
    if not emulated.uses_ptx():
        pytest.skip("about the library that nvcc compiled (--ptx)")


@pytest.mark.parametrize("mistake", [None, *MISTAKES])
def test_a_mistake_in_the_compiled_code_shows(mistake, kernels, ptx_kernels) -> None:
    compute, change = MISTAKES.get(mistake, (_products, str))
    try:
        with library.changed(change):
            found, expected = compute()
        wrong = not tolerances.relative_error(found, expected) < 1e-5
    except RuntimeError:
        wrong = True
    assert wrong == (mistake is not None)
    found, expected = compute()
    assert tolerances.relative_error(found, expected) < 1e-5
