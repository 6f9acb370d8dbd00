"""The native CPU library: its loader, its engines, and the same bits whatever the number of threads."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support import builders, tolerances

import rlsedit_kernels as rk
from rlsedit_kernels.backends import cpu

available, reason = cpu.load()
needs_library = pytest.mark.skipif(not available, reason=f"the native CPU library is not here: {reason}")


def test_a_missing_library_is_a_reason(tmp_path: Path) -> None:
    found, why = cpu.load_library(tmp_path / "none.so", tmp_path / "none.txt")
    assert not found
    assert "build_ext --inplace" in why


def test_the_note_of_the_build_is_the_reason(tmp_path: Path) -> None:
    note = tmp_path / "note.txt"
    note.write_text("cmake was not found\n", encoding="utf-8")
    assert cpu.load_library(tmp_path / "none.so", note) == (
        False,
        "the native CPU library was not built: cmake was not found",
    )


def test_a_broken_library_is_a_reason_and_no_exception(tmp_path: Path) -> None:
    broken = tmp_path / "broken.so"
    broken.write_bytes(b"\x7fELF" + bytes(100))
    found, why = cpu.load_library(broken, tmp_path / "none.txt")
    assert not found
    assert "cannot be loaded by torch" in why


def test_build_info_says_how_or_why_not() -> None:
    info = rk.build_info()
    if not available:
        assert "reason" in info
        return
    assert info["version"] == rk.__version__
    assert info["torch_target"] == "0x020a000000000000"
    assert info["float32"]["in_use"]["name"] in info["float32"]["compiled"]


@needs_library
def test_the_library_holds_no_path_of_the_machine_that_built_it() -> None:
    """What its messages name are files of the project, and of torch where a check of its headers failed."""
    assert str(Path(torch.__file__).parents[1]).encode() not in cpu._LIBRARY.read_bytes()
    assert b".venv" not in cpu._LIBRARY.read_bytes()


@needs_library
@pytest.mark.parametrize("op", ["gain_products", "rls_update_"])
@pytest.mark.parametrize(("d", "u"), [(257, 33), (96, 130)])
def test_the_same_bits_for_any_number_of_threads(op: str, d: int, u: int) -> None:
    results = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            C, K = builders.symmetric((), d, torch.float32, 0), builders.key_batch((), u, d, torch.float32, 1)
            results.append((*getattr(torch.ops.rlsedit_kernels_cpu, op)(C, K), C))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@needs_library
@pytest.mark.parametrize("u", [8, 40])
@pytest.mark.parametrize("turned", [False, True])
def test_a_weight_is_rounded_once_by_a_batch(u: int, turned: bool, dtype: torch.dtype) -> None:
    """What each key adds is a quarter of the last place of W: added one by one it would be lost."""
    d, v, quarter = 45, 70, 0.25 * torch.finfo(dtype).eps
    W = torch.ones(v, d, dtype=dtype).mT if turned else torch.ones(d, v, dtype=dtype)
    K, gain = torch.zeros(u, d, dtype=dtype), torch.ones(d, u, dtype=dtype)
    torch.ops.rlsedit_kernels_cpu.weight_update_(W, K, torch.full((u, v), quarter, dtype=dtype), gain)
    assert torch.equal(W, torch.full_like(W, 1.0 + u * quarter))


@needs_library
def test_the_baseline_engine_agrees(tmp_path: Path, dtype: torch.dtype) -> None:
    """Without vector instructions of the processor the same problem has the same solution."""
    target = tmp_path / "gain.pt"
    code = (
        "import sys, torch; sys.path.insert(0, sys.argv[1]);"
        "from support import builders; import rlsedit_kernels as rk;"
        f"C = builders.symmetric((), 130, {dtype}, 0); K = builders.key_batch((), 37, 130, {dtype}, 1);"
        "gain, info = rk.ops.rls_update_(C, K);"
        "torch.save((gain, C, rk.build_info()['float32']['in_use']['name']), sys.argv[2])"
    )
    environment = {**os.environ, "RLSEDIT_CPU_ENGINE": "baseline", "RLSEDIT_BACKEND": "cpu"}
    tests = str(Path(__file__).resolve().parents[1] / "helpers")
    subprocess.run([sys.executable, "-c", code, tests, str(target)], env=environment, check=True)
    gain, C, name = torch.load(target)
    assert name == "baseline"
    before = builders.symmetric((), 130, dtype, 0)
    expected = rk.reference.rls_update_(before, builders.key_batch((), 37, 130, dtype, 1))
    assert tolerances.relative_error(C, expected[0]) < tolerances.solve(37, 5.0, dtype)
    assert tolerances.relative_error(gain, expected[1]) < tolerances.solve(37, 5.0, dtype)


def test_an_engine_that_does_not_exist_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(cpu.ENGINE_VARIABLE, "AVX2")
    with pytest.raises(ValueError, match=r"RLSEDIT_CPU_ENGINE must be empty or one of .*got 'AVX2'"):
        cpu.load.__wrapped__()


@needs_library
@pytest.mark.parametrize(
    ("op", "arguments", "message"),
    [
        ("gain_products", (torch.eye(3), torch.ones(2, 4)), "gain_products"),
        ("downdate_", (torch.eye(3), torch.ones(4, 2)), "downdate_"),
        ("downdate_", (torch.ones(5).as_strided((3, 3), (1, 1)), torch.ones(3, 2)), "overlap itself"),
        ("cholesky", (torch.ones(2, 3),), "cholesky"),
        ("gain_solve", (torch.ones(4, 2), torch.eye(3), 1.0), "gain_solve"),
        ("rls_update_", (torch.eye(3), torch.ones(2, 4)), "rls_update_"),
    ],
)
def test_native_code_checks_again(op: str, arguments: tuple, message: str) -> None:
    """Called past the wrappers, a wrong shape is an error and no access out of bounds."""
    with pytest.raises(RuntimeError, match=message):
        getattr(torch.ops.rlsedit_kernels_cpu, op)(*arguments)
