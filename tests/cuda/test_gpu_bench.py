"""bench/gpu.py: what fails is a row with its message, the run goes on, and what is out of time is said."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import gpu
import gpu_cases
import harness
import pytest
import torch
from gpu_bench import Bench, Entry, Problem
from torch.utils._python_dispatch import TorchDispatchMode

from rlsedit_kernels.ops.schemas import SCHEMAS

BENCH = Path(__file__).resolve().parents[2] / "bench"


def broken() -> None:
    raise RuntimeError("no kernel image\nand a second line")


def test_a_failure_is_a_row_and_the_others_are_measured() -> None:
    bench = Bench("cpu", 3, 60.0)
    entries = [Entry("bad", broken), Entry("good", lambda: None, lambda: {"error": 0.5}, most=2)]
    bench.compare("something", {"u": 4}, [*entries, Entry("no error", lambda: None, broken)], 1.5)
    bad, good, no_error = bench.rows
    assert bad == {"what": "something", "u": 4, "name": "bad", "failed": "RuntimeError: no kernel image"}
    assert (good["error"], good["floor_ms"], good["repetitions"]) == (0.5, 1.5, 2)
    assert good["p20_ms"] <= good["median_ms"] <= good["p80_ms"]
    assert no_error["median_ms"] >= 0.0
    assert no_error["failed"] == "error against float64: RuntimeError: no kernel image"
    assert bench.median("something", "good", u=4) == good["median_ms"]
    assert bench.median("something", "bad", u=4) is None
    assert bench.median("something", "good", u=5) is None


def test_a_machine_without_git_keeps_its_result(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert harness._commit() == "unknown"


def test_nothing_is_started_when_the_time_is_used_up() -> None:
    bench = Bench("cpu", 3, -1.0)
    bench.compare("something", {}, [Entry("late", broken)])
    assert bench.rows == [{"what": "something", "name": "late", "failed": "not run: the time is used up"}]


def test_a_section_that_fails_is_a_row_and_what_was_measured_is_kept(tmp_path) -> None:
    kept: list[list[dict[str, object]]] = []
    bench = Bench("cpu", 3, 60.0)
    bench.keep = lambda: kept.append(list(bench.rows))

    def half(bench: Any) -> None:
        bench.compare("something", {}, [Entry("good", lambda: None)])
        raise MemoryError("no room\nfor more")

    bench.section(half)
    assert bench.rows[1:] == [{"what": "half", "failed": "MemoryError: no room"}]
    assert kept == [bench.rows[:1]]


def test_a_failure_while_it_is_timed_is_a_row() -> None:
    calls: list[int] = []

    def fails_late() -> None:
        calls.append(0)
        if len(calls) > 3:
            broken()

    bench, looked = Bench("cpu", 3, 60.0), []
    bench.failed = lambda: looked.append(len(bench.rows))
    bench.compare("something", {"u": 4}, [Entry("late", fails_late), Entry("good", lambda: None)])
    assert [(row["name"], row.get("failed")) for row in bench.rows] == [
        ("late", "RuntimeError: no kernel image"),
        ("good", None),
    ]
    assert looked == [1]


def test_what_has_a_row_is_not_measured_again() -> None:
    """By a process that goes on behind one which lost its GPU."""
    bench = Bench("cpu", 3, 60.0)
    bench.rows += [{"what": "something", "u": 4, "name": "lost", "failed": "gone"}]
    bench.compare("something", {"u": 4}, [Entry("lost", broken), Entry("good", lambda: None)])
    bench.compare("something", {"u": 5}, [Entry("lost", lambda: None)])
    assert [(row["u"], row["name"], "failed" in row) for row in bench.rows] == [
        (4, "lost", True),
        (4, "good", False),
        (5, "lost", False),
    ]


LOSES_ITS_GPU = """
import sys
sys.path.insert(0, {bench!r})
import checkout
import gpu_cases, torch
from support import pretended_cuda
before, again = gpu_cases.factors, "--begun" in sys.argv

def factors(bench, sizes):  # a kernel that fails: from then on every call does
    def fails():
        torch.cuda.synchronize = fails
        raise RuntimeError("an illegal memory access")
    from gpu_bench import Entry
    bench.compare("factors", {{}}, [Entry("bad", fails), Entry("good", lambda: None)])

gpu_cases.factors = factors
import gpu
gpu.main()
"""


def test_a_process_that_lost_its_gpu_is_followed_by_one_that_goes_on(tmp_path) -> None:
    target, program = tmp_path / "gpu.json", tmp_path / "program.py"
    program.write_text(LOSES_ITS_GPU.format(bench=str(BENCH)), encoding="utf-8")
    words = f"--pretend-cuda --d 16 --u 2 --v 4 --only ceilings factors --repetitions 1 --commit abc --json {target}"
    command = [sys.executable, str(program), *words.split()]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    if "CannotEmulate" in done.stderr:
        pytest.skip("CUDA kernels on the CPU: there is no C++ compiler")
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("a new one goes on") == 1
    result = json.loads(target.read_text(encoding="utf-8"))
    rows = [(row["name"], row.get("failed")) for row in result["rows"] if row["what"] != "target"]
    assert rows == [
        ("copy", None),
        ("torch.mm", None),
        ("bad", "RuntimeError: an illegal memory access"),
        ("good", None),
    ]
    assert result["settings"]["finished"] is True
    assert result["machine"]["commit"] == "abc"


def test_a_call_that_hangs_ends_the_run() -> None:
    bench, gave_up = Bench("cpu", 3, 60.0), threading.Event()
    bench.watch(0.05, gave_up.set)
    bench.compare("something", {"u": 4}, [Entry("stuck", lambda: gave_up.wait(20.0))])
    assert gave_up.is_set()
    assert bench.rows[0] == {"what": "something", "u": 4, "name": "stuck", "failed": "hangs: no answer in 0.05 s"}


def test_the_whole_run_on_a_pretended_gpu(tmp_path) -> None:
    """In a process of its own, in another folder: every back end, with events and graphs."""
    target = tmp_path / "gpu.json"
    words = f"--pretend-cuda --d 48 --u 5 1 --v 12 --factors 32 --repetitions 1 --json {target}"
    command = [sys.executable, str(BENCH / "gpu.py"), *words.split()]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    if "CannotEmulate" in done.stderr:
        pytest.skip("CUDA kernels on the CPU: there is no C++ compiler")
    assert done.returncode == 0, done.stderr
    result = json.loads(target.read_text(encoding="utf-8"))
    assert result["settings"]["gpu"] == "pretended GPU"
    assert not [row for row in result["rows"] if "failed" in row]
    names = {row["name"] for row in result["rows"] if row["what"] == "update of state and weight"}
    assert names >= {"cuda", "cuda, in a graph", "torch", "AlphaEdit solve"}
    found = [row for row in result["rows"] if row["what"] == "target"]
    assert all(row["measured"] is not None for row in found if "triton" not in row["name"].lower())


def test_the_whole_run_on_the_cpu(tmp_path, capsys, monkeypatch) -> None:
    """Every section at a size that takes a moment; each target has a row."""
    target = tmp_path / "gpu.json"
    words = f"gpu.py --device cpu --d 48 --u 5 1 --v 12 --factors 32 --repetitions 1 --json {target}"
    monkeypatch.setattr(sys, "argv", words.split())
    gpu.main()
    rows = json.loads(target.read_text(encoding="utf-8"))["rows"]
    assert not [row for row in rows if "failed" in row]
    whole = [row for row in rows if row["what"] == "update of state and weight" and "error_W" in row]
    assert whole
    assert all(max(row["error"], row["error_C"], row["error_W"]) < 1e-5 for row in whole)
    assert len([row for row in rows if row["what"] == "target"]) == 13
    alone = {row["what"] for row in rows if {"torch", "cpu"} & {row.get("name")}}
    assert alone >= set(SCHEMAS)  # each op beside torch


class Weights(TorchDispatchMode):
    """Notes the strides of every weight that is updated or multiplied."""

    def __init__(self) -> None:
        super().__init__()
        self.strides: list[tuple[int, ...]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        ops = torch.ops.rlsedit_kernels
        if func in (ops.weight_update_.default, ops.key_products.default):
            self.strides.append(args[0].stride())
        return func(*args, **(kwargs or {}))


def test_the_error_of_a_weight_update_is_that_of_the_layout_that_is_timed() -> None:
    d, u, v = 12, 5, 7
    bench, problem = Bench("cpu", 2, 60.0), Problem(d, u, v, "cpu")
    with Weights() as seen:
        gpu_cases.weights(bench, problem, torch.randn(d, u, device="cpu"))
    ours = [row for row in bench.rows if row["name"] != "plain torch"]
    assert {row["what"] for row in ours} == {"key_products", "weight_update_"}
    assert len(seen.strides) == 5 * len(ours)  # two to warm up, two timed, one for the error
    assert set(seen.strides) == {(1, d)}
    assert problem.W.stride() == (v, 1)


def test_rivals_do_not_run_in_tf32(tmp_path, monkeypatch) -> None:
    """Images of CUDA set TORCH_ALLOW_TF32_CUBLAS_OVERRIDE, which does what is done here."""
    found, switch = [], torch.backends.cuda.matmul
    monkeypatch.setattr(gpu_cases, "ceilings", lambda *_: found.append(switch.fp32_precision))
    target = tmp_path / "gpu.json"
    monkeypatch.setattr(sys, "argv", f"gpu.py --device cpu --d 48 --only ceilings --json {target}".split())
    switch.allow_tf32 = True
    try:
        gpu.main()
        assert switch.fp32_precision == "tf32"
    finally:
        switch.allow_tf32 = False
    assert found == ["ieee"]
    assert json.loads(target.read_text(encoding="utf-8"))["settings"]["tf32 of torch"] is False


def test_a_device_that_would_be_timed_by_the_host_is_refused(monkeypatch) -> None:
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--device", "cuda:1"])
    with pytest.raises(SystemExit):
        gpu.main()
