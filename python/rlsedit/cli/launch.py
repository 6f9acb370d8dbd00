"""`torchrun ... -m rlsedit edit` or `remove`: many processes that act as one command, of which rank 0 speaks.

torchrun sets RANK, LOCAL_RANK, WORLD_SIZE and MASTER_ADDR; without them nothing here does anything.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from rlsedit_kernels.distributed import Ranks

__all__ = ["COMMANDS", "add_parallel", "hush", "linger", "load_spread", "rank", "size", "started", "status_of"]

COMMANDS = ("edit", "remove")
"""What many processes can do together; others would each do all of it, into the same files."""
_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR")
_SAID = "rlsedit/said"
_PATIENCE = 15.0
"""Seconds that the other processes stay after a failure, so that torchrun does not end rank 0 before it has spoken."""


def size() -> int:
    """Number of processes that torchrun has started; 1 without it."""
    return int(os.environ["WORLD_SIZE"]) if all(name in os.environ for name in _VARIABLES) else 1


def rank() -> int:
    """Number of this process among them."""
    return int(os.environ["RANK"]) if size() > 1 else 0


def hush() -> None:
    """Only rank 0 writes to the standard streams."""
    if rank() > 0:
        sys.stdout, sys.stderr = open(os.devnull, "w"), open(os.devnull, "w")  # noqa: SIM115 - as long as the process
    if size() > 1:
        warnings.simplefilter("ignore")


def linger(status: int) -> int:
    """Before a process with a bad `status` ends: rank 0 says that it has spoken, the others wait for it."""
    if size() == 1 or status == 0:
        return status
    import torch.distributed as dist

    if not dist.is_initialized():
        time.sleep(0.0 if rank() == 0 else 2.0)
        return status
    try:
        store = dist.distributed_c10d._get_default_store()
        if rank() == 0:
            store.set(_SAID, "1")
        until = time.monotonic() + _PATIENCE
        while rank() > 0 and not store.check([_SAID]) and time.monotonic() < until:
            time.sleep(0.05)
    except RuntimeError:  # the store is gone with the process that kept it
        pass
    return status


def status_of(error: Exception, expected: tuple[type[Exception], ...], bad: int, failed: int) -> int | None:
    """Exit status for what another rank has told of its failure; None for other errors."""
    if type(error).__name__ != "RankError":
        return None
    kinds = re.findall(r"rank \d+ failed: (\w+)", str(error))
    names = {kind.__name__ for kind in expected} | {"StoreError", "FolderBusyError", "FileNotFoundError"}
    return bad if kinds and set(kinds) <= names else failed


def add_parallel(parser: argparse.ArgumentParser) -> None:
    """--parallel and --states."""
    group = parser.add_argument_group("many processes (torchrun --nproc-per-node N -m rlsedit ...)")
    group.add_argument(
        "--parallel", choices=("auto", "tp", "fsdp"), default="auto",
        help="how the model is spread: tensor parallelism, FSDP2, or tp where the heads divide (default auto)",
    )  # fmt: skip
    group.add_argument(
        "--states", choices=("auto", "replicated", "layers", "sharded"), default="auto",
        help="where the states go: whole on every process, each layer's on one, or sharded by rows (default auto)",
    )  # fmt: skip


@contextmanager
def started(args: argparse.Namespace) -> Iterator[Ranks | None]:
    """The process group while the block runs, gloo on CPUs and NCCL on GPUs; None without torchrun.

    Raises:
        ValueError: an option that is for many processes where there is one, or the other way round.
    """
    if size() == 1:
        if args.parallel != "auto" or args.states != "auto":
            raise ValueError(
                "--parallel, --states: are for many processes; start with torchrun --nproc-per-node N -m rlsedit ..."
            )
        yield None
        return
    import torch.distributed as dist

    from rlsedit_kernels.distributed import Ranks

    device = _device(args.device)
    if device.type == "cuda":
        dist.init_process_group("nccl", device_id=device)
    else:
        dist.init_process_group("gloo")
    yield Ranks()
    dist.barrier()
    dist.destroy_process_group()


def load_spread(args: argparse.Namespace) -> tuple[Any, Any]:
    """Model and tokenizer, each process its part of the weights, read from the files where it lies.

    Raises:
        ValueError: the model cannot be spread so.
    """
    import torch
    from transformers import AutoConfig
    from transformers.distributed import DistributedConfig

    from rlsedit.cli.options import quiet_transformers
    from rlsedit.models import smollm2

    quiet_transformers()
    folder = smollm2.cached_copy() if args.model == "smollm2" else Path(args.model)
    dtype = "auto" if args.dtype == "auto" else getattr(torch, args.dtype)
    kind = args.parallel
    if kind == "auto" and (folder / "config.json").is_file():
        text = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False).get_text_config()
        heads = [getattr(text, name, None) or size() for name in ("num_attention_heads", "num_key_value_heads")]
        planned = bool(getattr(text, "base_model_tp_plan", None))
        kind = "tp" if planned and all(n % size() == 0 for n in heads) else "fsdp"
    args.parallel = kind
    spread = DistributedConfig(tp_size=size()) if kind == "tp" else DistributedConfig(fsdp_size=size())
    return smollm2.load_model(folder, dtype=dtype, distributed=spread)


def _device(name: str) -> torch.device:
    import torch

    from rlsedit.cli.options import device_of

    if name not in ("auto", "cpu", "cuda"):
        raise ValueError(
            f"--device: must be auto, cpu or cuda for many processes, got {name!r}; each takes its own GPU"
        )
    device = device_of(name)
    if device.type == "cpu" and torch.cuda.is_available():
        raise ValueError(
            "--device: many processes take the GPUs where there are any; hide them: CUDA_VISIBLE_DEVICES=''"
        )
    if device.type == "cuda":
        local = int(os.environ["LOCAL_RANK"])
        if local >= torch.cuda.device_count():
            raise ValueError(f"--nproc-per-node: this machine has {torch.cuda.device_count()} GPUs, needs {local + 1}")
        device = torch.device("cuda", local)
        torch.cuda.set_device(device)
    return device
