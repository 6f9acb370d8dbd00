"""Choice of a back end: automatic, by environment, by context manager; and what is said when one is missing."""

from __future__ import annotations

import os
import subprocess
import sys
import threading

import pytest
import torch

import rlsedit_kernels as rk
from rlsedit_kernels.backends import BACKEND_VARIABLE, active_backend, registry


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Which back end served a call of gain_products."""
    seen: list[str] = []
    for name in ("cpu", "torch"):
        loaded = registry._loaded(name)
        if "gain_products" in loaded.kernels:
            kernel = loaded.kernels["gain_products"]

            def spy(C, K, kernel=kernel, name=name):
                seen.append(name)
                return kernel(C, K)

            monkeypatch.setitem(loaded.kernels, "gain_products", spy)
    return seen


def product() -> None:
    rk.ops.gain_products(torch.eye(3), torch.ones(1, 3))


def available(name: str) -> bool:
    return next(row.available for row in rk.backends() if row.name == name)


def test_the_table_tells_what_is_there_and_why_not() -> None:
    rows = rk.backends()
    assert [row.name for row in rows] == ["cuda", "triton", "cpu", "torch"]
    assert rows[-1].available
    for row in rows:
        assert bool(row.reason) != row.available
        assert bool(row.ops) == row.available


def test_automatic_choice_is_the_first_that_serves(calls) -> None:
    product()
    assert calls == ["cpu" if available("cpu") else "torch"]
    assert active_backend("gain_products") == calls[0]


def test_context_manager_forces_and_restores(calls) -> None:
    with rk.use_backend("torch"):
        product()
        torch.ops.rlsedit_kernels.gain_products(torch.eye(3), torch.ones(1, 3))
    product()
    assert calls[:2] == ["torch", "torch"]
    assert calls[2] == active_backend("gain_products")


def test_context_manager_beats_the_environment(calls, monkeypatch) -> None:
    monkeypatch.setenv(BACKEND_VARIABLE, "cuda")
    with rk.use_backend("torch"):
        product()
    assert calls == ["torch"]


def test_the_environment_forces(calls, monkeypatch) -> None:
    monkeypatch.setenv(BACKEND_VARIABLE, "torch")
    product()
    assert calls == ["torch"]


def test_the_choice_belongs_to_its_thread(calls) -> None:
    with rk.use_backend("torch"):
        thread = threading.Thread(target=product)
        thread.start()
        thread.join()
    assert calls == ["cpu" if available("cpu") else "torch"]


def test_a_forced_choice_reaches_a_compiled_graph(calls) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(lambda C, K: rk.ops.gain_products(C, K), fullgraph=True, backend="eager")
    compiled(torch.eye(4), torch.ones(2, 4))
    with rk.use_backend("torch"):
        compiled(torch.eye(4), torch.ones(2, 4))
    assert calls[-1] == "torch"


@pytest.mark.parametrize("name", ["cuda", "triton"])
def test_an_explicit_choice_that_is_missing_raises_with_the_reason(name, monkeypatch) -> None:
    if available(name):
        pytest.skip(f"back end {name!r} is here")
    reason = next(row.reason for row in rk.backends() if row.name == name)
    with pytest.raises(rk.BackendUnavailableError, match=f"use_backend: back end '{name}' is not available") as caught:
        rk.use_backend(name).__enter__()
    assert reason in str(caught.value)
    monkeypatch.setenv(BACKEND_VARIABLE, name)
    with pytest.raises(rk.BackendUnavailableError, match=f"{BACKEND_VARIABLE}: back end '{name}' is not available"):
        product()


def test_an_unknown_name_is_refused(monkeypatch) -> None:
    with pytest.raises(ValueError, match=r"use_backend: back end must be one of .*got 'tpu'"):
        rk.use_backend("tpu").__enter__()
    monkeypatch.setenv(BACKEND_VARIABLE, "tpu")
    with pytest.raises(ValueError, match=f"{BACKEND_VARIABLE}: back end must be one of"):
        product()


def test_a_back_end_that_does_not_serve_the_device_says_so() -> None:
    if not available("cpu"):
        pytest.skip("the native CPU library is not here")
    with rk.use_backend("cpu"), pytest.raises(rk.BackendUnavailableError, match="serves cpu tensors"):
        registry.kernel_for("gain_products", "cuda")


def test_the_environment_is_read_in_a_fresh_process() -> None:
    code = (
        "import torch, rlsedit_kernels as rk; from rlsedit_kernels.backends import active_backend;"
        "print(active_backend('gain_products'))"
    )
    environment = {**os.environ, BACKEND_VARIABLE: "torch"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    assert done.stdout.strip() == "torch"


def test_the_library_prints_nothing() -> None:
    code = "import rlsedit_kernels as rk; rk.backends()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == ""
    assert done.stderr == ""
