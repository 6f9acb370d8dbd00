"""A profile on a GPU: every contender runs there and is right (`--device cuda`, with a GPU or a pretended one)."""

from __future__ import annotations

import pytest
import torch

from rlsedit_kernels import profile
from rlsedit_kernels.profile import Ceilings, Problem, Settings

if torch.get_default_device().type != "cuda":
    pytest.skip("needs --device cuda, with a GPU or --pretend-cuda", allow_module_level=True)


@pytest.mark.parametrize(("default", "device"), [("cpu", "cuda"), ("cuda", "cuda:0")])
def test_every_contender_reaches_the_float64_weight(default: str, device: str) -> None:
    before, found = torch.get_default_device(), Ceilings(1e9, {"float32": 1e9, "float64": 1e9})
    torch.set_default_device(default)
    try:
        table = profile.measure(
            profile.catalogue(device),
            Problem(32, 6, 4, device=device),
            Settings(repetitions=1, cold=False),
            found=found,
        )
    finally:
        torch.set_default_device(before)
    assert {row.name: row.reason for row in table.rows if row.status != "measured"} == {}
    for row in table.rows:
        assert row.error is not None, row.name
        assert row.error < 1e-4, row.name
