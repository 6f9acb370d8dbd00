"""Runs one program inside the sandbox: `sandbox.py` starts this file with an interpreter of its own, never imports it.

Three processes: this one sets the isolation up and waits; its child is the first process of a process namespace, closes
the file system and waits; the child of that one gives up its rights, sets its limits and runs the program. When the
program has ended the middle one ends, and with it all that the program has started.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import resource
import signal
import struct
import sys
import time
import types

_NEW_MOUNTS, _NEW_IPC, _NEW_USER, _NEW_PIDS, _NEW_NET = 0x20000, 0x8000000, 0x10000000, 0x20000000, 0x40000000
_PRIVATE, _RECURSIVE, _BIND = 0x40000, 0x4000, 0x1000
_MOUNT_SETATTR = 442  # the number of this system call on every architecture
_AT_FDCWD, _AT_RECURSIVE = -100, 0x8000
_PDEATHSIG, _NO_NEW_PRIVS, _SUBREAPER = 1, 38, 36
_NOBODY = 65534
_ALONE = 0x60000000  # and 2^24 users from there on, which no system gives away
_ALL_USERS = ["0", "0", "4294967295"]
_CAPABILITIES_V3 = 0x20080522


def main() -> None:
    request = json.load(sys.stdin.buffer)
    verdict = int(sys.argv[1])
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    enforced = _unshare()
    middle = os.fork()
    if middle == 0:
        _middle(request, verdict, enforced)
    os.waitpid(middle, 0)


def _middle(request: dict, verdict: int, enforced: list[str]) -> None:
    """Closes the file system, starts the program and sees to its end."""
    _call("prctl", _PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    _call("prctl", _SUBREAPER, 1, 0, 0, 0)
    if "mounts" in enforced:
        enforced.remove("mounts")
        enforced += _close_files(request["limits"], "root" in enforced)
    os.chdir(request["directory"])
    _give_up_rights(_user(request["nonce"]) if "root" in enforced and "files" in enforced else None)
    if os.geteuid() != 0 and sys.platform == "linux":
        enforced.append("number of processes")
    os.write(verdict, (json.dumps({"enforced": enforced}) + "\n").encode())
    worker = os.fork()
    if worker == 0:
        _worker(request, verdict)
    end = time.monotonic() + request["limits"]["wall_seconds"]
    code: int | None = None
    while code is None and time.monotonic() < end:
        pid, status = os.waitpid(worker, os.WNOHANG)
        code = os.waitstatus_to_exitcode(status) if pid else None
        time.sleep(0.002)
    ended = {"nonce": request["nonce"], "code": code}
    _kill_children()
    os.write(verdict, (json.dumps(ended) + "\n").encode())
    os._exit(0)


def _worker(request: dict, verdict: int) -> None:
    """Runs the program; only one that comes to its end reports so, and no process that it has made."""
    own = os.getpid()
    _set_limits(request["limits"])
    module = types.ModuleType("program")
    sys.modules["program"] = module
    nonce, code = request.pop("nonce"), request.pop("code")
    sys.argv = ["program"]
    done = {"nonce": nonce, "ran": True, "error": None}
    try:
        # the program's own future statements count, not those of this file: annotations are evaluated
        exec(compile(code, "program", "exec", dont_inherit=True), module.__dict__)
    except BaseException as error:
        done["error"] = f"{type(error).__name__}: {_text(error)}"[:500]
    if os.getpid() == own:
        with contextlib.suppress(BaseException):
            sys.stdout.flush()
        os.write(verdict, ("\n" + json.dumps(done) + "\n").encode())
    os._exit(0)


def _text(error: BaseException) -> str:
    try:
        return str(error)
    except BaseException:
        return ""


def _call(name: str, *arguments: object) -> bool:
    """Calls the C library; False where the system has no such call or refuses it."""
    if sys.platform != "linux":
        return False
    try:
        function = getattr(ctypes.CDLL(None, use_errno=True), name)
    except (AttributeError, OSError):
        return False
    return bool(function(*arguments) == 0)


def _unshare() -> list[str]:
    """Namespaces of its own, with root's rights where they are there, else within a user namespace. What was had."""
    flags = _NEW_MOUNTS | _NEW_IPC | _NEW_PIDS | _NEW_NET
    uid, gid = os.getuid(), os.getgid()
    if uid == 0 and _call("unshare", flags):
        return ["network", "other processes", "mounts", "root"]
    if not _call("unshare", flags | _NEW_USER):
        return []
    try:
        for name, text in (("setgroups", "deny"), ("uid_map", f"{uid} {uid} 1"), ("gid_map", f"{gid} {gid} 1")):
            with open(f"/proc/self/{name}", "w") as file:
                file.write(text)
    except OSError:
        return ["network", "other processes"]
    return ["network", "other processes", "mounts"]


def _close_files(limits: dict, root: bool) -> list[str]:
    """All that is mounted becomes read-only, but a small file system in memory at the program's own directory."""
    directory = os.getcwd()
    _call("mount", b"none", b"/", None, _PRIVATE | _RECURSIVE, None)
    attributes = ctypes.create_string_buffer(struct.pack("=QQQQ", 1, 0, 0, 0))
    path = ctypes.c_char_p(b"/")
    if not _call("syscall", _MOUNT_SETATTR, _AT_FDCWD, path, _AT_RECURSIVE, attributes, ctypes.c_size_t(32)):
        return []
    own = f"size={limits['disk']},nr_inodes=4096,mode=1777".encode()
    if not _call("mount", b"none", os.fsencode(directory), b"tmpfs", 0, own):
        return []
    if root:
        _move_library(directory)
    if not _call("mount", b"proc", b"/proc", b"proc", 0, None):
        _call("mount", b"none", b"/proc", b"tmpfs", 0, b"size=4096")
    return ["files"]


def _move_library(directory: str) -> None:
    """The standard library where another user can read it: that of root may lie under a closed folder."""
    library = os.path.dirname(os.__file__)
    place = os.path.join(directory, ".python")
    os.mkdir(place)
    if not _call("mount", os.fsencode(library), os.fsencode(place), None, _BIND, None):
        return

    def moved(path: str) -> str:
        return place + path[len(library) :] if path.startswith(library) else path

    sys.path[:] = [moved(path) for path in sys.path]
    sys.path_importer_cache.clear()
    for module in list(sys.modules.values()):
        if hasattr(module, "__path__"):
            module.__path__ = [moved(path) for path in module.__path__]


def _user(nonce: str) -> int:
    """A user of this program alone, since the system counts processes by user; nobody where it has few users."""
    try:
        with open("/proc/self/uid_map") as file:
            known = file.read().split()
    except OSError:
        return _NOBODY
    return _ALONE + int(nonce[:6], 16) if known == _ALL_USERS else _NOBODY


def _give_up_rights(user: int | None) -> None:
    """No capability, none to be had again; as root in a closed file system, another user."""
    if user is not None:
        os.setgroups([])
        os.setresgid(_NOBODY, _NOBODY, _NOBODY)
        os.setresuid(user, user, user)
        _call("prctl", _PDEATHSIG, signal.SIGKILL, 0, 0, 0)  # a change of user has cleared it
    header = ctypes.create_string_buffer(struct.pack("=Ii", _CAPABILITIES_V3, 0))
    _call("capset", header, ctypes.create_string_buffer(24))
    _call("prctl", _NO_NEW_PRIVS, 1, 0, 0, 0)


def _set_limits(limits: dict) -> None:
    cpu = limits["cpu_seconds"]
    resource.setrlimit(resource.RLIMIT_CPU, (cpu, cpu + 1))  # SIGXCPU, and SIGKILL for one that catches it
    for kind, value in (
        (resource.RLIMIT_AS, limits["memory"]),
        (resource.RLIMIT_FSIZE, limits["file_bytes"]),
        (resource.RLIMIT_NPROC, limits["processes"]),
        (resource.RLIMIT_NOFILE, limits["files"]),
        (resource.RLIMIT_CORE, 0),
    ):
        resource.setrlimit(kind, (value, value))


def _kill_children() -> None:
    """Kills and reaps what is left, orphans included; as the first process of its namespace, everything."""
    children = f"/proc/self/task/{os.getpid()}/children"
    while True:
        with contextlib.suppress(OSError):
            if os.getpid() == 1:
                os.kill(-1, signal.SIGKILL)
            with open(children) as file:
                for pid in file.read().split():
                    os.kill(int(pid), signal.SIGKILL)
        try:
            os.waitpid(-1, 0)
        except ChildProcessError:
            return


if __name__ == "__main__":
    main()
