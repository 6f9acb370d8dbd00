"""Products by wgmma (Hopper), emulated: as good as the other kernel, at every edge; and the code that nvcc makes."""

from __future__ import annotations

import ctypes
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support import builders, emulated, races, tolerances

import rlsedit_kernels as rk
from rlsedit_kernels.backends import cuda

error = tolerances.relative_error


@pytest.fixture
def asked(kernels, monkeypatch) -> None:
    monkeypatch.setenv("RLSEDIT_CUDA_WGMMA", "1")


def products(C: torch.Tensor, K: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Y, G and how many kernels were launched."""
    before = emulated.launches()
    returned: Any = cuda.kernel("gain_products")(C, K, input_precision="tf32x3")
    return *returned, emulated.launches() - before


def by_warpgroups(d: int, launches: int) -> bool:
    """K is split by a kernel of its own; from d = 512 on the parts of Y are added by another."""
    expected = 3 + (d >= 512)
    assert launches in (expected, expected + 1)
    return launches == expected + 1


def check(C: torch.Tensor, K: torch.Tensor) -> int:
    Y, G, launches = products(C, K)
    expected_Y, expected_G = rk.reference.gain_products(C, K)
    assert error(Y, expected_Y) < 0.2 * tolerances.product(C.shape[-1], C.dtype)
    assert error(G, expected_G) < 0.2 * tolerances.product(C.shape[-1], C.dtype)
    assert torch.equal(G, G.mT)
    return launches


SIZES = [
    (4, 33),
    (36, 40),
    (64, 33),
    (64, 64),
    (188, 65),
    (192, 64),
    (192, 104),
    (196, 100),
    (196, 105),
    (260, 112),
    (260, 113),
    (384, 128),
    (516, 104),
    (516, 130),
]


@pytest.mark.parametrize(("d", "u"), SIZES)
def test_products_at_the_edges_of_tiles(d, u, asked) -> None:
    C, K = builders.symmetric((), d, torch.float32, 0), builders.key_batch((), u, d, torch.float32, 1)
    assert by_warpgroups(d, check(C, K))


@pytest.mark.parametrize(("d", "u"), [(193, 65), (66, 40), (64, 32), (64, 1)])
def test_rows_that_are_not_aligned_and_few_keys_take_the_other_kernel(d, u, asked) -> None:
    C, K = builders.symmetric((), d, torch.float32, 0), builders.key_batch((), u, d, torch.float32, 1)
    assert not by_warpgroups(d, check(C, K))


@pytest.mark.parametrize("value", [None, "", "0", "auto"])
def test_off_unless_asked_for(value, kernels, monkeypatch) -> None:
    monkeypatch.delenv("RLSEDIT_CUDA_WGMMA", raising=False)
    if value is not None:
        monkeypatch.setenv("RLSEDIT_CUDA_WGMMA", value)
    C, K = builders.symmetric((), 64, torch.float32, 0), builders.key_batch((), 40, 64, torch.float32, 1)
    assert not by_warpgroups(64, check(C, K))


@pytest.mark.parametrize(("dtype", "precision"), [(torch.float32, "ieee"), (torch.float64, "ieee")])
def test_other_precisions_take_the_other_kernel(dtype, precision, asked) -> None:
    C, K = builders.symmetric((), 64, dtype, 0), builders.key_batch((), 40, 64, dtype, 1)
    before = emulated.launches()
    cuda.kernel("gain_products")(C, K, input_precision=precision)
    assert not by_warpgroups(64, emulated.launches() - before)


def embedded(C: torch.Tensor, stride: int, offset: int) -> torch.Tensor:
    """A view with NaN around it: rows `stride` apart, the first `offset` elements from the start of the storage."""
    *batch, d, _ = C.shape
    storage = torch.full((*batch, d + 1, stride), float("nan"), dtype=C.dtype)
    view = storage.flatten(-2)[..., offset : offset + d * stride].unflatten(-1, (d, stride))[..., :d]
    view.copy_(C)
    return view


@pytest.mark.parametrize(
    ("d", "stride", "offset", "taken"),
    [(193, 196, 0, True), (193, 196, 4, True), (193, 196, 1, False), (192, 194, 0, False), (97, 100, 8, True)],
)
@pytest.mark.parametrize("batch", [(), (2,)])
def test_views_of_rows_that_16_bytes_can_be_read_of(batch, d, stride, offset, taken, asked) -> None:
    C, K = builders.symmetric(batch, d, torch.float32, 0), builders.key_batch(batch, 40, d, torch.float32, 1)
    assert by_warpgroups(d, check(embedded(C, stride, offset), K)) == taken


def test_a_matrix_of_a_batch_that_is_not_aligned(asked) -> None:
    """The strides of the leading dimensions count as well."""
    C, K = builders.symmetric((2,), 64, torch.float32, 0), builders.key_batch((2,), 40, 64, torch.float32, 1)
    apart = torch.full((2, 64 * 64 + 2), float("nan"))[:, : 64 * 64].unflatten(1, (64, 64))
    apart.copy_(C)
    assert not by_warpgroups(64, check(apart, K))


@pytest.mark.parametrize("layout", ["transposed", "rows apart", "expanded", "two leading"])
def test_keys_and_matrices_of_any_strides(layout, asked) -> None:
    batch = (2, 3) if layout == "two leading" else (2,)
    C, K = builders.symmetric(batch, 100, torch.float32, 0), builders.key_batch(batch, 45, 100, torch.float32, 1)
    if layout == "transposed":
        C, K = C.mT, K.mT.contiguous().mT
    elif layout == "rows apart":
        K = torch.cat([K, torch.full_like(K, float("nan"))], -1)[..., :100]
    elif layout == "expanded":
        K = K[:1].expand(2, -1, -1)
    else:
        C, K = (A.transpose(0, 1).contiguous().transpose(0, 1) for A in (C, K))
    assert by_warpgroups(100, check(C, K))


@pytest.mark.parametrize(("d", "u"), [(196, 100), (516, 40)])
def test_the_same_bits_in_any_order_of_blocks_and_warps(d, u, asked) -> None:
    C, K = builders.symmetric((2,), d, torch.float32, 0), builders.key_batch((2,), u, d, torch.float32, 1)
    first = products(C, K)
    with emulated.descending():
        other = products(C, K)
    with emulated.beside(3):
        third = products(C, K)
    for again in (other, third, products(C, K)):
        assert torch.equal(first[0], again[0])
        assert torch.equal(first[1], again[1])


def test_as_good_as_float32(asked) -> None:
    """At most twice the error of the same torch sequence in IEEE float32 (truncating tensor cores are emulated)."""
    C, K = builders.symmetric((), 512, torch.float32, 6, 1e4), builders.key_batch((), 64, 512, torch.float32, 7)
    exact_Y, exact_G = rk.reference.gain_products(C, K)
    Y, G, launches = products(C, K)
    assert by_warpgroups(512, launches)
    plain = C @ K.mT
    assert error(Y, exact_Y) <= 2.0 * error(plain, exact_Y)
    assert error(G, exact_G) <= 2.0 * error(K @ plain, exact_G)
    C, K = torch.full((1024, 1024), 1.0 + 2.0**-12), torch.ones(33, 1024)  # a biased sum would show here
    Y, _, launches = products(C, K)
    assert by_warpgroups(1024, launches)
    assert error(Y, np.full((1024, 33), 1024 * (1.0 + 2.0**-12))) < 1e-6


@pytest.mark.parametrize("pattern", [0x7FFFFFFF, 0xFFFFFFFF, 0x7FC00000, 0x7F800001, 0x7F800000])
def test_what_is_not_finite_shows(pattern, asked) -> None:
    value = torch.from_numpy(np.array([pattern], np.uint32).view(np.float32))
    C, K = builders.symmetric((), 200, torch.float32, 0), builders.key_batch((), 40, 200, torch.float32, 1)
    C[70, 130] = value[0]
    Y, _, launches = products(C, K)
    assert by_warpgroups(200, launches)
    assert not torch.isfinite(Y[70]).any()
    assert torch.isfinite(Y[torch.arange(200) != 70]).all()
    C, K = builders.symmetric((), 200, torch.float32, 0), builders.key_batch((), 40, 200, torch.float32, 1)
    K[7, 131] = value[0]
    Y, *_ = products(C, K)
    assert not torch.isfinite(Y[:, 7]).any()
    assert torch.isfinite(Y[:, torch.arange(40) != 7]).all()


@pytest.mark.parametrize("op", ["rls_update_", "downdate_gain_products_"])
def test_ops_that_contain_the_product(op, asked) -> None:
    C, K = builders.symmetric((2,), 72, torch.float32, 0), builders.key_batch((2,), 40, 72, torch.float32, 1)
    Z = 0.1 * builders.columns((2,), 72, 40, torch.float32, 2)
    given = (C, K, 0.5, 0.9) if op == "rls_update_" else (C, Z, K, -0.5)
    expected = getattr(rk.reference, op)(*given)
    cuda.kernel(op)(*given, input_precision="tf32x3")
    assert error(C, expected[0]) < tolerances.product(72, torch.float32)


@pytest.mark.parametrize(("d", "v", "u"), [(64, 40, 33), (196, 193, 100), (520, 70, 130), (66, 40, 40)])
def test_innovations_of_a_transposed_weight(d, v, u, asked) -> None:
    """K W for the transpose of the weight of an nn.Linear; its d has to be a multiple of 4."""
    W, K = builders.columns((2,), d, v, torch.float32, 0), builders.key_batch((2,), u, d, torch.float32, 1)
    V, gain = builders.key_batch((2,), u, v, torch.float32, 2), builders.columns((2,), d, u, torch.float32, 3)
    expected = V.double() - K.double() @ W.double()
    for weight, taken in ((W.mT.contiguous().mT, d % 4 == 0), (W.clone(), False)):
        before = emulated.launches()
        E: Any = cuda.kernel("weight_update_")(weight, K, V, gain, input_precision="tf32x3")
        assert emulated.launches() - before == 3 + taken
        assert E.is_contiguous()
        assert error(E, expected.numpy()) < tolerances.product(d, torch.float32)
        new = W.double() + gain.double() @ expected
        assert error(weight, new.numpy()) < tolerances.product(max(u, d), torch.float32)


def test_no_races(asked) -> None:
    """Of warpgroups that share tiles, one of them a step ahead, and of the copies behind their barriers."""
    try:
        races.runtime()
        races.watched(["-c", "pass"])
        output, found = races.found_in(["gain_products"])
    except emulated.CannotEmulate as error:
        pytest.skip(f"races of CUDA kernels: {error}")
    assert not found, "\n\n".join(dict.fromkeys(map(races.brief, found)))
    assert any(line.split()[-2:] == ["100", "8"] for line in output.splitlines())  # four launches, twice


def swizzled(B: np.ndarray) -> np.ndarray:
    """Rows of 128 bytes as wgmma reads them: 16-byte chunk c of row r at chunk c ^ (r & 7)."""
    result = np.empty_like(B)
    for r in range(B.shape[0]):
        for chunk in range(8):
            at = chunk ^ (r & 7)
            result[r, 4 * at : 4 * at + 4] = B[r, 4 * chunk : 4 * chunk + 4]
    return result


@pytest.fixture(scope="module")
def product() -> Any:
    source = Path(__file__).with_name("warpgroup.cpp")
    try:
        path = emulated.compile_for_cpu([source], emulated.ROOT / "build" / "emulated" / "warpgroup", with_torch=False)
    except emulated.CannotEmulate as error:
        pytest.skip(f"CUDA kernels on the CPU: {error}")
    function = ctypes.CDLL(str(path)).product
    function.restype = ctypes.c_char_p

    def run(A: np.ndarray, B: np.ndarray, mistake: int = 0, descending: int = 0) -> tuple[bytes, np.ndarray]:
        out = np.zeros((64, 104), np.float32)
        pointers = [ctypes.c_void_p(array.ctypes.data) for array in (A, B, out)]
        return function(*pointers, mistake, descending), out

    return run


@pytest.fixture(scope="module")
def operands() -> tuple[np.ndarray, np.ndarray]:
    """Small integers: exact in tf32, and so are their sums of products."""
    rng = np.random.default_rng(0)
    return rng.integers(-9, 9, (64, 32)).astype(np.float32), rng.integers(-9, 9, (104, 32)).astype(np.float32)


@pytest.mark.parametrize("descending", [0, 1])
def test_a_product_of_a_warpgroup(descending, product, operands) -> None:
    A, B = operands
    said, out = product(A, swizzled(B), descending=descending)
    assert said == b""
    assert np.array_equal(out, A @ B.T)


def test_the_wrong_swizzle_gives_the_wrong_product(product, operands) -> None:
    A, B = operands
    said, out = product(A, B)
    assert said == b""
    assert not np.array_equal(out, A @ B.T)


def test_the_low_bits_of_operands_are_ignored(product, operands) -> None:
    A, B = (array + np.float32(2.0**-19) * np.sign(array) for array in operands)
    said, out = product(A, swizzled(B))
    assert said == b""
    assert np.array_equal(out, operands[0] @ operands[1].T)


@pytest.mark.parametrize(
    ("mistake", "message"),
    [
        (1, b"a wgmma that nobody waited for"),
        (2, b"a bulk copy that nobody waited for"),
        (3, b"wgmma without a fence before it"),
        (4, b"a barrier that was started without a fence behind it"),
        (5, b"warps of a warpgroup issue different products"),
        (6, b"a barrier that not all threads reach"),
        (7, b"a barrier that not all threads reach"),
        (9, b"a barrier that was not started"),
    ],
)
def test_a_mistake_is_an_error(mistake, message, product, operands) -> None:
    said, _ = product(operands[0], swizzled(operands[1]), mistake)
    assert message in said
    said, out = product(operands[0], swizzled(operands[1]))  # and the next launch is not spoiled
    assert said == b""
    assert np.array_equal(out, operands[0] @ operands[1].T)


@pytest.mark.parametrize("mistake", [1, 2, 8])
def test_what_was_not_waited_for_is_nan(mistake, product, operands) -> None:
    _, out = product(operands[0], swizzled(operands[1]), mistake)
    assert np.isnan(out).any()
    assert np.isnan(out).all() == (mistake != 8)


def test_the_compiler_keeps_the_products_asynchronous(tmp_path) -> None:
    """Twelve wgmma a step for each width, no spills, none of ptxas' warnings of products one after the other."""
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("nvcc is not here")
    headers = Path(torch.__file__).parent / "include"
    target = tmp_path / "warpgroup_product.cubin"
    command = [nvcc, "-std=c++17", "-O3", "-cubin", "-gencode=arch=compute_90a,code=sm_90a", "-Xptxas=-v"]
    command += ["-DUSE_CUDA", "-DTORCH_TARGET_VERSION=0x020b000000000000", "-isystem", str(headers)]
    source = emulated.SOURCES / "warpgroup_product.cu"
    done = subprocess.run([*command, str(source), "-o", str(target)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    assert "serialized" not in done.stderr
    assert not re.search(r"C75\d\d|warning", done.stderr)
    assert re.findall(r"(\d+) bytes spill", done.stderr)
    assert set(re.findall(r"(\d+) bytes spill", done.stderr)) == {"0"}
    tool = shutil.which("cuobjdump") or next(map(str, Path(headers).parents[1].glob("triton/**/bin/cuobjdump")), None)
    if tool is None:
        pytest.skip("cuobjdump is not here")
    code = subprocess.run([tool, "--dump-sass", str(target)], capture_output=True, text=True, check=True).stdout
    for width in (64, 104, 112):
        assert len(re.findall(rf"HGMMA\.64x{width}x8\.F32\.TF32", code)) == 12
