"""The cache of keys that a caller keeps under `rlsedit.patch` is what it is without: it grows, is read and changed."""

from __future__ import annotations

import io
import sys
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from importlib import import_module
from typing import Any

import pytest
import torch
from torch import Tensor

import rlsedit
from rlsedit_kernels import Prior, dropin

pytestmark = pytest.mark.usefixtures("on_the_cpu")

MODULE = "AlphaEdit.AlphaEdit_main"


class Caller:
    """Someone who keeps P and cache_c and ignores what the function returns: the original adds to the cache itself."""

    def __init__(self) -> None:
        self.toy = import_module("toy")
        self.start()
        self.P = self.toy.projectors(self.model, self.toy.hparams().nullspace_threshold)
        self.cache = torch.zeros_like(self.P)

    def start(self) -> None:
        self.model = self.toy.Toy()

    def write(self, *batches: int, cache: Tensor | None = None, **changes: float) -> Any:
        for batch in batches:
            wanted, hparams = self.toy.requests(self.toy.U, 100 + batch), self.toy.hparams(**changes)
            _, found = import_module(MODULE).apply_AlphaEdit_to_model(
                self.model, None, wanted, hparams, cache_c=self.cache if cache is None else cache, P=self.P
            )
        return found


def both(use: Callable[[Caller], object], block: Callable[[], Any] = lambda: rlsedit.patch("alphaedit")) -> None:
    """The same weights and the same cache with and without the patch."""
    callers = [Caller(), Caller()]
    use(callers[0])
    with block():
        use(callers[1])
    for mine, theirs in zip(callers[1].model.weights, callers[0].model.weights, strict=True):
        assert float((mine - theirs).norm() / theirs.norm()) < 1e-4
    torch.testing.assert_close(callers[1].cache, callers[0].cache, rtol=1e-4, atol=1e-4)


def views(caller: Caller) -> None:
    for batch in range(4):
        caller.write(batch, cache=caller.cache[:])


def data(caller: Caller) -> None:
    for batch in range(3):
        caller.write(batch, cache=caller.cache.data)


def two_streams(zero: Callable[[Tensor], object]) -> Callable[[Caller], None]:
    def use(caller: Caller) -> None:
        caller.write(0, 1, 2)
        zero(caller.cache)
        caller.start()
        caller.write(3, 4)

    return use


def snapshot(caller: Caller) -> None:
    caller.write(0, 1)
    saved, weights = caller.cache.clone(), [weight.clone() for weight in caller.model.weights]
    caller.write(2)
    caller.cache, caller.model.weights = saved, weights
    caller.write(3, 4)


def from_a_file(caller: Caller) -> None:
    file = io.BytesIO()
    torch.save(caller.write(0, 1), file)
    file.seek(0)
    caller.cache = torch.load(file)
    caller.write(2)


def inference(caller: Caller) -> None:
    with torch.inference_mode():
        caller.cache = caller.cache.clone()
        for batch in range(3):
            caller.toy.residuals, residuals = lambda *_: torch.ones(caller.toy.V, caller.toy.U), caller.toy.residuals
            try:
                caller.write(batch)
            finally:
                caller.toy.residuals = residuals


USES: dict[str, Callable[[Caller], object]] = {
    "the same tensor": lambda caller: caller.write(*range(8)),
    "what is returned": lambda caller: caller.write(1, cache=caller.write(0)),
    "views of it": views,
    "its data": data,
    "set to zero": two_streams(lambda cache: cache.zero_()),
    "set to zero behind torch": two_streams(lambda cache: cache.data.zero_()),
    "halved": two_streams(lambda cache: cache.mul_(0.5)),
    "an older one": snapshot,
    "from a file": from_a_file,
    "in inference mode": inference,
    "another L2": lambda caller: (caller.write(0, 1), caller.write(2, L2=7.0), caller.write(3)),
}


@pytest.mark.parametrize("name", USES)
def test_a_cache_that_the_caller_keeps(name: str) -> None:
    both(USES[name])


def test_a_cache_that_began_before_and_goes_on_behind_the_block() -> None:
    callers = [Caller(), Caller()]
    for caller, block in zip(callers, (nullcontext(), rlsedit.patch("alphaedit", verify=True)), strict=True):
        caller.write(0, 1)
        with block:
            caller.write(2, 3)
        caller.write(4)
    for mine, theirs in zip(callers[1].model.weights, callers[0].model.weights, strict=True):
        assert float((mine - theirs).norm() / theirs.norm()) < 1e-4


def test_another_projector_in_the_middle_of_a_stream() -> None:
    def use(caller: Caller) -> None:
        caller.write(0, 1)
        caller.P = caller.P.clone()
        caller.write(2)
        caller.P = caller.toy.projectors(caller.model, 1.0)
        caller.write(3)
        caller.P.copy_(caller.toy.projectors(caller.model, 0.3))
        caller.write(4)

    both(use, lambda: rlsedit.patch("alphaedit", verify=True))


def test_what_is_no_projector_is_refused_in_the_middle_of_a_stream() -> None:
    caller = Caller()
    P = caller.P
    with rlsedit.patch("alphaedit"):
        caller.write(0)
        kept = [tensor.clone() for tensor in (*caller.model.weights, caller.cache)]
        for other in (0.99 * P, P + 1e-3, P[:1], None):
            caller.P = other
            with pytest.raises((TypeError, ValueError), match=r"P must|projector must|shape of P"):
                caller.write(1)
        caller.P = P
        with pytest.raises(TypeError, match="cache_c must be a tensor, got list"):
            caller.write(1, cache=[])
    assert all(map(torch.equal, (*caller.model.weights, caller.cache), kept))


def test_streams_with_one_projector_share_its_factor(monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    null_space = Prior.null_space
    monkeypatch.setattr(Prior, "null_space", lambda P, l2: made.append(1) or null_space(P, l2))
    caller = Caller()
    with rlsedit.patch("alphaedit"):
        caller.write(0, 1)
        kept, caller.cache = caller.cache, torch.zeros_like(caller.cache)
        caller.start()
        caller.write(2)
        assert kept.any()
    assert len(made) == caller.toy.LAYERS


def test_many_streams_in_turns() -> None:
    """More than are kept, so that some are made anew from their caches."""
    callers = [[Caller() for _ in range(6)] for _ in range(2)]
    for mine, block in zip(callers, (nullcontext(), rlsedit.patch("alphaedit")), strict=True):
        with block:
            for batch in range(3):
                for i, caller in enumerate(mine):
                    caller.write(10 * i + batch)
    for one, other in zip(*callers, strict=True):
        torch.testing.assert_close(one.cache, other.cache, rtol=1e-4, atol=1e-4)
        for mine, theirs in zip(other.model.weights, one.model.weights, strict=True):
            assert float((mine - theirs).norm() / theirs.norm()) < 1e-4


def test_stand_ins_that_were_made_by_hand() -> None:
    """They are taken as they are, and the P beside them must be theirs."""
    caller, by_hand = Caller(), Caller()
    caller.write(0, 1)
    P = by_hand.P
    by_hand.P, by_hand.cache = dropin.alphaedit(P, 2.0)
    with rlsedit.patch("alphaedit"):
        assert by_hand.write(0) is by_hand.cache
        by_hand.P = by_hand.toy.projectors(by_hand.model, 1.0)
        with pytest.raises(ValueError, match="P must stay as it was given"):
            by_hand.write(1)
        by_hand.P = P.clone()
        by_hand.write(1)
    for mine, theirs in zip(by_hand.model.weights, caller.model.weights, strict=True):
        assert float((mine - theirs).norm() / theirs.norm()) < 1e-4


def test_a_stand_in_is_given_back_as_a_tensor() -> None:
    """P M P for M: what the original needs to go on."""
    caller, by_hand = Caller(), Caller()
    wanted = caller.write(0, 1, 2)
    P = by_hand.P
    by_hand.P, by_hand.cache = dropin.alphaedit(P, 2.0)
    stand = by_hand.write(0, 1, 2)
    by_hand.P = P
    with pytest.raises(TypeError, match=r"cache_c.tensor\(\)"):
        by_hand.write(3)
    torch.testing.assert_close(stand.tensor(), P @ wanted @ P, rtol=1e-4, atol=1e-4)
    assert stand.tensor().dtype == torch.float32
    by_hand.cache = stand.tensor()
    caller.write(3)
    by_hand.write(3)
    for mine, theirs in zip(by_hand.model.weights, caller.model.weights, strict=True):
        assert float((mine - theirs).norm() / theirs.norm()) < 1e-4


def test_a_cache_that_grows_is_the_one_that_was_given() -> None:
    caller = Caller()
    with pytest.raises(ValueError, match="cache_c must be a tensor where it is to grow"):
        dropin.alphaedit(caller.P, 2.0, grow=True)
    P, stand = dropin.alphaedit(caller.P, 2.0, caller.cache, grow=True)
    with pytest.raises(ValueError, match="l2 must be that of like, 2"):
        dropin.alphaedit(caller.P, 3.0, like=P)
    with pytest.raises(ValueError, match="P must stay"):
        dropin.alphaedit(caller.toy.projectors(caller.model, 1.0), 2.0, like=P)
    keys, cache, caller.P, caller.cache = torch.randn(caller.toy.D, 3), caller.cache, P, stand
    with pytest.raises(ValueError, match="solved for only"):
        stand[0] += keys @ keys.T
    assert not cache.any()
    caller.write(0)
    assert cache.any()
    assert torch.equal(stand.tensor(), cache)


def test_a_model_whose_parameters_are_offloaded() -> None:
    """As accelerate leaves them: on no device between two forward passes."""

    def use(caller: Caller) -> None:
        caller.model.parameters = lambda: iter([torch.empty(2, 2, device="meta")])
        caller.write(0, 1)

    both(use)


@contextmanager
def imported_inside() -> Iterator[None]:
    with rlsedit.patch("alphaedit"):
        holder = types.ModuleType("holder")
        holder.apply = import_module(MODULE).apply_AlphaEdit_to_model  # type: ignore[attr-defined]
        sys.modules["holder"] = holder
    try:
        yield
    finally:
        del sys.modules["holder"]


def test_a_function_that_was_imported_inside_of_the_block_is_the_original_behind_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    kinds = []
    solve = torch.linalg.solve
    monkeypatch.setattr(torch.linalg, "solve", lambda A, B: kinds.append(type(A)) or solve(A, B))
    with imported_inside():
        apply = sys.modules["holder"].apply  # type: ignore[attr-defined]
        caller = Caller()
        monkeypatch.setattr(import_module(MODULE), "apply_AlphaEdit_to_model", apply)
        caller.write(0)
    assert set(kinds) == {Tensor}


def test_blocks_that_end_in_another_order() -> None:
    blocks = [rlsedit.patch("alphaedit"), rlsedit.patch("alphaedit")]

    def use(caller: Caller) -> None:
        for block in blocks:
            block.__enter__()
        caller.write(0, 1)
        blocks[0].__exit__(None, None, None)
        caller.write(2)
        blocks[1].__exit__(None, None, None)
        caller.write(3)

    callers = [Caller(), Caller()]
    callers[0].write(*range(4))
    use(callers[1])
    for mine, theirs in zip(callers[1].model.weights, callers[0].model.weights, strict=True):
        assert float((mine - theirs).norm() / theirs.norm()) < 1e-4
