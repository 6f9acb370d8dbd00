"""Over ranks too a batch of keys whose squares leave float32 is the same batch in other units."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.bits import same
from support.ranks import run
from support.sharded import columns, full, keys, prior

import rlsedit_kernels as rk
from rlsedit_kernels.distributed import Ranks, ShardedCovarianceState, ShardedRLSFilter, ShardedSquareRootState

D, U, V = 13, 3, 2
SCALE = 2.0**-80
FORMS = ("plain", "whitened", "inverse_root", "square_root")


def written(form: str, ranks: Ranks | None, scale: float, noise: float, sharded: bool) -> list[Any]:
    given: Any = prior("anchor", D)
    state: Any
    if form == "square_root":
        state = rk.SquareRootState(given) if ranks is None else ShardedSquareRootState(given, ranks)
    elif ranks is None:
        state = rk.CovarianceState(given, form=form)
    else:
        state = ShardedCovarianceState(given, ranks, form=form)
    state.update(keys(U, D, 1))
    K = scale * keys(U, D, 2)
    gain = full(state.update(K if ranks is None or not sharded else columns(ranks, K), scale * scale * noise))
    found = [scale * gain, full(state.update(keys(U, D, 3)))]
    return [*found, state._counters.largest_inner]


def streams(ranks: Ranks, noise: float) -> list[Any]:
    return [
        written(form, ranks, scale, noise, sharded)
        for form in FORMS[: 3 if noise == 0.0 else None]
        for scale in (1.0, SCALE)
        for sharded in (False, True)
    ]


@pytest.mark.parametrize("noise", [0.0, 1.0])
def test_small_keys_are_written_as_others_are(noise: float) -> None:
    found = run(2, streams, noise)
    assert same(found[0], found[1])
    rows = iter(found[0])
    for form in FORMS[: 3 if noise == 0.0 else None]:
        expected = written(form, None, 1.0, noise, False)
        for scale in (1.0, SCALE):
            for _ in range(2):
                *gains, inner = next(rows)
                for got, wanted in zip(gains, expected, strict=False):
                    assert float((got - wanted).norm()) < 1e-4 * float(wanted.norm()), (form, scale)
                if form != "square_root" and scale == 1.0:
                    assert inner == pytest.approx(expected[-1], rel=1e-4)


def filtered(ranks: Ranks, noise: float) -> list[Any]:
    found = []
    for scale in (1.0, SCALE):
        rls = ShardedRLSFilter(torch.ones(D, V), prior("anchor", D), ranks, layout="in_out", form="plain")
        step = rls.update(scale * keys(U, D, 2), scale * keys(U, V, 5), scale * scale * noise)
        found.append((full(rls.weight), step.innovation_norm / scale, step.residual_norm / scale, step.objective))
    return found


@pytest.mark.parametrize("noise", [0.0, 1.0])
def test_a_filter_says_of_small_keys_what_it_says_of_others(noise: float) -> None:
    (W, *figures), (other, *others) = run(2, filtered, noise)[0]
    assert float((W - other).norm()) < 1e-5 * float(W.norm())
    for one, two in zip(figures, others, strict=True):
        assert two == pytest.approx(one, rel=1e-4, abs=1e-5)
