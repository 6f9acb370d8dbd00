"""The pretended GPU refuses what a GPU refuses, and computes what a CPU computes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from support import builders, pretended

import rlsedit_kernels as rk
from rlsedit_kernels.backends import active_backend

if not pretended.active():
    pytest.skip("about the pretended GPU (--pretend-cuda)", allow_module_level=True)


def here() -> torch.Tensor:
    return torch.arange(4.0, device="cpu")


def there() -> torch.Tensor:
    return torch.arange(4.0)


def test_a_forgotten_cpu_shows() -> None:
    for take in (lambda: there().numpy(), lambda: np.asarray(there()), lambda: np.linalg.norm(there())):
        with pytest.raises(TypeError, match="can't convert cuda:0 device type tensor to numpy"):
            take()
    assert there().cpu().numpy().tolist() == there().tolist() == [0.0, 1.0, 2.0, 3.0]
    assert float(there().sum()) == 6.0
    assert repr(there()) == "pretended tensor([0., 1., 2., 3.])"


@pytest.mark.parametrize(
    "mix",
    [
        lambda: there() + here(),
        lambda: here().add_(there().sum()),
        lambda: torch.outer(there(), here()),
        lambda: torch.cat([there(), here()]),
        lambda: torch.equal(there(), here()),
        lambda: here()[there().long()],
        lambda: torch.add(there(), there(), out=here()),
        lambda: torch.where(here() > 1.0, there(), there()),
        lambda: torch.ops.rlsedit_kernels_cuda.gain_products(torch.eye(4), here()[None]),
        lambda: torch.ops.rlsedit_kernels.gain_products(torch.eye(4), here()[None]),
    ],
)
def test_both_devices_in_one_op_are_refused(mix) -> None:
    with pytest.raises(RuntimeError, match="Expected all tensors to be on the same device"):
        mix()


def test_both_devices_where_a_gpu_takes_them() -> None:
    total = there() + torch.tensor(1.0, device="cpu")
    assert total.device == torch.device("cuda:0")
    assert there()[here().long()].tolist() == here().tolist()
    place = here()
    place.copy_(total)
    assert place.tolist() == [1.0, 2.0, 3.0, 4.0]


def test_views_and_writes_reach_the_same_memory() -> None:
    A = torch.zeros(3, 3)
    A.diagonal().add_(2.0)
    A.mT[0, 1:] = torch.tensor([5.0, 6.0])
    assert A.tolist() == [[2.0, 0.0, 0.0], [5.0, 2.0, 0.0], [6.0, 0.0, 2.0]]
    assert A[1].data_ptr() == A.data_ptr() + 3 * A.element_size()
    assert A.add_(1.0) is A


def test_generators_belong_to_a_device() -> None:
    one, other = (torch.Generator(device="cuda").manual_seed(3) for _ in range(2))
    assert torch.equal(torch.randn(5, generator=one), torch.randn(5, generator=other))
    with pytest.raises(RuntimeError, match="Expected a 'cuda' device type for generator"):
        torch.randn(5, generator=torch.Generator(device="cpu"))
    assert torch.randn(5, generator=torch.Generator(device="cpu"), device="cpu").device.type == "cpu"


@pytest.mark.parametrize(
    "wait", [lambda x: x.sum().item(), lambda x: x.cpu(), lambda x: bool(x.any()), lambda x: x[x > 1.0]]
)
def test_the_host_that_waits_is_seen(wait) -> None:
    x = there()
    torch.cuda.set_sync_debug_mode("error")
    try:
        with pytest.raises(RuntimeError, match="called a synchronizing CUDA operation"):
            wait(x)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    with (
        pytest.raises(RuntimeError, match="not permitted when stream is capturing"),
        torch.cuda.graph(torch.cuda.CUDAGraph()),
    ):
        wait(x)
    wait(x)


def test_a_graph_does_nothing_before_its_replay() -> None:
    C, K = builders.symmetric((), 12, torch.float32, 0), builders.key_batch((), 3, 12, torch.float32, 1)
    before, expected = C.clone(), C.clone()
    with rk.use_backend("cuda"):
        gain = rk.ops.rls_update_(expected, K)[0]
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = rk.ops.rls_update_(C, K)[0]
    assert torch.equal(C, before)
    assert bool(captured.isnan().all())
    graph.replay()
    assert torch.equal(C, expected)
    assert torch.equal(captured, gain)
    with pytest.raises(RuntimeError, match="before a capture"):
        torch.cuda.CUDAGraph().replay()


def test_an_op_runs_on_the_kernels_of_its_device() -> None:
    assert active_backend("rls_update_", "cuda") == "cuda"
    A = builders.symmetric((), 5, torch.float64, 2)
    L, info = rk.ops.cholesky(A)
    assert (L.device.type, info.device.type) == ("cuda", "cuda")
    assert L.cpu() is not L
