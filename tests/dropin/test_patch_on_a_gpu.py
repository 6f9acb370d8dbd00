"""Other code bases under `rlsedit.patch` with a model on a GPU; what they keep lies on the CPU.

`--device cuda`, with a GPU or a pretended one.
"""

from __future__ import annotations

import sys
import types
import warnings
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from support.default_device import plain_torch_under

import rlsedit

if torch.get_default_device().type != "cuda":
    pytest.skip("needs --device cuda, with a GPU or --pretend-cuda", allow_module_level=True)

BATCHES = 5
EYE = "torch.eye(layer_ks.shape[0], dtype="
THERE: dict[str, tuple[str, str, tuple[tuple[str, str], ...]]] = {
    "alphaedit": (
        "AlphaEdit.AlphaEdit_main",
        "apply_AlphaEdit_to_model",
        (
            ("P[i, :, :].cpu()", "P[i, :, :].cuda()"),
            ("cache_c[i, :, :].cpu()", "cache_c[i, :, :].cuda()"),
            (EYE, 'torch.eye(layer_ks.shape[0], device="cuda", dtype='),
        ),
    ),
    "memit": (
        "memit.memit_main",
        "apply_memit_to_model",
        (
            ("if inv else moment", 'if inv else moment.to("cuda")'),
            ("(resid @ adj_k.T).float()\n    return", "(resid @ adj_k.T).float().cuda()\n    return"),
        ),
    ),
    "rlsedit": (
        "RLSEdit.RLSEdit_main",
        "apply_RLSEdit_to_model",
        (("torch.eye(K_t.size(1), dtype=K_t.dtype)", "torch.eye(K_t.size(1), dtype=K_t.dtype, device=K_t.device)"),),
    ),
    "easyedit": (
        "easyeditor.models.alphaedit.AlphaEdit_main",
        "apply_AlphaEdit_to_model",
        (
            ('[i, :, :].to("cpu")', '[i, :, :].to("cuda")'),
            (EYE, 'torch.eye(layer_ks.shape[0], device="cuda", dtype='),
            ("+= upd_matrix.T", "+= upd_matrix.T.cuda()"),
        ),
    ),
}
"""By the name that `patch` takes: module, function, and how it would be written for a model on a GPU."""


@pytest.fixture(autouse=True)
def default_device() -> Iterator[None]:
    with plain_torch_under("cpu"):
        yield


@pytest.fixture(params=THERE)
def place(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> str:
    """The code base's stand-in, rewritten, in its own place."""
    module, _, pairs = THERE[request.param]
    source = Path(str(import_module(module).__file__)).read_text(encoding="utf-8")
    for old, new in pairs:
        assert old in source
        source = source.replace(old, new)
    (tmp_path / "there.py").write_text(source, encoding="utf-8")
    changed = types.ModuleType(module)
    changed.__file__ = str(tmp_path / "there.py")
    exec(compile(source, changed.__file__, "exec"), changed.__dict__)
    monkeypatch.setitem(sys.modules, module, changed)
    return str(request.param)


def run(place: str) -> list[torch.Tensor]:
    """Weights behind some batches."""
    toy, (module, function, _) = import_module("toy"), THERE[place]
    model, hparams = toy.Toy().to("cuda"), toy.hparams()
    more: dict[str, Any] = {}
    if place == "alphaedit":
        more["P"] = toy.projectors(model, hparams.nullspace_threshold)
        more["cache_c"] = torch.zeros_like(more["P"])
    for t in range(BATCHES):
        apply = getattr(import_module(module), function)
        _, kept = apply(model, None, toy.requests(toy.U, 100 + t), hparams, **more)
        if place in ("alphaedit", "rlsedit"):
            more["cache_c"] = kept
    return list(model.weights)


def test_the_weights_are_those_of_the_original(place: str) -> None:
    exact = run(place)
    if place == "easyedit":
        sys.modules[THERE[place][0]].cache_c_new = False  # type: ignore[attr-defined]
    with warnings.catch_warnings(), rlsedit.patch(place, verify=True):
        warnings.simplefilter("error")
        found = run(place)
    for mine, theirs in zip(found, exact, strict=True):
        assert mine.device == torch.device("cuda", 0)
        assert float((mine - theirs).norm() / theirs.norm()) < 1e-4
