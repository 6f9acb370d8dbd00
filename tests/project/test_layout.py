"""Promises about the repository itself: one version, documented switches, one-way imports, no prints."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import rlsedit_kernels as rk
from rlsedit_kernels.ops.schemas import SCHEMAS

ROOT = Path(__file__).resolve().parents[2]
KERNELS = sorted((ROOT / "rlsedit_kernels").rglob("*.py"))
EDITOR = sorted((ROOT / "python" / "rlsedit").rglob("*.py"))
SWITCH = re.compile(
    r"(?:environ(?:\.get)?[(\[]|getenv\(|switch\()\s*\"(RLSEDIT_[A-Z_]+)\"|_VARIABLE = \"(RLSEDIT_[A-Z_]+)\""
)


def relative(path: Path) -> str:
    return str(path.relative_to(ROOT))


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
            found.update(f"{node.module}.{alias.name}" for alias in node.names)
    return found


def test_every_switch_is_documented_and_none_is_invented() -> None:
    documented = set(re.findall(r"`(RLSEDIT_[A-Z_]+)`", (ROOT / "docs" / "environment.md").read_text(encoding="utf-8")))
    sources = [*KERNELS, *EDITOR, ROOT / "setup.py", *ROOT.glob("csrc/**/*.cpp"), *ROOT.glob("csrc/**/*.cu")]
    read = {
        name for path in sources for pair in SWITCH.findall(path.read_text(encoding="utf-8")) for name in pair if name
    }
    assert read == documented


def test_the_version_stands_in_one_place() -> None:
    pattern = re.compile(r"version\w*\s*=\s*[\"']" + re.escape(rk.__version__))
    files = [*KERNELS, *EDITOR, ROOT / "setup.py", ROOT / "pyproject.toml", ROOT / "CMakeLists.txt"]
    found = [relative(path) for path in files if pattern.search(path.read_text(encoding="utf-8"))]
    assert found == ["rlsedit_kernels/_version.py"]


@pytest.mark.parametrize("path", KERNELS, ids=relative)
def test_nothing_below_the_editor_knows_a_language_model(path) -> None:
    forbidden = {"rlsedit", "transformers", "tokenizers", "safetensors"}
    assert not {name.split(".")[0] for name in imports(path)} & forbidden


@pytest.mark.parametrize("path", [p for p in KERNELS if "reference" in p.relative_to(ROOT).parts], ids=relative)
def test_the_reference_is_independent(path) -> None:
    ours = {name for name in imports(path) if name.startswith("rlsedit_kernels")}
    assert all(name.startswith("rlsedit_kernels.reference") for name in ours)
    assert "torch" not in {name.split(".")[0] for name in imports(path)}


@pytest.mark.parametrize(
    "path", [p for p in KERNELS if {"ops", "backends"} & set(p.relative_to(ROOT).parts)], ids=relative
)
def test_ops_know_nothing_of_states(path) -> None:
    above = ("rlsedit_kernels.states", "rlsedit_kernels.priors", "rlsedit_kernels.filter")
    assert not [name for name in imports(path) if name.startswith(above)]


PRINTING = {"cli", "demo", "report"}


@pytest.mark.parametrize(
    "path", [*KERNELS, *(p for p in EDITOR if not PRINTING & set(p.relative_to(ROOT).parts))], ids=relative
)
def test_libraries_do_not_print(path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    calls = [n for n in ast.walk(tree) if isinstance(n, ast.Call) and isinstance(n.func, ast.Name)]
    assert not [call.lineno for call in calls if call.func.id == "print"]


def _heads() -> dict[str, str]:
    """What files of GPU kernels start with, by path."""
    triton, cuda = ROOT / "rlsedit_kernels" / "triton_kernels", ROOT / "csrc" / "cuda"
    heads = {path: ast.get_docstring(ast.parse(path.read_text())) or "" for path in triton.glob("*.py")}
    heads |= {path: path.read_text().partition("#include")[0] for path in cuda.glob("*.cu")}
    named = {*SCHEMAS, "reflectors", "warpgroup_product"}
    return {str(path.relative_to(ROOT)): head for path, head in heads.items() if path.stem in named}


@pytest.mark.parametrize("path", sorted(_heads()))
def test_a_kernel_starts_with_its_equation_its_tiles_and_what_it_costs(path) -> None:
    head = _heads()[path]
    assert re.search(r"\S (=|<-|\+=|->) \S", head), "an equation"
    assert len(re.findall(r"^.*(?:\+--|\|.*\||\[.*\]|==>|--->)", head, re.MULTILINE)) >= 2, "a picture of its tiles"
    assert "Bytes: " in head, "bytes"
    assert re.search(r"\b[Ff]lops\s", head), "flops"


@pytest.mark.parametrize("path", [*KERNELS, *EDITOR], ids=relative)
def test_files_stay_short(path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 500


@pytest.mark.parametrize("package", [ROOT / "rlsedit_kernels", ROOT / "python" / "rlsedit"], ids=relative)
def test_types_are_told_to_others(package) -> None:
    assert (package / "py.typed").is_file()


def test_parts_of_the_package_are_there_without_an_import_of_their_own() -> None:
    """As the documents name them: rk.diagnostics, rk.distributed, rk.dropin."""
    code = (
        "import sys, rlsedit_kernels as rk\n"
        "names = ('diagnostics', 'distributed', 'dropin')\n"
        "assert not any('rlsedit_kernels.' + name in sys.modules for name in names)\n"
        "assert set(names) <= set(dir(rk))\n"
        "rk.diagnostics.run_trials, rk.distributed.Ranks, rk.dropin.alphaedit\n"
        "assert not hasattr(rk, 'nothing')\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_public_names_have_docstrings() -> None:
    undocumented = [
        name for name in rk.__all__ if name != "__version__" and not (getattr(rk, name).__doc__ or "").strip()
    ]
    assert undocumented == []
