"""The truncated decomposition against its definition, and the edge of rounding against measured rounding."""

from __future__ import annotations

import pytest
import torch

from rlsedit.export.lowrank import low_rank, noise_edge


def built(values: torch.Tensor, rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    u = torch.linalg.qr(torch.randn(rows, len(values), dtype=torch.float64, generator=generator))[0]
    v = torch.linalg.qr(torch.randn(columns, len(values), dtype=torch.float64, generator=generator))[0]
    return (u * values) @ v.T


@pytest.mark.parametrize("shape", [(40, 90), (90, 40)])
@pytest.mark.parametrize("rank", [1, 3, 7, 12])
def test_error_is_that_of_eckart_and_young(shape: tuple[int, int], rank: int) -> None:
    values = torch.logspace(0, -3, 12, dtype=torch.float64)
    change = built(values, *shape)
    found = low_rank(change, 1e-12, rank, dtype=torch.float64)
    assert (found.rank, found.full, found.exact) == (rank, 12, rank == 12)
    assert found.left.shape == (shape[0], rank)
    assert found.right.shape == (rank, shape[1])
    wanted = values[rank:].norm() / values.norm()
    assert found.frobenius == pytest.approx(float(wanted), rel=1e-9, abs=1e-14)
    spectral = torch.linalg.matrix_norm(change - found.left @ found.right, 2) / torch.linalg.matrix_norm(change, 2)
    assert found.spectral == pytest.approx(float(spectral), rel=1e-9, abs=1e-14)


def test_factors_are_balanced() -> None:
    found = low_rank(built(torch.logspace(2, -2, 5, dtype=torch.float64), 30, 20), 1e-12, dtype=torch.float64)
    torch.testing.assert_close(found.left.T @ found.left, found.right @ found.right.T, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("count", [20, 130, 260])
def test_the_sketch_equals_the_full_decomposition(count: int) -> None:
    """Wide enough from the start, after it has been widened, and not used at all."""
    values = torch.logspace(0, -2, count, dtype=torch.float64)
    change = built(values, 1100, 600) + 1e-9 * torch.randn(1100, 600, dtype=torch.float64)
    edge = 1e-7
    full, sketch = low_rank(change, edge), low_rank(change, edge, dense=100)
    assert sketch.rank == full.rank == count
    assert sketch.frobenius == pytest.approx(full.frobenius, rel=0.05)
    product = [found.left.double() @ found.right.double() for found in (full, sketch)]
    assert (product[0] - product[1]).norm() / change.norm() < 1e-6
    half, whole = low_rank(change, edge, 10, dense=100), low_rank(change, edge, 10)
    assert half.frobenius == pytest.approx(whole.frobenius, rel=1e-6)
    assert half.spectral == pytest.approx(whole.spectral, rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(64, 200), (576, 1536)])
@pytest.mark.parametrize("heavy", [1.0, 8.0])
def test_rounding_to_half_precision_stays_below_the_edge(
    dtype: torch.dtype, shape: tuple[int, int], heavy: float
) -> None:
    """The edge is above the noise of one rounding, and not far above; also where some rows are much larger."""
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(1)) * 0.02
    weight[:: shape[0] // 4] *= heavy
    largest = float(torch.linalg.matrix_norm(weight.double() - weight.to(dtype).double(), 2))
    assert largest < noise_edge(weight, dtype) < 3 * largest


def test_rounding_with_every_batch_stays_below_the_edge() -> None:
    """64 batches added to a float32 weight in place: the rank of the difference is that of what was added."""
    generator = torch.Generator().manual_seed(2)
    first = torch.randn(200, 300, generator=generator) * 0.02
    weight, exact = first.clone(), first.double()
    u, v = torch.randn(200, 16, generator=generator), torch.randn(16, 300, generator=generator)
    for _ in range(64):
        step = 1e-5 * (u * torch.randn(16, generator=generator)) @ v
        weight += step
        exact += step.double()
    assert float(torch.linalg.matrix_norm(weight.double() - exact, 2)) < noise_edge(first, torch.float32)
    found = low_rank(weight.double() - first.double(), noise_edge(first, torch.float32))
    assert found.rank == 16
    assert found.exact


def test_a_change_in_half_precision_keeps_the_rank_of_what_was_written() -> None:
    weight = torch.randn(576, 1536, generator=torch.Generator().manual_seed(3)) * 0.02
    first = weight.to(torch.bfloat16)
    update = built(torch.full((8,), 0.6, dtype=torch.float64), 576, 1536)
    last = (first.double() + update).to(torch.bfloat16)
    difference = last.double() - first.double()
    found = low_rank(difference, noise_edge(first, torch.bfloat16))
    assert found.rank == 8
    ours, theirs = found.left.double() @ found.right.double() - update, difference - update
    assert ours.norm() < 0.2 * theirs.norm(), "the rank leaves most of the rounding out"


def test_wrong_ranks_and_changes_are_refused() -> None:
    change = torch.ones(4, 6)
    for rank in (0, 5):
        with pytest.raises(ValueError, match=rf"rank must be in \[1, 4\] .* got {rank}"):
            low_rank(change, 1e-9, rank)
    for bad in (torch.zeros(4, 6), torch.full((4, 6), torch.nan), torch.full((4, 6), torch.inf)):
        with pytest.raises(ValueError, match="change must be finite and not zero"):
            low_rank(bad, 1e-9)
    assert low_rank(change * 1e-12, 1.0).rank == 1, "a change below rounding is still a change"
