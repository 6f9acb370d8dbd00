"""The blocks of docs/ops.md and docs/states.md run from top to bottom, and their tables name what is there."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

import rlsedit_kernels as rk
from rlsedit_kernels import reference

DOCS = Path(__file__).resolve().parents[2] / "docs"


def text(name: str) -> str:
    return (DOCS / name).read_text(encoding="utf-8")


def ran(name: str) -> dict[str, Any]:
    space: dict[str, Any] = {"__name__": name}
    for block in re.findall(r"```python\n(.*?)```", text(name), re.DOTALL):
        with torch.no_grad():
            exec(compile(block, name, "exec"), space)
    return space


def test_the_blocks_about_ops_do_what_they_say() -> None:
    space = ran("ops.md")
    K, V, R, W = (space[name].double() for name in ("K", "V", "R", "W"))
    wanted = reference.batch_solution(rk.Prior.ridge(space["d"], 10.0**0.5), [(K, V, 1.0)])
    assert float((W - torch.as_tensor(wanted)).norm()) < 1e-5 * float(W.norm())
    assert float((R.mT @ R - 10.0 * torch.eye(len(R)).double() - K.mT @ K).norm()) < 1e-5 * float((R.mT @ R).norm())


def test_the_layers_of_the_block_about_ops_are_as_one_alone() -> None:
    space = ran("ops.md")
    C = torch.eye(space["d"]) / 10.0
    gain, _ = rk.ops.rls_update_(C, space["Ks"][1])
    assert torch.equal(C, space["Cs"][1])
    assert torch.equal(gain, space["gains"][1])


def test_the_blocks_about_states_do_what_they_say(capsys: pytest.CaptureFixture[str]) -> None:
    space = ran("states.md")
    left = [(K.double(), V.double(), 1.0) for K, V in space["written"][1:]]
    prior = space["state"].prior
    found = reference.batch_covariance(prior, left)
    C = space["state"].covariance().double()
    assert float((C - torch.as_tensor(found)).norm()) < 1e-4 * float(C.norm())
    assert space["rls"].state.steps == space["state"].steps == 4
    assert torch.equal(space["layer"].weight, space["rls"].weight)
    assert capsys.readouterr().out.startswith("ok plain\n")


def test_the_weight_of_the_first_block_about_states_is_the_minimiser() -> None:
    block = re.findall(r"```python\n(.*?)```", text("states.md"), re.DOTALL)[0]
    space: dict[str, Any] = {}
    exec(block.replace("W, written = randn(d, v), []", "W, written = torch.zeros(d, v), []"), space)
    batches = [(K.double(), V.double(), 1.0) for K, V in space["written"]]
    wanted = torch.as_tensor(reference.batch_solution(space["state"].prior, batches))
    assert float((space["W"].double() - wanted).norm()) < 1e-5 * float(wanted.norm())


def test_every_op_has_its_row_with_its_arguments() -> None:
    rows = dict(re.findall(r"^\| `(\w+)\((.*?)\)` \|", text("ops.md"), re.MULTILINE))
    assert set(rows) == set(rk.ops.SCHEMAS)
    for op, arguments in rows.items():
        schema = rk.ops.SCHEMAS[op].split(" -> ")[0]
        names = re.findall(r"(\w+)(?:=-?[\d.]+)?(?=[,)])", schema)
        defaults = dict(re.findall(r"(\w+)=(-?[\d.]+)", schema))
        assert [part.split("=")[0] for part in arguments.split(", ")] == names
        given = dict(part.split("=") for part in arguments.split(", ") if "=" in part)
        assert {name: float(value) for name, value in given.items()} == {k: float(x) for k, x in defaults.items()}


def test_every_method_of_a_state_is_told_of() -> None:
    known = set(re.findall(r"`(\w+)\(", text("states.md")))
    internal = {"look", "take_back", "take_covariance"}  # of the guard and of the filter
    for name in dir(rk.CovarianceState):
        if not name.startswith("_") and callable(getattr(rk.CovarianceState, name)) and name not in internal:
            assert name in known, name
    for name in ("ridge", "anchor", "anchor_keys", "null_space", "precision"):
        assert f"`Prior.{name}(" in text("states.md")
