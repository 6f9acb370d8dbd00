"""Solvers as tensors and plain values: what a method starts without comes back too."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from support.method_streams import CONFIG, D, V

import rlsedit_kernels as rk
from rlsedit.methods import get_method
from rlsedit.store.errors import StoreError
from rlsedit.store.packing import RootChanged, pack, unpack


def batch(t: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys along eigenvectors of a diagonal moment, so that LangEdit's null space shrinks and does not turn."""
    keys = torch.zeros(2, D)
    keys[0, 3 * t], keys[1, 3 * t + 1] = 60.0, 55.0
    return keys, torch.randn(2, V, generator=torch.Generator().manual_seed(t))


@pytest.mark.parametrize("few", [0.0, 1.0], ids=["a state", "keys alone"])
def test_langedit_goes_on_with_the_same_bits(few: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rlsedit.methods.langedit.FEW", few)
    config = replace(CONFIG, langedit_samples=2000.0, null_threshold=1.0)
    moment = torch.diag(torch.logspace(-2, 0.6, D, dtype=torch.float64))
    method = get_method("langedit")
    solver = method.start(moment, config, torch.float32)
    for t in range(3):
        _, solver = solver.propose(*batch(t))
    assert (solver.state is None) == (few > 0)
    tensors: dict[str, torch.Tensor] = {}
    tree = json.loads(json.dumps(pack(solver, "solver", tensors)))
    kept = {name: tensor.clone() for name, tensor in tensors.items()}
    again = unpack(tree, kept, method.start(moment, config, torch.float32))
    for t in range(3, 5):
        (proposal, solver), (other, again) = solver.propose(*batch(t)), again.propose(*batch(t))
        assert torch.equal(proposal.update, other.update)
    assert again.health() == solver.health()
    if few == 0.0:
        del tree["fields"]["state"]["prior"]
        with pytest.raises(StoreError, match="holds a covariance state where the method has NoneType"):
            unpack(tree, kept, method.start(moment, config, torch.float32))


@pytest.mark.parametrize("form", ["whitened", "plain"])
def test_a_state_needs_the_root_of_its_prior_to_the_bit(form: str) -> None:
    """Another machine may take a prior apart otherwise; the plain form keeps nothing in those coordinates."""

    def fresh() -> rk.CovarianceState:
        S = torch.diag(torch.linspace(1.0, 2.0, D, dtype=torch.float64))
        return rk.CovarianceState(rk.Prior.precision(S), form=form)

    state, tensors = fresh(), {}
    state.commit(batch(0)[0])
    tree = json.loads(json.dumps(pack(state, "state", tensors)))
    assert torch.equal(unpack(tree, tensors, fresh()).covariance(), state.covariance())
    other = fresh()
    other.prior.factor.root[0, 0] *= 1.0 + 1e-15
    if form == "plain":
        assert torch.equal(unpack(tree, tensors, other).covariance(), state.covariance())
        return
    with pytest.raises(RootChanged, match="in other bits on this machine"):
        unpack(tree, tensors, other)


def test_what_cannot_be_kept_or_is_not_known_is_named() -> None:
    class Other:
        def __init__(self) -> None:
            self.value = 1

    with pytest.raises(TypeError, match=r"pack: cannot keep a Other \(solver\.1\)"):
        pack([1.0, Other()], "solver", {})
    with pytest.raises(StoreError, match=r"unknown entry \['other'\]"):
        unpack({"other": 1}, {}, None)
    assert unpack(pack({"a": [1, None, "x", True]}, "solver", {}), {}, None) == {"a": [1, None, "x", True]}
