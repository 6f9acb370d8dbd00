"""Processes that start at once: forked from one that has imported torch, transformers and this package."""

from __future__ import annotations

import multiprocessing
import os
import socket
import sys
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, NamedTuple

PRELOADED = [
    "torch", "torch._dynamo", "torch.distributed.tensor", "rlsedit_kernels.distributed",
    "transformers.models.llama.modeling_llama", "rlsedit.cli.edit", "rlsedit.editor",
]  # fmt: skip


class Done(NamedTuple):
    """How the processes of a command ended, and what all of them have written."""

    codes: list[int]
    stdout: str
    stderr: str


def fork(n: int, target: Callable[..., object], *args: object) -> tuple[list[Any], list[BaseProcess]]:
    """Start `target(rank, *args, pipe)` for n ranks: the other ends of the pipes, and the processes."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    pipes, processes = [], []
    for rank in range(n):
        mine, theirs = context.Pipe()
        process = context.Process(target=target, args=(rank, *args, theirs), daemon=True)
        process.start()
        theirs.close()
        pipes.append(mine)
        processes.append(process)
    return pipes, processes


def end(processes: list[BaseProcess]) -> None:
    """Kill those that are left, and wait for all."""
    for process in processes:
        process.kill()
    for process in processes:
        process.join()


def rlsedit(n: int, folder: Path, *command: object, limit: float = 240.0) -> Done:
    """The command `rlsedit` in n processes with the variables of torchrun, without its agent.

    Args:
        n: processes.
        folder: where what they write is kept.
        command: arguments.
        limit: seconds for each process.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    variables = {"WORLD_SIZE": str(n), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    _, processes = fork(n, _command, {**os.environ, **variables}, str(folder), [str(word) for word in command])
    for process in processes:
        process.join(limit)
    end(processes)
    said = ["".join((folder / f"{name}-{rank}").read_text() for rank in range(n)) for name in ("stdout", "stderr")]
    return Done([process.exitcode if process.exitcode is not None else -1 for process in processes], *said)


def _command(rank: int, environment: dict[str, str], folder: str, command: list[str], _pipe: object) -> None:
    os.environ.update(environment, RANK=str(rank), LOCAL_RANK=str(rank))
    for name in ("stdout", "stderr"):
        setattr(sys, name, open(Path(folder) / f"{name}-{rank}", "w", buffering=1))  # noqa: SIM115 - as long as the process
    from rlsedit.cli import main

    sys.exit(main(command))
