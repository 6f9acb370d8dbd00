"""Bytes that a rank receives: a hook on the process group counts what the formulas say, for every form and size."""

from __future__ import annotations

import pytest
import torch
from support.ranks import run
from support.sharded import columns, keys, prior

import rlsedit_kernels as rk
from rlsedit_kernels.distributed import Ranks, ShardedCovarianceState
from rlsedit_kernels.distributed.volume import Received, batch_bytes, check_bytes

D, U = 13, 7
CASES = (  # prior, condition, form, mapped
    ("ridge", 1.0, "plain", False),
    ("ridge", 1.0, "whitened", False),
    ("ridge", 1.0, "inverse_root", False),
    ("anchor", 100.0, "plain", False),
    ("null_space", 1.0, "whitened", False),
    ("null_space", 1.0, "inverse_root", False),
    ("precision", 1e7, "inverse_root", True),
)
Row = tuple[int, int, int, int]


def counted(ranks: Ranks) -> list[Row]:
    """Counted and by the formula, of an update and of a check."""
    rows = []
    for i, (kind, condition, form, mapped) in enumerate(CASES):
        start = prior(kind, D, condition)
        dtype = torch.float64 if i % 2 else torch.float32
        if mapped:
            dtype = torch.float32
        state = ShardedCovarianceState(start, ranks, form=form, dtype=dtype, guard="off")
        assert getattr(state._form, "maps", False) or not mapped
        rank, root = start.factor.rank, start.factor.root is not None
        sharded = bool((i + ranks.size) % 2)
        K = keys(U, D, 1, dtype, 0.1)
        with Received() as seen:
            state.update(columns(ranks, K) if sharded else K)
        careful = state._counters.careful_steps > 0
        formula = batch_bytes(
            form, D, U, ranks.size, dtype, rank=rank, prior_root=root, mapped=mapped, keys_sharded=sharded,
            careful=careful,
        )  # fmt: skip
        with Received() as looked:
            state._probes.drift(state._form, state._factor)
        checked = check_bytes(form, D, ranks.size, rank=rank, prior_root=root, mapped=mapped)
        rows.append((seen.bytes, formula, looked.bytes, checked))
    careful_one = ShardedCovarianceState(rk.Prior.ridge(D, 0.02), ranks, form="inverse_root", guard="off")
    with Received() as seen:
        careful_one.update(keys(U, D, 1))
    assert careful_one._counters.careful_steps == 1
    rows.append((seen.bytes, batch_bytes("inverse_root", D, U, ranks.size, careful=True), 0, 0))
    return rows


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_what_is_counted_is_the_formula(size: int) -> None:
    for rows in run(size, counted):
        for case, (seen, formula, looked, checked) in enumerate(rows):
            assert seen == formula, case
            assert looked == checked, case
            assert (seen > 0) == (size > 1)


def test_leading_order() -> None:
    d, u, size = 28672, 100, 8
    share = 4 * d * u * (size - 1) / size
    for form, root, mapped, expected in (
        ("plain", False, False, 2.0),
        ("whitened", True, False, 3.0),
        ("inverse_root", False, False, 2.0),
        ("inverse_root", True, True, 4.0),
    ):
        got = batch_bytes(form, d, u, size, prior_root=root, mapped=mapped)
        assert abs(got / share - expected) < 0.01, form
    assert batch_bytes("plain", d, u, size, keys_sharded=False) / share < 1.01
    assert batch_bytes("plain", d, u, 64) < 4 * d * d / 100


def test_nothing_of_size_d_by_d_is_received() -> None:
    """The volume of a batch grows with d, not with its square."""
    small, large = (batch_bytes("whitened", d, 100, 8, prior_root=True) for d in (4096, 16384))
    assert large / small == pytest.approx(4.0, rel=0.01)


def test_arguments() -> None:
    with pytest.raises(ValueError, match="batch_bytes: form must be one of"):
        batch_bytes("qr", 10, 2, 2)
    with pytest.raises(ValueError, match="check_bytes: form must be one of"):
        check_bytes("qr", 10, 2)
