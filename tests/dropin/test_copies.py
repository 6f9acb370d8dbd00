"""Copies and files of the stand-ins, and other words for what they answer."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.builders import normal
from support.tolerances import relative_error
from torch import Tensor

from rlsedit_kernels import dropin

D, V, U, L2 = 40, 6, 4, 5.0


KEYS = [normal(D, U, seed=seed) for seed in range(4)]
R, EYE = normal(V, U, seed=9), torch.eye(D)


def projector() -> Tensor:
    basis = torch.linalg.qr(normal(D, 17, seed=10))[0]
    return (basis @ basis.T)[None]


def change(P: Any, cache: Any, keys: Tensor) -> Tensor:
    return torch.linalg.solve(P[0] @ (keys @ keys.T + cache[0]) + L2 * EYE, P[0] @ keys @ R.T)


def write(P: Any, cache: Any, keys: Tensor) -> Tensor:
    found = change(P, cache, keys)
    cache[0] += keys @ keys.T
    return found


def exact(*keys: Tensor) -> Tensor:
    """The change of the last batch behind the others, by the original expression in float64."""
    P, wide = projector().double(), [one.double() for one in keys]
    past = sum((one @ one.T for one in wide[:-1]), torch.zeros(1, D, D, dtype=torch.float64)[0])
    system = P[0] @ (wide[-1] @ wide[-1].T + past) + L2 * EYE.double()
    return torch.linalg.solve(system, P[0] @ wide[-1] @ R.double().T)


def file_of(thing: object) -> Any:
    file = io.BytesIO()
    torch.save(thing, file)
    file.seek(0)
    return torch.load(file)  # weights_only: nothing of ours is needed to read it


COPIES: dict[str, Callable[[Any, Any], tuple[Any, Any]]] = {
    "clone": lambda P, cache: (P, cache.clone()),
    "deepcopy": lambda P, cache: (P, copy.deepcopy(cache)),
    "deepcopy of both": lambda P, cache: copy.deepcopy((P, cache)),
    "deepcopy of both, the other way": lambda P, cache: copy.deepcopy((cache, P))[::-1],
    "of another P, which is the same": lambda P, cache: (copy.deepcopy(P), cache.clone()),
    "a file": lambda P, cache: dropin.alphaedit(projector(), L2, file_of(cache).to(R.device)),
    "a file of both": lambda P, cache: dropin.alphaedit(
        file_of((P,))[0].to(R.device), L2, file_of([cache])[0].to(R.device)
    ),
}


@pytest.mark.parametrize("grow", [False, True])
@pytest.mark.parametrize("name", COPIES)
def test_a_copy_of_a_cache_is_a_cache_of_its_own(name: str, grow: bool) -> None:
    given = torch.zeros(1, D, D)
    P, cache = dropin.alphaedit(projector(), L2, given, grow=grow)
    write(P, cache, KEYS[0])
    twins = COPIES[name](P, cache)
    held = given.clone()
    assert relative_error(write(*twins, KEYS[1]).double(), exact(*KEYS[:2])) < 1e-5
    assert torch.equal(given, held)
    assert relative_error(write(P, cache, KEYS[2]).double(), exact(KEYS[0], KEYS[2])) < 1e-5
    assert relative_error(change(*twins, KEYS[3]).double(), exact(KEYS[0], KEYS[1], KEYS[3])) < 1e-5


def test_a_shallow_copy_is_the_same_cache() -> None:
    P, cache = dropin.alphaedit(projector(), L2)
    write(P, copy.copy(cache), KEYS[0])
    assert relative_error(change(P, cache, KEYS[1]).double(), exact(*KEYS[:2])) < 1e-5


def test_a_copy_between_a_solve_and_its_commit() -> None:
    P, cache = dropin.alphaedit(projector(), L2)
    change(P, cache, KEYS[0])
    twin = cache.clone()
    twin[0] += KEYS[0] @ KEYS[0].T
    assert relative_error(change(P, cache, KEYS[1]).double(), exact(KEYS[1])) < 1e-5
    assert relative_error(change(P, twin, KEYS[1]).double(), exact(*KEYS[:2])) < 1e-5


def test_caches_of_two_projectors_do_not_mix() -> None:
    P, _ = dropin.alphaedit(projector(), L2)
    _, other = dropin.alphaedit(projector(), L2)
    with pytest.raises(TypeError, match=r"P\[i\] @ _Gram"):
        change(P, other, KEYS[0])


def test_a_cache_that_grows_by_assignment() -> None:
    P, cache = dropin.alphaedit(projector(), L2)
    change(P, cache, KEYS[0])
    old = KEYS[0] @ KEYS[0].T + cache[0]
    cache[0] = cache[0] + KEYS[0] @ KEYS[0].T
    with pytest.raises(TypeError, match="may only grow"):
        cache[0] = old  # what it was before
    assert relative_error(change(P, cache, KEYS[1]).double(), exact(*KEYS[:2])) < 1e-5


def test_the_names_of_the_operands_may_be_said() -> None:
    P, cache = dropin.alphaedit(projector(), L2)
    keys, moment = KEYS[0], 2.0 * EYE
    found = torch.linalg.solve(B=P[0] @ keys @ R.T, A=P[0] @ (keys @ keys.T + cache[0]) + L2 * EYE)
    assert torch.equal(found, change(P, cache, keys))
    gain = torch.linalg.solve(A=15 * dropin.Moment(moment) + keys @ keys.T, B=keys)
    assert relative_error(gain, torch.linalg.solve(15 * moment + keys @ keys.T, keys)) < 1e-5


def update(C: Any, keys: Tensor) -> Any:
    """What the reference code of RLSEdit writes."""
    F = C @ keys
    upper = torch.linalg.cholesky(torch.eye(keys.shape[1]) + keys.T @ F, upper=True)
    G = torch.linalg.solve_triangular(upper, F, upper=True, left=False)
    return C - G @ G.T


@pytest.mark.parametrize("batches", [0, 2])
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda stack: stack.clone()])
def test_copies_and_files_of_covariances(copied: Callable[[Any], Any], batches: int) -> None:
    information = 3.0 * EYE + normal(D, D, seed=5) @ normal(D, D, seed=5).T
    stack = torch.stack([dropin.Covariance(information)])
    for keys in KEYS[:batches]:
        stack[0] = update(stack[0], keys)
    twin = copied(stack)
    twin[0] = update(twin[0], KEYS[3])
    wanted = torch.linalg.inv(information.double() + sum(one.double() @ one.double().T for one in KEYS[:batches]))
    found = file_of(stack)
    assert type(found) is Tensor
    assert found.dtype == torch.float32
    assert relative_error(found[0].double().to(wanted.device), wanted) < 1e-4
    assert relative_error(file_of(twin)[0], found[0]) > 1e-3


def test_a_covariance_that_was_taken_before_it_was_stored_is_the_old_one() -> None:
    """The reference code would go on with the old matrix."""
    stack = torch.stack([dropin.Covariance(EYE)])
    old = stack[0].to(R.device)
    stack[0] = update(old, KEYS[0])
    for _ in range(2):
        with pytest.raises(ValueError, match="C has got another batch since"):
            old @ KEYS[1]
    stack[0] = update(stack[0], KEYS[1])
    assert stack[0].health().steps == 2
