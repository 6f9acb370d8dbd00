"""Other code bases under `rlsedit.patch` with a model on a GPU; what they keep lies on the CPU.

`--device cuda`, with a GPU or a pretended one.
"""

from __future__ import annotations

import sys
import types
import warnings
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from support.default_device import plain_torch_under

import rlsedit
from rlsedit_kernels import dropin

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


def waits(batch: Callable[[int], Any]) -> int:
    """How often the host waits for the GPU in the sixth batch, before which the guard does not look."""
    for i in range(5):
        batch(i)
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as found:
            warnings.simplefilter("always")
            batch(5)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return sum("called a synchronizing CUDA operation" in str(warning.message) for warning in found)


D, V, U = 200, 7, 5


def test_checks_wait_for_the_gpu_once_a_batch_more_than_the_state() -> None:
    """All that was handed over is read at once, behind the gain, for which a state waits twice; a commit reads once."""
    eye = torch.eye(D, device="cuda")
    stream = torch.randn(6, D, U, generator=torch.Generator().manual_seed(0)).to("cuda")
    P, cache = dropin.alphaedit(torch.diag((torch.arange(D) % 4 > 0).float())[None].to("cuda"), 2.0)
    moment = dropin.Moment(torch.eye(D, device="cuda"))
    stack = torch.stack([dropin.Covariance(torch.eye(D, device="cuda"))])

    def alphaedit(batch: int) -> None:
        keys = stream[batch]
        gram = keys @ keys.T
        torch.linalg.solve(P[0] @ (gram + cache[0]) + 2.0 * eye, P[0] @ keys @ keys.T[:, :V])
        cache[0] += gram

    def memit(batch: int) -> None:
        torch.linalg.solve(15 * moment + stream[batch] @ stream[batch].T, stream[batch])

    def reference(batch: int) -> None:
        keys = stream[batch]
        F = stack[0] @ keys
        upper = torch.linalg.cholesky(torch.eye(U, device="cuda") + keys.T @ F, upper=True)
        G = torch.linalg.solve_triangular(upper, F, upper=True, left=False)
        stack[0] = new = stack[0] - G @ G.T
        new @ keys

    assert [waits(batch) for batch in (alphaedit, memit, reference)] == [2 + 1 + 1, 2 + 1, 2 + 1]
