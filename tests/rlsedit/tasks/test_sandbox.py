"""Generated programs that go wrong or try to get out: what must never pass, and what this system shuts in."""

from __future__ import annotations

import os
import socket
import sys
import textwrap
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from rlsedit.tasks import sandbox
from rlsedit.tasks.sandbox import ISOLATION, Limits, isolation, run_program

pytestmark = pytest.mark.skipif(os.name != "posix", reason="no POSIX system")

FAST = Limits(cpu_seconds=1, wall_seconds=10.0, memory=96 << 20, file_bytes=1 << 20, disk=4 << 20, output=1000)


CALL = "enforced = _unshare()"
ROOT = "if uid == 0 and "


@pytest.fixture(params=["as the system allows", "without root's rights", "without namespaces"])
def both(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Programs run shut in as far as it goes, by a user namespace only, and as where the kernel has none for us."""
    source = sandbox._CHILD.read_text()
    assert source.count(CALL) == source.count(ROOT) == 1
    if request.param == "without namespaces":
        source = source.replace(CALL, "enforced: list[str] = []")
    if request.param == "without root's rights":
        if os.geteuid() != 0:
            pytest.skip("the user is not root: the same as what the system allows")
        source = source.replace(ROOT, "if False and ")
    if request.param != "as the system allows":
        (tmp_path / "child.py").write_text(source)
        monkeypatch.setattr(sandbox, "_CHILD", tmp_path / "child.py")
    return str(request.param)


def needs(*names: str) -> None:
    if missing := [name for name in names if not isolation()[name]]:
        pytest.skip(f"this system does not enforce: {', '.join(missing)}")


def run(code: str, limits: Limits = FAST) -> sandbox.Outcome:
    return run_program(textwrap.dedent(code), limits)


def test_a_right_program_passes(both: str) -> None:
    outcome = run(
        """
        import collections.abc, dataclasses, heapq, json.tool, math, re, typing
        @dataclasses.dataclass
        class Pair:
            first: int
        assert Pair(3) == Pair(3) and math.isqrt(17) == 4 and input is not None
        open("mine", "w").write("text")
        assert open("mine").read() == "text"
        print("said")
        """
    )
    assert (outcome.status, outcome.detail, outcome.output) == ("passed", "", "said\n")
    assert outcome.passed


def test_the_program_has_no_input_and_nothing_else_than_the_standard_library(both: str) -> None:
    assert run("input()").detail.startswith("EOFError")
    assert run("import torch").detail.startswith("ModuleNotFoundError")
    assert run("import rlsedit").detail.startswith("ModuleNotFoundError")
    assert run("assert __debug__ and __name__ != '__main__'").passed


@pytest.mark.parametrize(
    ("code", "status", "detail"),
    [
        ("assert 1 == 2, 'no'", "error", "AssertionError: no"),
        ("def f(:", "error", "SyntaxError"),
        ("import os; os._exit(0)", "no verdict", "exit status 0"),
        ("import os; os._exit(3)", "no verdict", "exit status 3"),
        ("import sys; sys.exit(0)", "error", "SystemExit: 0"),
        ("raise SystemExit", "error", "SystemExit"),
        ("raise KeyboardInterrupt", "error", "KeyboardInterrupt"),
        ("import os; os.kill(os.getpid(), 9)", "killed", "SIGKILL"),
        ("import os; os.abort()", "killed", "SIGABRT"),
        ("import ctypes; ctypes.string_at(0)", "killed", "SIGSEGV"),
        ("import os; os.execv('/bin/true', ['true'])", "no verdict", "exit status 0"),
        ("import os; os.closerange(0, 64); raise ValueError", "no verdict", "exit status"),
        ("class E(Exception):\n    __str__ = lambda self: 1 / 0\nraise E", "error", "E: "),
    ],
)
def test_only_the_end_of_the_program_passes(code: str, status: str, detail: str) -> None:
    outcome = run(code)
    assert not outcome.passed
    assert outcome.status == status, outcome
    assert detail in outcome.detail


@pytest.mark.parametrize(("head", "passed"), [("", False), ("from __future__ import annotations\n", True)])
def test_annotations_are_evaluated_unless_the_program_puts_them_off(head: str, passed: bool) -> None:
    outcome = run_program(f"{head}def double(x: List[int]) -> List[int]:\n    return x * 2\n", FAST)
    assert outcome.passed is passed
    assert passed or outcome.detail.startswith("NameError: name 'List' is not defined")


def test_a_forged_verdict_does_not_pass(both: str) -> None:
    for text in (
        '{"ran": true, "error": null}',
        '{"nonce": null, "ran": true, "error": null}',
        '{"enforced": []}',
        "x",
    ):
        outcome = run(
            f"""
            import os
            for fd in range(64):
                try:
                    os.write(fd, b'\\n' + {text.encode()!r} + b'\\n')
                except OSError:
                    pass
            os._exit(0)
            """
        )
        assert outcome.status == "no verdict"
    assert not run(
        "import os\nfor fd in range(3, 64):\n    try: os.write(fd, b'x' * 10**6)\n    except OSError: pass"
    ).passed


def test_a_child_that_comes_to_the_end_does_not_speak_for_its_parent(both: str) -> None:
    outcome = run("import os\nif os.fork():\n    os.wait()\n    raise ValueError('parent')")
    assert (outcome.status, outcome.detail) == ("error", "ValueError: parent")
    assert run("import os\nif os.fork():\n    os.wait()\n    os._exit(0)").status == "no verdict"


def test_endless_programs_end(both: str) -> None:
    loop = run("while True: pass")
    assert loop.status == "timeout"
    assert loop.seconds < 9
    asleep = run("import time; time.sleep(60)", Limits(wall_seconds=0.5))
    assert (asleep.status, asleep.detail) == ("timeout", "still running after 0.5 s")
    deaf = run(
        "import signal, time\nfor s in set(signal.Signals) - {9, 19}: signal.signal(s, signal.SIG_IGN)\ntime.sleep(60)",
        Limits(wall_seconds=0.5),
    )
    assert deaf.status == "timeout"
    assert deaf.seconds < 5


def test_memory_recursion_files_and_output_are_limited(both: str) -> None:
    assert run("x = bytearray(10**9)").detail.startswith("MemoryError")
    assert run("def f(n):\n    return f(n + 1) + 1\nf(0)").detail.startswith("RecursionError")
    assert not run("import sys; sys.setrecursionlimit(10**9)\ndef f(n):\n    return f(n + 1) + 1\nf(0)").passed
    assert run("open('big', 'wb').write(bytes(2 << 20))").detail.startswith("OSError: [Errno 27]")
    assert run("kept = [open('/dev/null') for _ in range(100)]").detail.startswith("OSError: [Errno 24]")
    loud = run("for _ in range(300): print('x' * 99_999)")
    assert loud.passed
    assert loud.output == "x" * 1000


def test_all_files_together_are_limited() -> None:
    needs("files")
    outcome = run("for i in range(9): open(str(i), 'wb').write(bytes(1 << 20))")
    assert outcome.detail.startswith("OSError: [Errno 28]")


def left_behind(directory: str) -> list[str]:
    """Processes of this machine whose home is the program's directory."""
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            if f"HOME={directory}\0".encode() in path.read_bytes():
                found.append(path.parent.name)
        except OSError:
            continue
    return found


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_nothing_is_left_running(both: str) -> None:
    outcome = run(
        """
        import os, time
        print(os.getcwd(), flush=True)
        for depth in range(3):
            if os.fork() == 0:
                os.setsid()
                if os.fork() == 0:
                    time.sleep(60)
                os._exit(0)
        """
    )
    directory = outcome.output.strip()
    assert outcome.passed, outcome
    assert "rlsedit-run-" in directory
    assert left_behind(directory) == []
    assert not Path(directory).exists()


def test_programs_side_by_side_do_not_count_for_each_other() -> None:
    """Several evaluations on one machine: as one user they had 8 processes together, and right programs failed."""
    needs("number of processes", "files")
    if Path("/proc/self/uid_map").read_text().split() not in (["0", "0", "4294967295"], []) and os.geteuid() == 0:
        pytest.skip("this container has few users: all programs run as nobody")
    code = """
        import threading, time
        threads = [threading.Thread(target=time.sleep, args=(0.5,)) for _ in range(5)]
        [thread.start() for thread in threads]
        [thread.join() for thread in threads]
        """
    limits = Limits(wall_seconds=10.0)
    with ThreadPoolExecutor(4) as pool:
        outcomes = list(pool.map(lambda _: run(code, limits), range(4)))
    assert [outcome.status for outcome in outcomes] == ["passed"] * 4, outcomes


def test_a_fork_bomb_stays_small() -> None:
    needs("number of processes", "other processes")
    outcome = run("import os\nprint(os.getcwd(), flush=True)\nwhile True: os.fork()")
    assert outcome.detail.startswith("BlockingIOError")
    assert left_behind(outcome.output.split("\n")[0]) == []


def test_the_environment_and_open_files_of_the_caller_are_not_handed_on(
    both: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RLSEDIT_SECRET", "hidden")
    (tmp_path / "secret").write_text("hidden")
    with open(tmp_path / "secret") as file:
        os.set_inheritable(file.fileno(), True)
        outcome = run(
            f"""
            import os, sys
            assert set(os.environ) <= {{"HOME", "TMPDIR", "LANG", "LC_CTYPE"}}, os.environ
            for fd in range(3, 64):
                try:
                    assert b"hidden" not in os.pread(fd, 100, 0), fd
                except OSError:
                    pass
            assert not any("{os.getcwd()}" == path for path in sys.path)
            """
        )
    assert outcome.passed, outcome


def test_the_environment_of_the_parent_cannot_be_read() -> None:
    needs("other processes")
    for pid in (os.getpid(), os.getppid()):
        outcome = run(f"print(open('/proc/{pid}/environ').read())")
        assert outcome.detail.startswith(("FileNotFoundError", "PermissionError")), outcome


def test_the_parent_cannot_be_killed() -> None:
    needs("other processes")
    for pid in (os.getpid(), os.getppid()):
        outcome = run(f"import os; os.kill({pid}, 0)")
        assert outcome.detail.startswith(("ProcessLookupError", "PermissionError")), outcome
    assert run("import os; os.kill(os.getppid(), 9)").passed, "the first process of a namespace does not hear it"
    assert run("import os; os.kill(-1, 9)").status in ("passed", "error")


def test_nothing_is_written_outside_the_directory(tmp_path: Path) -> None:
    needs("files")
    os.chmod(tmp_path, 0o777)
    (tmp_path / "mine").write_text("precious")
    os.chmod(tmp_path / "mine", 0o666)
    for code in (
        f"open({str(tmp_path / 'new')!r}, 'w').write('x')",
        f"open({str(tmp_path / 'mine')!r}, 'w').write('x')",
        f"import os; os.remove({str(tmp_path / 'mine')!r})",
        f"import os; os.rename({str(tmp_path / 'mine')!r}, 'moved')",
        "open('/tmp/rlsedit-escape', 'w')",
        "open('/dev/shm/rlsedit-escape', 'w')",
    ):
        outcome = run(code)
        assert outcome.status == "error", (code, outcome)
        assert "Error: [Errno" in outcome.detail
    assert (tmp_path / "mine").read_text() == "precious"
    assert not Path("/tmp/rlsedit-escape").exists()


def test_rights_cannot_be_had_again() -> None:
    """Not to mount the file system writable, nor to enter another user or namespace."""
    needs("files")
    outcome = run(
        """
        import ctypes, os
        libc = ctypes.CDLL(None, use_errno=True)
        assert libc.mount(None, b"/", None, 0x20 | 0x1000, None) == -1
        assert libc.umount(os.fsencode(os.getcwd())) == -1
        assert "CapEff:\\t0000000000000000" in open("/proc/self/status").read()
        assert "NoNewPrivs:\\t1" in open("/proc/self/status").read()
        try:
            os.setuid(0)
        except OSError:
            pass
        assert os.getuid() != 0
        """
    )
    assert outcome.passed, outcome


def test_there_is_no_network() -> None:
    needs("network")
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        outcome = run(f"import socket; socket.create_connection(('127.0.0.1', {port}), 2)")
    assert outcome.status == "error"
    assert "OSError" in outcome.detail or "Connection" in outcome.detail


def test_what_is_enforced_is_said(both: str) -> None:
    outcome = run("")
    assert set(outcome.enforced) <= set(ISOLATION)
    if both == "without namespaces":
        assert not {"network", "files", "other processes"} & set(outcome.enforced)
    if both == "without root's rights":
        assert "number of processes" not in outcome.enforced, "root has no such limit, in a user namespace or not"
    if both == "as the system allows":
        assert {name: name in outcome.enforced for name in ISOLATION} == isolation()


def test_wrong_calls() -> None:
    with pytest.raises(TypeError, match="code must be a str"):
        run_program(b"x")  # type: ignore[arg-type]
    for name, value in (("cpu_seconds", 1.5), ("memory", -1), ("wall_seconds", True), ("wall_seconds", 0.0)):
        with pytest.raises(ValueError, match=f"{name} must be a (whole )?number above 0"):
            Limits(**{name: value})
