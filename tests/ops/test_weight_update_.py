"""weight_update_ against float64: in place, for W and the transpose of a linear layer's, nothing outside written."""

from __future__ import annotations

import pytest
import torch
from support import builders, tolerances
from support.cases import dtypes, sizes
from support.views import LAYOUTS, View

import rlsedit_kernels as rk

error = tolerances.relative_error


def problem(batch: tuple[int, ...], d: int, u: int, v: int, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    """W, K, V, gain."""
    W, gain = builders.columns(batch, d, v, dtype, 0), builders.columns(batch, d, u, dtype, 1)
    return W, builders.key_batch(batch, u, d, dtype, 2), builders.key_batch(batch, u, v, dtype, 3), gain


def agrees(W: torch.Tensor, E: torch.Tensor, expected: tuple[object, object], d: int, u: int) -> bool:
    bound = 2.0 * tolerances.product(max(d, u), W.dtype)
    return error(W, expected[0]) < bound and error(E, expected[1]) < bound


@sizes
@dtypes
@pytest.mark.parametrize("v", [1, 67])
def test_matches_the_reference(batch, d, u, v, dtype, backend, poisoned_memory) -> None:
    W, K, V, gain = problem(batch, d, u, v, dtype)
    expected, pointer = rk.reference.weight_update_(W, K, V, gain), W.data_ptr()
    E = rk.ops.weight_update_(W, K, V, gain)
    assert W.data_ptr() == pointer
    assert E.shape == V.shape
    assert E.is_contiguous()
    assert agrees(W, E, expected, d, u)


@dtypes
@pytest.mark.parametrize("W_layout", LAYOUTS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("u", [1, 6, 21])
def test_any_strides(u, layout, W_layout, dtype, backend, poisoned_memory) -> None:
    W, K, V, gain = problem((2,), 41, u, 35, dtype)
    expected = rk.reference.weight_update_(W, K, V, gain)
    view, others = View(W, W_layout), [View(A, layout) for A in (K, V, gain)]
    E = rk.ops.weight_update_(view.tensor, *(other.tensor for other in others))
    assert agrees(view.tensor, E, expected, 41, u)
    assert all(v.untouched_outside() for v in (view, *others))
    assert all(torch.equal(v.tensor, A) for v, A in zip(others, (K, V, gain), strict=True))


@dtypes
def test_a_batch_written_by_both_halves(dtype, backend) -> None:
    """With the gain of `rls_update_` and little noise the keys map to the targets."""
    d, u, v = 60, 7, 11
    C = torch.eye(d, dtype=dtype)
    W, K, V, _ = problem((), d, u, v, dtype)
    stored = W.mT.contiguous()  # as an nn.Linear has it
    gain, info = rk.ops.rls_update_(C, K, 1e-6)
    assert not info.any()
    E = rk.ops.weight_update_(stored.mT, K, V, gain)
    assert error(E, (V.double() - K.double() @ W.double()).cpu().numpy()) < 2.0 * tolerances.product(d, dtype)
    assert error(K @ stored.mT, V.cpu().numpy()) < 1e-4


W, K, V, G = torch.ones(3, 5), torch.ones(2, 3), torch.ones(2, 5), torch.ones(3, 2)


@pytest.mark.parametrize(
    ("given", "kind", "message"),
    [
        ((torch.ones(3, 0), K, V, G), ValueError, r"W must have shape \(..., d, v\), both >= 1, got \(3, 0\)"),
        (
            (W, torch.ones(2, 4), V, G),
            ValueError,
            r"K must have shape \(..., u, d\) with d = W.shape\[-2\] = 3, u >= 1, got",
        ),
        ((W, torch.ones(0, 3), V, G), ValueError, r"K must have shape"),
        ((W.mT, K, V, G), ValueError, r"K .*got \(2, 3\): W is \(5, 3\), .* nn.Linear stores .* layer.weight.data.mT"),
        (
            (W, K, torch.ones(2, 4), G),
            ValueError,
            r"V must have shape \(..., u, v\) with u = K.shape\[-2\] = 2, v = W.shape",
        ),
        ((W, K, V, G.mT), ValueError, r"gain must have shape \(..., d, u\) with d = W.shape\[-2\] = 3, u = "),
        ((W, K, V, torch.ones(3)), ValueError, r"gain must have shape"),
        ((W.expand(4, 3, 5), K, V, G), ValueError, r"K and W must have the same leading dimensions"),
        ((torch.ones(1, 1).expand(3, 5), K, V, G), ValueError, r"W is written in place and must not overlap itself"),
        ((W, K.double(), V, G), TypeError, r"K must have the dtype"),
        ((W.half(), K, V, G), TypeError, r"W must be float32 or float64"),
        (([[1.0]], K, V, G), TypeError, r"W must be a torch.Tensor"),
    ],
)
def test_wrong_arguments(given, kind, message) -> None:
    with pytest.raises(kind, match=f"weight_update_: {message}"):
        rk.ops.weight_update_(*given)
