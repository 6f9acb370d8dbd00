"""What a checked batch asks of torch beside the ops: counted call by call, since times are not for tests."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from support import builders
from torch.utils._python_dispatch import TorchDispatchMode

import rlsedit_kernels as rk
from rlsedit_kernels.states.reading import blocks

D, V, U = 96, 40, 7
VIEWS = {
    "transpose",
    "diagonal",
    "detach",
    "view",
    "unsqueeze",
    "slice",
    "select",
    "split",
    "alias",
    "unbind",
    "_local_scalar_dense",
}


class Calls(TorchDispatchMode):
    """Names of the operators that are called, and how many numbers the first argument of each has at most."""

    def __init__(self) -> None:
        super().__init__()
        self.names: Counter[str] = Counter()
        self.largest: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        name = func._schema.name.split("::")[1]
        self.names[name] += 1
        if args and isinstance(args[0], torch.Tensor):
            self.largest[name] = max(self.largest[name], args[0].numel())
        return func(*args, **(kwargs or {}))


def batch(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    keys = builders.key_batch((), U, D, torch.float32, seed)
    return 0.1 * keys, builders.key_batch((), U, V, torch.float32, seed + 100)


def of_a_batch(**arguments: Any) -> Calls:
    """The calls of a batch at which the guard does not look."""
    prior = rk.Prior.anchor(builders.symmetric((), D, torch.float64, 0, 10.0), mu=1.0, lam=0.5)
    rls = rk.RLSFilter(builders.columns((), D, V, torch.float32, 1), prior, layout="in_out", **arguments)
    for i in range(5):
        rls.update(*batch(i))
    with Calls() as calls:
        rls.update(*batch(5))
    return calls


@pytest.mark.parametrize(("form", "most"), [("plain", 34), ("whitened", 44), ("inverse_root", 43)])
def test_a_batch_makes_few_calls(form: str, most: int) -> None:
    """Views and readings are not counted."""
    calls = of_a_batch(form=form)
    assert sum(count for name, count in calls.names.items() if name not in VIEWS) <= most, calls.names


@pytest.mark.parametrize("form", ["plain", "whitened"])
def test_the_system_of_a_batch_is_solved_by_the_ops_alone(form: str) -> None:
    calls = of_a_batch(form=form)
    assert calls.names["gain_solve"] == 2
    assert not calls.names.keys() & {"cholesky", "linalg_cholesky_ex", "linalg_solve_triangular", "_linalg_eigh"}


def test_a_weight_that_others_may_change_is_not_read_once_more() -> None:
    """`parameter.data` has no version by which a filter would know whether the size of the weight is still its own."""
    calls = of_a_batch(form="plain", inplace=True)
    assert calls.largest["linalg_vector_norm"] <= max(U * D, U * V) < D * V


@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("shape", [(3, 5), (1000, 700), (90_000, 4), (200, 0)])
def test_blocks_are_all_of_a_matrix(shape: tuple[int, int], dim: int) -> None:
    A = torch.arange(shape[0] * shape[1]).view(shape)
    parts = blocks(A, 64, dim)
    assert torch.equal(torch.cat(parts, dim), A)
    assert all(part.shape[dim] <= 64 or part.numel() <= 2**18 for part in parts)
