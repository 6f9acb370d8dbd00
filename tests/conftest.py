"""What all tests share: the back ends that are here, poisoned memory, and skips counted by reason."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator

# The references are small: NumPy's thread pool beside torch's costs more than it gives. Set before NumPy loads.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
# `poisoned_memory` asks for deterministic algorithms, for which torch wants this of cuBLAS before CUDA starts.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

import pytest
import torch

import rlsedit_kernels as rk
from rlsedit_kernels.backends import triton

if triton.interpreted():
    from support.interpreter import patch_once

    patch_once()

# By device of the op tests. Under Triton's interpreter (`make test` runs the ops a second time with it) the Triton
# kernels serve the CPU as well.
BACKENDS = {
    "cpu": ("cpu", "torch", "triton") if triton.interpreted() else ("cpu", "torch"),
    "cuda": ("cuda", "triton", "torch"),
}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--device", default="cpu", choices=sorted(BACKENDS), help="of the ops' tests and test_on_a_gpu.py")
    parser.addoption("--emulate-cuda", action="store_true", help="test the ops on emulated CUDA kernels too")
    parser.addoption(
        "--ptx", nargs="?", const="90a", help="emulate what nvcc and Triton make of the kernels, for sm_90a unless told"
    )
    parser.addoption("--pretend-cuda", action="store_true", help="with --device cuda: a rehearsal without a GPU")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--ptx"):
        from support import emulated

        emulated.use_ptx(config.getoption("--ptx"))
    if config.getoption("--emulate-cuda"):
        from support import emulated

        emulated.install()
        BACKENDS["cpu"] = (*BACKENDS["cpu"], "cuda")
    device = config.getoption("--device")
    if config.getoption("--pretend-cuda"):
        if device != "cuda" or torch.cuda.is_available():
            raise pytest.UsageError("--pretend-cuda goes with --device cuda, where there is no GPU")
        from support import pretended_cuda

        pretended_cuda.install()
    if device == "cuda" and not torch.cuda.is_available():
        raise pytest.UsageError("--device cuda: torch finds no GPU here (--pretend-cuda rehearses without one)")
    if device != "cpu":
        torch.set_default_device(device)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "backend" in metafunc.fixturenames:
        metafunc.parametrize("backend", BACKENDS[metafunc.config.getoption("--device")], indirect=True)


@pytest.fixture
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each back end that serves the device, forced; skipped with its reason where it is not there."""
    info = next(row for row in rk.backends() if row.name == request.param)
    if not info.available:
        pytest.skip(f"back end {info.name!r}: {info.reason}")
    with rk.use_backend(info.name):
        yield info.name


@pytest.fixture
def poisoned_memory() -> Iterator[None]:
    """Fresh memory holds NaN, in Python and in native code, so that an element that is not written shows."""
    before = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0])
        torch.utils.deterministic.fill_uninitialized_memory = before[1]


@pytest.fixture(params=[torch.float32, torch.float64], ids=["float32", "float64"])
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param


@pytest.hookimpl(wrapper=True, trylast=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    """A kernel that fails takes the GPU away from its process: every later test there would fail for it.

    Next to the test itself, so that a plugin's limit of its time holds for what it has left on the GPU, too.
    """
    result = yield
    if item.config.getoption("--device") == "cuda":
        try:
            torch.cuda.synchronize()
        except RuntimeError as error:
            text = f"the GPU is lost behind {item.nodeid}: {str(error).splitlines()[0]}"
            if hasattr(item.config, "workerinput"):  # xdist says which test it was, and starts another worker
                os.write(2, f"{text}\n".encode())
                os._exit(70)
            item.session.shouldstop = text
    return result


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Skips by reason: a green run without a GPU must not be mistaken for one with it."""
    reasons: Counter[str] = Counter()
    for report in terminalreporter.stats.get("skipped", []):
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        reasons[reason.removeprefix("Skipped: ")] += 1
    for reason, count in reasons.most_common():
        terminalreporter.write_line(f"skipped {count}: {reason}")
