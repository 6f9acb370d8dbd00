"""The layout shows the architecture: no import goes in a circle, and every part knows only what stands below it."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = {"rlsedit_kernels": ROOT / "rlsedit_kernels", "rlsedit": ROOT / "python" / "rlsedit"}

UPWARD = {
    ("rlsedit_kernels.states.state", "rlsedit_kernels.states.conversion"): "`State.convert` gives either kind of state",
    ("rlsedit.config", "rlsedit.presets"): "`EditConfig.for_model` is a name for `presets.preset`",
    ("rlsedit.config", "rlsedit.methods"): "and says that it takes a `Method`",
}
"""Imports in a function, or for types alone, that would close a circle: public names at the place where they are looked
for, whose work is done above it."""

LAYERS = {
    "rlsedit_kernels": (
        "_version errors reference ops.schemas ops.contract",
        "triton_kernels",
        "backends",
        "ops",
        "priors",
        "states",
        "solutions rounding",
        "filter filter_saving",
        "distributed dropin profile",
        "diagnostics",
    ),
    "rlsedit": (
        "jsonlines paths texts facts recorded reports config parallel patching patch_forms",
        "methods models",
        "presets moments prompts weights deviations recording selftext metrics report parallel.solver "
        "parallel.deviations",
        "targets keys store",
        "writing checking store.removal store.replay models.smollm2 parallel.folder parallel.layers",
        "export parallel.lora",
        "editor",
        "compare demo evaluation profiling tasks report.stream",
        "cli",
    ),
}
"""Modules and packages from below; a part of a package may stand above the rest. The packages themselves are above all.
"""


def _modules(package: str) -> dict[str, Path]:
    """Files of a package by the names of their modules."""
    root = PACKAGES[package]
    found = {}
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        found[".".join((package, *parts)).removesuffix(".__init__")] = path
    return found


MODULES = {name: path for package in PACKAGES for name, path in _modules(package).items()}


def _imports(body: list[ast.stmt], later: bool = False) -> Iterator[tuple[ast.Import | ast.ImportFrom, bool]]:
    """Import statements, and whether they are carried out later than the module is loaded, or never."""
    for node in body:
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield node, later
        typing_only = isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        inside = later or typing_only or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        for name in ("body", "orelse", "finalbody", "handlers"):
            nested = getattr(node, name, [])
            yield from _imports(nested, inside if name == "body" or not typing_only else later)


def _targets(name: str, path: Path, node: ast.Import | ast.ImportFrom) -> set[str]:
    """The modules of ours that a statement in the module `name` names."""
    if isinstance(node, ast.Import):
        return {alias.name for alias in node.names} & MODULES.keys()
    source = node.module or ""
    if node.level:
        package = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
        parents = package[: len(package) - node.level + 1]
        source = ".".join([*parents, source] if source else parents)
    named = (f"{source}.{alias.name}" for alias in node.names)
    return {found if found in MODULES else source for found in named} & MODULES.keys()


def graph(later: bool) -> dict[str, set[str]]:
    """What every module imports when it is loaded, or, with `later`, in functions and for types as well."""
    found: dict[str, set[str]] = {}
    for name, path in MODULES.items():
        statements = _imports(ast.parse(path.read_text(encoding="utf-8")).body)
        targets = (_targets(name, path, node) for node, deferred in statements if later or not deferred)
        found[name] = set().union(*targets) - {name}
    return found


def circle(edges: dict[str, set[str]]) -> str:
    """A circle of imports, written out; nothing where there is none."""
    try:
        TopologicalSorter(edges).prepare()
    except CycleError as error:
        return " <- ".join(error.args[1])
    return ""


def test_no_module_needs_itself_to_be_loaded() -> None:
    """A module that is imported brings the packages that it is in along, but for those that both are in."""
    edges = {}
    for name, targets in graph(later=False).items():
        found = set(targets)
        for target in targets:
            parts = target.split(".")
            parents = {".".join(parts[:n]) for n in range(1, len(parts))}
            found |= {parent for parent in parents if not f"{name}.".startswith(f"{parent}.")}
        edges[name] = found - {name}
    assert not circle(edges)


def test_no_import_hides_a_circle() -> None:
    """In functions and for types neither, but for those of `UPWARD`, of which each one closes a circle."""
    edges = graph(later=True)
    for importer, target in UPWARD:
        edges[importer].discard(target)
    assert not circle(edges)
    for importer, target in UPWARD:
        edges[importer].add(target)
        assert circle(edges), f"{importer} may import {target} like anything else"
        edges[importer].discard(target)


def _layer(package: str, name: str) -> int:
    """The layer that a module is in, by the longest name that it begins with."""
    inside = name.removeprefix(package).removeprefix(".")
    if inside in ("", "__main__"):
        return len(LAYERS[package])
    known = {part: level for level, parts in enumerate(LAYERS[package]) for part in parts.split()}
    found = [part for part in known if f"{inside}.".startswith(f"{part}.")]
    assert found, f"{name} is in no layer"
    return known[max(found, key=len)]


@pytest.mark.parametrize("package", LAYERS)
def test_layers_know_only_what_is_below_them(package: str) -> None:
    wrong = [
        f"{name} imports {target}"
        for name, targets in graph(later=True).items()
        for target in targets - {above for importer, above in UPWARD if importer == name}
        if name.split(".")[0] == target.split(".")[0] == package and _layer(package, target) > _layer(package, name)
    ]
    assert wrong == []


def test_the_kernels_know_nothing_of_the_editor() -> None:
    kernels = {name: targets for name, targets in graph(later=True).items() if name.startswith("rlsedit_kernels")}
    assert not [name for name, targets in kernels.items() for target in targets if target.split(".")[0] == "rlsedit"]


def test_circles_and_deferred_imports_are_found() -> None:
    """By the tests above, which would find nothing if nothing were read."""
    edges = graph(later=False)
    assert sum(map(len, graph(later=True).values())) > sum(map(len, edges.values())) > 1000
    edges["rlsedit_kernels.states.batch"].add("rlsedit_kernels.states.covariance")
    assert "states.batch" in circle(edges)
    assert _layer("rlsedit", "rlsedit.parallel.layers") > _layer("rlsedit", "rlsedit.parallel.processes")
