"""On a GPU: an op never waits for the device, works on its tensors' device and the current stream there, allocates from
torch's pool only, and can be captured in a CUDA graph.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from support import builders, emulated
from support.op_arguments import arguments, tensors

import rlsedit_kernels as rk
from rlsedit_kernels.ops.schemas import SCHEMAS, written

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here")
D, U = 200, 20


@pytest.fixture(autouse=True)
def on_the_gpu(request: pytest.FixtureRequest) -> None:
    if request.config.getoption("--device") != "cuda":
        pytest.skip("the tests of the ops run on the CPU (--device cuda)")


def call_of(op: str) -> tuple[Callable[[], object], list[torch.Tensor]]:
    """A call of `op` on arguments that stay where they are, and those that it changes."""
    given = arguments(op, torch.float32, (2,), d=D, u=U, v=9)
    function = getattr(torch.ops.rlsedit_kernels, op)
    return lambda: function(*given), list(given[: written(op)])


@pytest.mark.parametrize("op", SCHEMAS)
def test_the_host_does_not_wait(op: str, backend: str) -> None:
    call, _ = call_of(op)
    call()
    torch.cuda.set_sync_debug_mode("error")
    try:
        call()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("op", SCHEMAS)
def test_an_op_runs_behind_what_its_stream_has(op: str, backend: str) -> None:
    """Its arguments are there only when the stream comes to it: what runs on another stream reads NaN."""
    given = arguments(op, torch.float32, (2,), d=D, u=U, v=9)
    late = [torch.full_like(a, float("nan")) if isinstance(a, torch.Tensor) else a for a in given]
    function, side = getattr(torch.ops.rlsedit_kernels, op), torch.cuda.Stream()
    copies = [a.clone() if isinstance(a, torch.Tensor) else a for a in given]
    expected = [*tensors(function(*copies)), *copies[: written(op)]]
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        torch.cuda._sleep(50_000_000)
        for place, value in zip(late, given, strict=True):
            if isinstance(place, torch.Tensor):
                place.copy_(value)
        got = [*tensors(function(*late)), *late[: written(op)]]
    side.synchronize()
    for mine, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(mine, theirs)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there are not two GPUs here")
@pytest.mark.parametrize("op", SCHEMAS)
def test_tensors_on_a_gpu_that_is_not_the_current_one(op: str, backend: str) -> None:
    function, given = getattr(torch.ops.rlsedit_kernels, op), arguments(op, torch.float32, (2,), d=D, u=U, v=9)
    there = [a.to("cuda:1") if isinstance(a, torch.Tensor) else a for a in given]
    expected = [*tensors(function(*given)), *given[: written(op)]]
    got = [*tensors(function(*there)), *there[: written(op)]]
    assert torch.cuda.current_device() == 0
    assert all(mine.device == torch.device("cuda", 1) for mine in got)
    for mine, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(mine.cpu(), theirs.cpu())


@pytest.mark.parametrize("op", SCHEMAS)
def test_a_captured_graph_gives_the_same_bits(op: str, backend: str) -> None:
    if backend == "torch":
        pytest.skip("the plain back end may leave the stream (cuSOLVER)")
    warm, _ = call_of(op)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        warm()
    torch.cuda.current_stream().wait_stream(stream)
    call, changed = call_of(op)
    before = [t.clone() for t in changed]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        returned = tensors(call())
    eager_call, eager_changed = call_of(op)
    eager = tensors(eager_call())
    for _ in range(3):  # a replay leaves nothing behind that the next one would count on
        for tensor, value in zip(changed, before, strict=True):
            tensor.copy_(value)
        graph.replay()
        torch.cuda.synchronize()
        for got, expected in zip([*returned, *changed], [*eager, *eager_changed], strict=True):
            assert torch.equal(got, expected)


@pytest.mark.parametrize("op", SCHEMAS)
def test_two_streams_at_once(op: str, backend: str) -> None:
    """A call has a workspace of its own; blocks that wait for each other share the GPU with those of another call."""
    alone, changed = call_of(op)
    expected = [*tensors(alone()), *changed]
    torch.cuda.synchronize()
    streams, results = [torch.cuda.Stream() for _ in range(2)], []
    exactly = {} if backend == "torch" else {"rtol": 0.0, "atol": 0.0}
    calls = [[call_of(op) for _ in range(4)] for _ in streams]
    torch.cuda.synchronize()
    for stream in streams:  # what is put on both now runs together
        with torch.cuda.stream(stream):
            torch.cuda._sleep(2_000_000)
    for pair in zip(*calls, strict=True):
        for stream, (call, given) in zip(streams, pair, strict=True):
            with torch.cuda.stream(stream):
                results.append([*tensors(call()), *given])
    torch.cuda.synchronize()
    for result in results:
        for got, wanted in zip(result, expected, strict=True):
            torch.testing.assert_close(got, wanted, **exactly)


@pytest.mark.parametrize("op", SCHEMAS)
def test_nothing_is_allocated_after_the_first_call(op: str, backend: str) -> None:
    call, _ = call_of(op)
    for _ in range(3):
        call()
    torch.cuda.synchronize()
    before = torch.cuda.memory_reserved()
    for _ in range(20):
        call()
    torch.cuda.synchronize()
    assert torch.cuda.memory_reserved() == before


def test_the_workspace_of_thousands_of_keys(backend: str) -> None:
    """Parts of Y and of G are fewer where each is large."""
    d, u = (8192, 2048) if not emulated.active() else (300, 40)
    C, K = torch.eye(d), torch.randn(u, d) / d**0.5
    torch.ops.rlsedit_kernels.gain_products(C[:64, :64].contiguous(), K[:40, :64].contiguous())
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    Y, G = torch.ops.rlsedit_kernels.gain_products(C, K)
    assert torch.cuda.max_memory_allocated() - before <= 4 * (d * u + 10 * u * u + 2**26)
    assert float((Y - K.mT).norm()) <= 1e-5 * float(K.norm())
    assert torch.equal(G, G.mT)


def test_weight_and_state_on_one_stream(backend: str) -> None:
    """Both halves of a batch in one graph: W gains what the gain says."""
    if backend == "torch":
        pytest.skip("the plain back end may leave the stream (cuSOLVER)")
    C, K = builders.symmetric((), D, torch.float32, 0), builders.key_batch((), U, D, torch.float32, 1)
    W, V = builders.columns((), D, 33, torch.float32, 2), builders.key_batch((), U, 33, torch.float32, 3)
    gain, _ = rk.ops.rls_update_(C.clone(), K)
    expected = W.double() + gain.double() @ (V.double() - K.double() @ W.double())
    rk.ops.weight_update_(W.clone(), K, V, gain)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        gain, _ = rk.ops.rls_update_(C, K)
        rk.ops.weight_update_(W, K, V, gain)
    graph.replay()
    torch.cuda.synchronize()
    assert float((W.double() - expected).norm() / expected.norm()) < 1e-5
