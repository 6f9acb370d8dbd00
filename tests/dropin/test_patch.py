"""Other code bases under `rlsedit.patch` write the weights that they write without it; unknown versions are refused."""

from __future__ import annotations

import importlib.util
import linecache
import runpy
import sys
import types
import warnings
from collections.abc import Callable
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch

import rlsedit
from rlsedit.patching import UnknownVersionError
from rlsedit_kernels import dropin

pytestmark = pytest.mark.usefixtures("on_the_cpu")

BATCHES = 10
PLACES = {
    "alphaedit": ("AlphaEdit.AlphaEdit_main", "apply_AlphaEdit_to_model"),
    "memit": ("memit.memit_main", "apply_memit_to_model"),
    "rlsedit": ("RLSEdit.RLSEdit_main", "apply_RLSEdit_to_model"),
    "easyedit": ("easyeditor.models.alphaedit.AlphaEdit_main", "apply_AlphaEdit_to_model"),
    "easyedit-memit": ("easyeditor.models.memit.memit_main", "apply_memit_to_model"),
}


OLDER_EASYEDIT = (
    ('        proj = P[i, :, :].to("cpu").float()\n', ""),
    ('        cache = cache_c[i, :, :].to("cpu").float()\n', ""),
    ("proj @ (layer_ks @ layer_ks.T + cache)", 'P[i, :, :].to("cpu") @ (layer_ks @ layer_ks.T + cache_c[i, :, :])'),
    ("proj @ layer_ks @ resid.T", 'P[i, :, :].to("cpu") @ layer_ks @ resid.T'),
    ("dtype=proj.dtype", "dtype=torch.float"),
)
"""What turns the stand-in for EasyEdit into the form that its first versions with AlphaEdit have."""


def rewritten(
    place: str, pairs: tuple[tuple[str, str], ...], monkeypatch: pytest.MonkeyPatch, folder: Path
) -> types.ModuleType:
    """The stand-in at `place` with passages replaced, importable in its stead."""
    name = PLACES[place][0]
    source = Path(str(import_module(name).__file__)).read_text(encoding="utf-8")
    for old, new in pairs:
        assert old in source
        source = source.replace(old, new)
    (folder / "changed.py").write_text(source, encoding="utf-8")
    spec = importlib.util.spec_from_file_location("changed", folder / "changed.py")
    assert spec is not None
    assert spec.loader is not None
    changed = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(changed)
    monkeypatch.setitem(sys.modules, name, changed)
    linecache.checkcache()
    return changed


def run(place: str, count: int = BATCHES, model: Any = None, first: int = 0, state: Any = None) -> tuple[Any, Any]:
    """Write batches with one of the code bases; (model, what it keeps between batches)."""
    toy = import_module("toy")
    module, function = PLACES[place]
    model, hparams = model or toy.Toy(), toy.hparams()
    P = toy.projectors(model, hparams.nullspace_threshold) if place == "alphaedit" else None
    if place == "alphaedit" and state is None:
        state = torch.zeros_like(P)
    for t in range(first, first + count):
        apply: Callable[..., Any] = getattr(import_module(module), function)
        wanted = toy.requests(toy.U, 100 + t)
        if place == "alphaedit":
            _, state = apply(model, None, wanted, hparams, cache_c=state, P=P)
        elif place == "rlsedit":
            _, state = apply(model, None, wanted, hparams, cache_c=state)
        else:
            apply(model, None, wanted, hparams)
    return model, state


def largest_difference(one: Any, other: Any) -> float:
    pairs = zip(one.weights, other.weights, strict=True)
    return max(float((a - b).norm() / b.norm()) for a, b in pairs)


@pytest.mark.parametrize("verify", [False, True])
@pytest.mark.parametrize("place", PLACES)
def test_the_weights_are_those_of_the_original(place: str, verify: bool) -> None:
    exact, _ = run(place)
    for name in [name for name in sys.modules if name.startswith("easyeditor")]:
        del sys.modules[name]  # EasyEdit keeps its cache of keys in the module
    first = import_module("toy").Toy()
    with warnings.catch_warnings(), rlsedit.patch(place.partition("-")[0], verify=verify):
        warnings.simplefilter("error")
        found, _ = run(place)
    assert largest_difference(found, exact) < 1e-4
    assert largest_difference(first, exact) > 0.1


@pytest.mark.parametrize("place", PLACES)
def test_everything_is_as_it_was_behind_the_block(place: str) -> None:
    module, function = PLACES[place]
    owner = import_module(module)
    names = {name: getattr(owner, name) for name in dir(owner) if callable(getattr(owner, name))}

    def fail() -> None:
        with rlsedit.patch(place.partition("-")[0]):
            changed = [name for name, value in names.items() if getattr(owner, name) is not value]
            assert len(changed) == 1
            raise RuntimeError("inside")

    with pytest.raises(RuntimeError, match="inside"):
        fail()
    assert all(getattr(owner, name) is value for name, value in names.items())
    run(place, 2)
    assert callable(getattr(owner, function))


def test_nothing_d_by_d_is_solved(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the stand-ins reach the solve, one for each layer."""
    kinds = []
    solve = torch.linalg.solve

    def spy(A: Any, B: Any, **kwargs: Any) -> Any:
        kinds.append(type(A).__name__)
        return solve(A, B, **kwargs)

    monkeypatch.setattr(torch.linalg, "solve", spy)
    with rlsedit.patch("alphaedit"):
        run("alphaedit", 2)
    assert kinds == ["_System"] * 2 * import_module("toy").LAYERS


def test_a_stream_that_began_without_is_continued() -> None:
    exact, _ = run("alphaedit")
    model, cache = run("alphaedit", 4)
    with rlsedit.patch("alphaedit", verify=True):
        found, kept = run("alphaedit", 6, model, 4, cache)
    assert kept is cache
    assert largest_difference(found, exact) < 1e-4


def test_easyedit_can_reset_its_cache_inside() -> None:
    toy, module = import_module("toy"), import_module(PLACES["easyedit"][0])
    models = [toy.Toy(), toy.Toy()]
    for model, block in zip(models, (False, True), strict=True):
        module.cache_c_new = False
        with rlsedit.patch("easyedit") if block else pytest.MonkeyPatch.context():
            for t in range(6):
                module.apply_AlphaEdit_to_model(model, None, toy.requests(3, t), toy.hparams(), reset_cache=t == 3)
    assert largest_difference(models[1], models[0]) < 1e-4
    assert isinstance(module.P, torch.Tensor)


def test_easyedit_goes_on_behind_the_block() -> None:
    """With the keys of the batches that were written inside of it; and P from a file, read once."""
    exact, _ = run("easyedit", 6)
    name = PLACES["easyedit"][0]
    del sys.modules[name]
    module = import_module(name)
    with rlsedit.patch("easyedit"):
        found, _ = run("easyedit", 3)
    assert isinstance(module.cache_c, torch.Tensor)
    run("easyedit", 3, found, 3)
    assert largest_difference(found, exact) < 1e-4
    assert largest_difference(run("easyedit", 3, found, 6)[0], exact) > 1e-2


def test_easyedit_with_projectors_from_a_file(tmp_path: Path) -> None:
    toy, module = import_module("toy"), import_module(PLACES["easyedit"][0])
    exact, _ = run("easyedit", 4)
    torch.save(toy.projectors(toy.Toy(), toy.hparams().nullspace_threshold), tmp_path / "P.pt")
    hparams, found = toy.hparams(P_loc=str(tmp_path / "P.pt")), toy.Toy()
    module.cache_c_new = module.P_loaded = False
    with rlsedit.patch("easyedit", verify=True):
        for t in range(4):
            module.apply_AlphaEdit_to_model(found, None, toy.requests(toy.U, 100 + t), hparams)
    assert largest_difference(found, exact) < 1e-4


def test_easyedit_with_other_projectors_for_a_later_batch() -> None:
    """Made anew in every call, from hyper-parameters that may change."""
    toy, found = import_module("toy"), []
    for block in (pytest.MonkeyPatch.context, lambda: rlsedit.patch("easyedit", verify=True)):
        sys.modules.pop(PLACES["easyedit"][0], None)
        module, model = import_module(PLACES["easyedit"][0]), toy.Toy()
        with block():
            for t, threshold in enumerate((0.3, 0.3, 1.0, 0.3)):
                hparams = toy.hparams(nullspace_threshold=threshold)
                module.apply_AlphaEdit_to_model(model, None, toy.requests(3, t), hparams)
                assert all(isinstance(kept, torch.Tensor) for kept in (module.P, module.cache_c))
        found.append((model, module.cache_c))
    assert largest_difference(found[1][0], found[0][0]) < 1e-4
    torch.testing.assert_close(found[1][1], found[0][1], rtol=1e-4, atol=1e-4)


def test_the_older_form_of_easyedit(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    exact, _ = run("easyedit")
    rewritten("easyedit", OLDER_EASYEDIT, monkeypatch, tmp_path)
    with rlsedit.patch("easyedit", verify=True):
        found, _ = run("easyedit")
    assert largest_difference(found, exact) < 1e-4


def test_memit_in_one_function(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """As in forks whose `apply_memit_to_model` solves itself."""
    exact, _ = run("memit")
    names = (("def apply_memit_to_model", "def outer"), ("execute_memit", "apply_memit_to_model"))
    changed = rewritten("memit", names, monkeypatch, tmp_path)
    with rlsedit.patch("memit", verify=True):
        changed.apply_memit_to_model, inner = changed.outer, changed.apply_memit_to_model  # type: ignore[attr-defined]
        changed.outer.__globals__["apply_memit_to_model"] = inner  # type: ignore[attr-defined]
        model = import_module("toy").Toy()
        for t in range(BATCHES):
            toy = import_module("toy")
            changed.outer(model, None, toy.requests(toy.U, 100 + t), toy.hparams())  # type: ignore[attr-defined]
    assert largest_difference(model, exact) < 1e-4


def test_a_script_that_was_written_for_the_original(tmp_path: Path) -> None:
    """As experiments/evaluate.py is: the function by name and in a table, made before the block or in it."""
    script = tmp_path / "script.py"
    script.write_text(
        "from AlphaEdit.AlphaEdit_main import apply_AlphaEdit_to_model\n"
        "TABLE = {'AlphaEdit': (dict, apply_AlphaEdit_to_model), 'other': (dict, print)}\n"
        "name = TABLE['AlphaEdit'][1].__name__, hasattr(TABLE['AlphaEdit'][1], '__wrapped__')\n"
    )
    holder = types.ModuleType("holder")
    exec(script.read_text(), vars(holder))
    table = dict(vars(holder)["TABLE"])
    sys.modules["holder"] = holder
    try:
        with rlsedit.patch("alphaedit") as (module,):
            assert vars(holder)["TABLE"]["AlphaEdit"] == (dict, module.apply_AlphaEdit_to_model)
            assert vars(holder)["TABLE"]["other"] == (dict, print)
            assert runpy.run_path(str(script))["name"] == ("apply_AlphaEdit_to_model", True)
        assert vars(holder)["TABLE"] == table
    finally:
        del sys.modules["holder"]


def test_a_covariance_that_begins_anew_in_every_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    """As the evaluation script of RLSEdit has it, which passes no C on: the same weights, one factor a layer."""
    from rlsedit_kernels.priors import Prior

    toy, module = import_module("toy"), import_module(PLACES["rlsedit"][0])
    models, made = [toy.Toy(), toy.Toy()], []
    factor = vars(Prior)["factor"].func
    monkeypatch.setattr(vars(Prior)["factor"], "func", lambda prior: made.append(1) or factor(prior))
    for model, block in zip(models, (False, True), strict=True):
        with rlsedit.patch("rlsedit") if block else pytest.MonkeyPatch.context():
            for t in range(4):
                module.apply_RLSEdit_to_model(model, None, toy.requests(toy.U, 100 + t), toy.hparams())
    assert largest_difference(models[1], models[0]) < 1e-4
    assert len(made) == toy.LAYERS


def test_a_function_held_by_another_module_is_replaced_too() -> None:
    """As a script has it that imports the function by name."""
    holder = types.ModuleType("holder")
    holder.apply = import_module(PLACES["alphaedit"][0]).apply_AlphaEdit_to_model  # type: ignore[attr-defined]
    sys.modules["holder"] = holder
    try:
        original = holder.apply
        with rlsedit.patch("alphaedit") as (module,):
            assert holder.apply is module.apply_AlphaEdit_to_model is not original
        assert holder.apply is original
    finally:
        del sys.modules["holder"]


@pytest.mark.parametrize(
    ("place", "old", "new", "message"),
    [
        ("alphaedit", "+ hparams.L2 *", "+ 2 * hparams.L2 *", "must contain"),
        ("alphaedit", "cache_c=None, P=None", "cache_c=None, Q=None", "lacks the parameters"),
        ("memit", "hparams.mom2_update_weight * cov", "cov", "must contain"),
        ("rlsedit", "C_t = C_prev - G_t @ G_t.T", "C_t = C_prev - F_t @ F_t.T", "must contain"),
        ("easyedit", "proj @ layer_ks @ resid.T", "layer_ks @ resid.T", "must contain"),
        ("alphaedit", "def apply_AlphaEdit_to_model", "def apply_alphaedit", "has no function"),
        (
            "alphaedit",
            "    return model, cache_c",
            "    torch.linalg.solve(P[0], P[0])\n    return model, cache_c",
            "no other",
        ),
        ("memit", "torch.linalg.solve(", "torch.linalg.lstsq(", "must contain"),
    ],
)
def test_unknown_versions_are_refused(
    place: str, old: str, new: str, message: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    rewritten(place, ((old, new),), monkeypatch, tmp_path)
    with pytest.raises(UnknownVersionError, match=message), rlsedit.patch(place):
        pytest.fail("must not get here")


@pytest.mark.parametrize(
    ("changed", "other", "old", "new"),
    [
        ("easyedit", "easyedit-memit", "proj @ layer_ks @ resid.T", "layer_ks @ resid.T"),
        ("easyedit-memit", "easyedit-alphaedit", "torch.linalg.solve(", "torch.linalg.lstsq("),
    ],
)
def test_a_fork_of_easyedit_that_changed_one_of_its_editors(
    changed: str, other: str, old: str, new: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    place = other.removesuffix("-alphaedit")
    exact, _ = run(place)
    sys.modules.pop(PLACES[place][0])
    rewritten(changed, ((old, new),), monkeypatch, tmp_path)
    with pytest.raises(UnknownVersionError), rlsedit.patch("easyedit"):
        pytest.fail("must not get here")
    kinds = []
    solve = torch.linalg.solve
    monkeypatch.setattr(torch.linalg, "solve", lambda A, B: kinds.append(type(A).__name__) or solve(A, B))
    with rlsedit.patch(other):
        found, _ = run(place)
    assert set(kinds) == {"_System"}
    assert largest_difference(found, exact) < 1e-4


def test_wrong_names_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(
        ValueError, match=r"name must be one of \['alphaedit', 'easyedit', 'easyedit-alphaedit', .*'rlsedit'\]"
    ):
        rlsedit.patch("grace").__enter__()
    monkeypatch.setitem(sys.modules, "memit.memit_main", None)
    with pytest.raises(ImportError):
        rlsedit.patch("memit").__enter__()


def test_verification_notices_another_solve(monkeypatch: pytest.MonkeyPatch) -> None:
    """A gain that is off by a percent, as a wrong prior would make it."""
    from rlsedit_kernels import CovarianceState

    prepare = CovarianceState.prepare

    def off(*args: Any, **kwargs: Any) -> Any:
        prepared = prepare(*args, **kwargs)
        return replace(prepared, gain=1.01 * prepared.gain)

    monkeypatch.setattr(CovarianceState, "prepare", off)
    for place in ("alphaedit", "memit", "rlsedit"):
        with rlsedit.patch(place, verify=True), pytest.raises(dropin.VerificationError, match=r"differs .* by 1\.0"):
            run(place, 1)


def test_a_code_base_that_is_not_there_is_named_with_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another module that the code base imports, and that is not installed, stays the error it is."""

    def missing(name: str) -> Callable[[str], Any]:
        def load(_: str) -> Any:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

        return load

    monkeypatch.setattr("rlsedit.patching.import_module", missing("AlphaEdit"))
    told = "'alphaedit' needs the module AlphaEdit.AlphaEdit_main, and there is no 'AlphaEdit': run in the folder"
    with pytest.raises(ModuleNotFoundError, match=told), rlsedit.patch("alphaedit"):
        pass
    monkeypatch.setattr("rlsedit.patching.import_module", missing("einops"))
    with pytest.raises(ModuleNotFoundError, match=r"^No module named 'einops'$"), rlsedit.patch("alphaedit"):
        pass
