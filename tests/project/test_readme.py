"""The example of README.md does what it says, in every dtype that a layer may have."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from support.tolerances import relative_error

README = Path(__file__).resolve().parents[2] / "README.md"
D, V, U = 40, 5, 6
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)


def random(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def prepared(dtype: torch.dtype, folder: Path) -> tuple[Any, dict[str, Any], torch.Tensor]:
    """The block, what it finds when it begins, and the second moment, which it reads from a file."""
    (block,) = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    samples = random(4 * D, D, seed=0).double()
    moment = samples.T @ samples / len(samples) / 15_000
    torch.save(moment, folder / "second_moment.pt")
    batches = [(random(U, D, seed=1 + i).to(dtype), random(U, V, seed=9 + i).to(dtype)) for i in range(4)]
    space = {"layer": torch.nn.Linear(D, V, dtype=dtype), "batches": batches}
    return compile(block, "README.md", "exec"), space, 15_000 * moment


@DTYPES
def test_the_example_writes_what_it_should(
    dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """E are residuals of the weights as they are by then: W moves by S^-1 K'E in each batch."""
    monkeypatch.chdir(tmp_path)
    block, space, S = prepared(dtype, tmp_path)
    wanted = space["layer"].weight.detach().clone().double().T
    exec(block, space)
    for K, E in space["batches"]:
        S = S + K.double().T @ K.double()
        wanted = wanted + torch.linalg.solve(S, K.double().T @ E.double())
    tolerance = max(1e-5, torch.finfo(dtype).eps / 2)
    assert space["layer"].weight.dtype == dtype
    assert relative_error(space["layer"].weight.detach().double(), wanted.T) < tolerance
    assert relative_error(space["master"].double(), wanted.T) < 1e-5
    assert "status='ok'" in capsys.readouterr().out


@DTYPES
def test_a_batch_that_fails_leaves_the_state_as_it_was(
    dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    block, space, _ = prepared(dtype, tmp_path)
    (K, E), (other, _) = space["batches"][:2]
    space["batches"] = [(K, E), (other, E[:, :-1])]
    with pytest.raises(RuntimeError, match="size of tensor"):
        exec(block, space)
    assert space["state"].steps == 1
    assert torch.equal(space["layer"].weight.detach(), space["master"].to(dtype))
