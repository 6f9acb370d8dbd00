"""A <- A + alpha left right' in place: against float64, for any strides, on every back end, nothing outside written."""

from __future__ import annotations

import pytest
import torch
from support import builders, tolerances
from support.cases import dtypes
from support.views import LAYOUTS, View

import rlsedit_kernels as rk
from rlsedit_kernels.backends import active_backend, cpu
from rlsedit_kernels.profile.counting import count
from rlsedit_kernels.states.adding import add_product_

available, reason = cpu.load()
needs_library = pytest.mark.skipif(not available, reason=f"the native CPU library is not here: {reason}")


def problem(m: int, n: int, k: int, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    """A, left, right."""
    sizes = ((m, n), (m, k), (n, k))
    return tuple(builders.columns((), *size, dtype, seed) for seed, size in enumerate(sizes))


def expected(A: torch.Tensor, left: torch.Tensor, right: torch.Tensor, alpha: float) -> torch.Tensor:
    return A.double() + alpha * (left.double() @ right.double().mT)


@dtypes
@pytest.mark.parametrize("A_layout", LAYOUTS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("m", "n", "k"), [(1, 1, 1), (41, 35, 3), (200, 70, 21), (70, 260, 130)])
def test_any_strides(m, n, k, layout, A_layout, dtype, backend) -> None:
    A, left, right = problem(m, n, k, dtype)
    exact = expected(A, left, right, -0.75)
    view, others = View(A, A_layout), [View(value, layout) for value in (left, right)]
    add_product_(view.tensor, *(other.tensor for other in others), -0.75)
    assert tolerances.relative_error(view.tensor, exact) < tolerances.product(k, dtype)
    assert all(v.untouched_outside() for v in (view, *others))
    assert all(torch.equal(v.tensor, value) for v, value in zip(others, (left, right), strict=True))


def test_a_change_is_seen_by_the_version_counter(backend) -> None:
    A, left, right = problem(9, 7, 2, torch.float32)
    before = A._version
    add_product_(A.mT, right, left)
    assert A._version > before


def test_a_back_end_that_is_forced_is_taken() -> None:
    """With plain torch no kernel of the library runs."""
    A, left, right = problem(300, 300, 100, torch.float32)
    if active_backend("weight_update_") == "cpu":
        native = A.clone()
        add_product_(native, left, right)
        direct = A.clone()
        torch.ops.rlsedit_kernels_cpu.add_product_(direct, left, right, 1.0)
        assert torch.equal(native, direct)
    with rk.use_backend("torch"):
        plain = A.clone()
        add_product_(plain, left, right)
    assert torch.equal(plain, A.clone().addmm_(left, right.mT))


@pytest.mark.parametrize("native", [True, False])
def test_a_profile_counts_it(native: bool) -> None:
    m, n, k = 30, 20, 4
    A, left, right = problem(m, n, k, torch.float32)
    if native and not available:
        pytest.skip(f"the native CPU library is not here: {reason}")
    with rk.use_backend("cpu" if native else "torch"):
        found = count(lambda: add_product_(A, left, right))
    total = next(iter(found.values()))
    assert total.flops == 2.0 * m * n * k
    assert total.bytes == 4.0 * (2 * m * n + m * k + n * k)
    assert not total.uncounted


@needs_library
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.ones(3, 4), torch.ones(2, 5), torch.ones(4, 5)), r"left must have shape"),
        ((torch.ones(3, 4), torch.ones(3, 5), torch.ones(4, 6)), r"right must have shape"),
        ((torch.ones(3, 4), torch.ones(3, 5).double(), torch.ones(4, 5)), r"left"),
        ((torch.ones(6).as_strided((3, 4), (1, 1)), torch.ones(3, 5), torch.ones(4, 5)), r"overlap itself"),
        ((torch.ones(3, 4), torch.ones(3, 0), torch.ones(4, 0)), r"left"),
    ],
)
def test_native_code_checks(arguments: tuple, message: str) -> None:
    before = arguments[0].clone()
    with pytest.raises(RuntimeError, match=message):
        torch.ops.rlsedit_kernels_cpu.add_product_(*arguments, 1.0)
    assert torch.equal(arguments[0], before)


@needs_library
def test_leading_dimensions() -> None:
    given = [builders.columns((3,), *size, torch.float32, seed) for seed, size in enumerate(((20, 9), (20, 4), (9, 4)))]
    one_by_one = given[0].clone()
    for A, left, right in zip(one_by_one, *given[1:], strict=True):
        torch.ops.rlsedit_kernels_cpu.add_product_(A, left, right, 0.5)
    torch.ops.rlsedit_kernels_cpu.add_product_(*given, 0.5)
    assert torch.equal(given[0], one_by_one)


@needs_library
def test_the_same_bits_for_any_number_of_threads() -> None:
    A, left, right = problem(257, 400, 33, torch.float32)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(A.clone())
            torch.ops.rlsedit_kernels_cpu.add_product_(results[-1], left, right, -1.0)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])
