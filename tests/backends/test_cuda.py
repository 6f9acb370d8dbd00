"""The loader of the CUDA library, where there is none, where it is broken, and where it does not fit the GPU."""

from __future__ import annotations

from pathlib import Path

import pytest

from rlsedit_kernels.backends import cuda


def test_a_missing_library_is_a_reason(tmp_path: Path) -> None:
    found, why = cuda.load_library(tmp_path / "none.so", tmp_path / "none.txt")
    assert not found
    assert "build_ext --inplace" in why


def test_the_note_of_the_build_is_the_reason(tmp_path: Path) -> None:
    note = tmp_path / "note.txt"
    note.write_text("nvcc, the CUDA compiler, was not found\n", encoding="utf-8")
    expected = "the CUDA library was not built: nvcc, the CUDA compiler, was not found"
    assert cuda.load_library(tmp_path / "none.so", note) == (False, expected)


def test_a_broken_library_is_a_reason_and_no_exception(tmp_path: Path) -> None:
    broken = tmp_path / "broken.so"
    broken.write_bytes(b"\x7fELF" + bytes(100))
    found, why = cuda.load_library(broken, tmp_path / "none.txt")
    assert not found
    assert "cannot be loaded by torch" in why


@pytest.mark.parametrize(
    ("capability", "architectures", "good"),
    [
        ((9, 0), "80-real 90a-real", True),
        ((9, 0), "80-real", False),
        ((8, 9), "80-real", True),
        ((8, 0), "86-real", False),
        ((10, 3), "100-real", True),
        ((9, 1), "90a-real", False),
        ((12, 0), "90a-real 100-real", False),
        ((12, 0), "90a-real 100-virtual", True),
        ((9, 0), "100-virtual", False),
        ((9, 0), "80", True),
        ((9, 0), "90a-virtual", False),
        ((9, 0), "", False),
    ],
)
def test_machine_code_and_ptx_run_where_they_do(capability: tuple[int, int], architectures: str, good: bool) -> None:
    assert cuda.serves(capability, architectures) is good
