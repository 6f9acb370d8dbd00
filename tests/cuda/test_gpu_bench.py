"""bench/gpu.py: what fails is a row with its message, the run goes on, and what is out of time is said."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
import threading
from pathlib import Path
from typing import Any

import gpu
import gpu_cases
import harness
import on_gpu
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

    bench.section("half", half)
    assert bench.rows[1:] == [{"what": "half", "failed": "MemoryError: no room"}]
    assert kept == [bench.rows[:1]]


def test_what_triton_says_is_a_row_that_says_why(capsys) -> None:
    """Its first line is a place in a kernel, and what is wrong there the last one, or that of what is inside."""
    from triton.compiler.errors import CompilationError

    inside = CompilationError("def f():\n    pass", None, "no such dtype")
    outside = CompilationError("def g():\n    f()", None, None)
    outside.__cause__ = inside
    bench = Bench("cpu", 1, 60.0)
    for failure in (inside, outside):

        def fails(failure: Exception = failure) -> None:
            raise failure

        bench.compare("something", {}, [Entry(str(id(failure)), fails)])
    assert all("no such dtype" in str(row["failed"]) for row in bench.rows)
    assert all(len(str(row["failed"]).splitlines()) == 1 for row in bench.rows)
    assert "f()" in capsys.readouterr().err  # the whole of it


def test_a_section_for_which_it_is_late_is_not_begun() -> None:
    bench = Bench("cpu", 3, -1.0)
    bench.section("half", broken)
    assert bench.rows == [{"what": "half", "failed": "not run: the time is used up"}]
    assert not bench.finished()


def test_a_run_goes_on_behind_another_with_whole_comparisons() -> None:
    """Entries are compared by taking turns: those of a comparison that did not come to its end are measured anew."""
    none = "not run: the time is used up"
    whole = [
        {"what": "one", "u": 4, "name": "a", "median_ms": 1.0},
        {"what": "one", "u": 4, "name": "b", "failed": "x"},
    ]
    cut = [{"what": "two", "u": 4, "name": "a", "median_ms": 1.0}, {"what": "two", "u": 4, "name": "b", "failed": none}]
    other = [{"what": "two", "u": 5, "name": "a", "failed": "hangs: no answer in 90 s"}]
    bench = Bench("cpu", 3, 60.0)
    bench.take([*whole, *cut, *other, {"what": "parts", "failed": none}, {"what": "target", "name": "t", "met": None}])
    assert bench.rows == [*whole, *other]
    assert bench.finished()


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
import sys, time
sys.path.insert(0, {bench!r})
import checkout
import gpu_cases, torch

def factors(bench, sizes):
    def fails():  # from then on every call does
        torch.cuda.synchronize = fails
        raise RuntimeError("an illegal memory access")
    def hangs():  # for longer than it may
        bench.doing = bench.doing[0] - 3600.0, bench.doing[1]
        time.sleep(600.0)
    from gpu_bench import Entry
    bench.compare("factors", {{}}, [Entry("bad", {what}), Entry("good", lambda: None)])

gpu_cases.factors = factors
import gpu
sys.exit(gpu.main())
"""


def run_of_sections(folder: Path, program: str, *more: str) -> tuple[Any, dict[str, Any]]:
    """A process that measures the ceilings and what `program` has in the place of factors: how it ended, its file."""
    target, file = folder / "gpu.json", folder / "program.py"
    file.write_text(program, encoding="utf-8")
    words = f"--pretend-cuda --d 16 --u 2 --v 4 --only ceilings factors --repetitions 1 --commit abc --json {target}"
    command = [sys.executable, str(file), *words.split(), *more]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False, timeout=300)
    if "CannotEmulate" in done.stderr:
        pytest.skip("CUDA kernels on the CPU: there is no C++ compiler")
    return done, json.loads(target.read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    ("what", "failure"), [("fails", "RuntimeError: an illegal memory access"), ("hangs", "hangs: no answer in 3000 s")]
)
def test_a_process_that_lost_its_gpu_is_followed_by_one_that_goes_on(tmp_path, what: str, failure: str) -> None:
    program = LOSES_ITS_GPU.format(bench=str(BENCH), what=what)
    done, result = run_of_sections(tmp_path, program, "--hang", "3000")
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("a new one goes on") == 1
    rows = [(row["name"], row.get("failed")) for row in result["rows"] if row["what"] != "target"]
    assert rows == [("copy", None), ("torch.mm", None), ("bad", failure), ("good", None)]
    assert result["settings"]["finished"] is True
    assert result["machine"]["commit"] == "abc"


def test_what_a_run_had_no_time_for_is_measured_by_one_behind_it(tmp_path) -> None:
    program = LOSES_ITS_GPU.format(bench=str(BENCH), what="lambda: None")
    done, result = run_of_sections(tmp_path, program, "--budget", "-1")
    assert done.returncode == on_gpu.UNFINISHED, done.stderr
    assert result["settings"]["finished"] is False
    assert [row["what"] for row in result["rows"] if row["what"] != "target"] == ["ceilings", "factors"]
    first = tmp_path / "first.json"
    result["rows"].append({"what": "factors", "name": "bad", "failed": "of the first call"})
    first.write_text(json.dumps(result), encoding="utf-8")
    done, result = run_of_sections(tmp_path, program, "--resume", str(first))
    assert done.returncode == 0, done.stderr
    rows = [(row["name"], row.get("failed")) for row in result["rows"] if row["what"] != "target"]
    assert rows == [("bad", "of the first call"), ("copy", None), ("torch.mm", None), ("good", None)]
    assert result["settings"]["finished"] is True


def test_what_the_next_process_would_inherit_is_closed(tmp_path) -> None:
    """A GPU that is held by an open file would go on with the kernel that hangs."""
    program = tmp_path / "program.py"
    text = f"""
        import os, sys
        sys.path.insert(0, {str(BENCH)!r})
        if len(sys.argv) > 1:
            print(os.path.exists(f"/proc/self/fd/{{sys.argv[1]}}"))
        else:
            import gpu
            kept = os.open("/dev/null", os.O_RDONLY)
            os.set_inheritable(kept, True)
            gpu.follow([{str(program)!r}, str(kept)])
    """
    program.write_text(textwrap.dedent(text), encoding="utf-8")
    done = subprocess.run([sys.executable, str(program)], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


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
