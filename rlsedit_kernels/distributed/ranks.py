"""Ranks: the processes that share a state, and the few collectives that states are built from.

All communication of this package goes through this file. Everything here gives the same bits on every rank: what is
gathered is a copy, and what is added up is added in the order of the ranks by one of them.
"""

from __future__ import annotations

import contextlib
import datetime
import math
import threading
import time
import uuid
import weakref
import zlib
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Shard

from rlsedit_kernels.distributed.failure import Reports, rank_error
from rlsedit_kernels.errors import RankError

__all__ = ["Ranks", "bounds"]

TIMEOUT = 300.0
"""Seconds after which a rank that does not answer is given up."""

_GATHER = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
"""Its name from torch 2.13 on, and before."""

_LIVES: weakref.WeakKeyDictionary[dist.ProcessGroup, int] = weakref.WeakKeyDictionary()
"""A number for each group of running processes, drawn by its first rank: a group that is started again has another."""

_MESSAGE = 2048
_NUMBERS = 10
_SPIN = 2e-3


def bounds(n: int, size: int) -> tuple[int, ...]:
    """Where the rows of each rank begin, and n: the shards of DTensor's `Shard(0)`, the last ones smaller or empty."""
    step = -(-n // size)
    return tuple(min(rank * step, n) for rank in range(size + 1))


class Ranks:
    """The processes of a one-dimensional `DeviceMesh`.

    Every method that communicates is to be called by all ranks of the mesh, in the same order. So is this, which sends
    8 bytes when it is called for the first time for a process group.

    Args:
        mesh: one-dimensional; None for all processes (`torch.distributed` must have been initialised), on the CPU
            with gloo and on the GPUs with NCCL.
        timeout: seconds after which a rank that does not answer is given up. At most that of the process group.

    Raises:
        TypeError: mesh is no DeviceMesh, or timeout no number.
        ValueError: the mesh has more than one dimension, or this process is not in it; a timeout that is not positive
            and finite.
        RuntimeError: `torch.distributed` is not initialised.
    """

    def __init__(self, mesh: DeviceMesh | None = None, *, timeout: float = TIMEOUT) -> None:
        if mesh is None:
            if not dist.is_initialized():
                raise RuntimeError("Ranks: torch.distributed is not initialised; start with torchrun, or give a mesh")
            kind = "cuda" if dist.get_backend() == "nccl" else "cpu"
            mesh = init_device_mesh(kind, (dist.get_world_size(),), mesh_dim_names=("states",))
        if not isinstance(mesh, DeviceMesh):
            raise TypeError(f"Ranks: mesh must be a DeviceMesh or None, got {type(mesh).__name__}")
        if mesh.ndim != 1:
            raise ValueError(f"Ranks: mesh must have one dimension, got {mesh.ndim}; take one of it: mesh['name']")
        if mesh.get_coordinate() is None:
            raise ValueError("Ranks: this process is not in the mesh")
        if isinstance(timeout, bool) or not isinstance(timeout, (int, float)):
            raise TypeError(f"Ranks: timeout must be a number of seconds, got {type(timeout).__name__}")
        if not 0.0 < timeout < math.inf:
            raise ValueError(f"Ranks: timeout must be positive and finite, got {timeout}")
        self.mesh = mesh
        self.timeout = timeout
        self.group: dist.ProcessGroup = mesh.get_group()
        self.rank = mesh.get_local_rank()
        self.size = mesh.size()
        kind = mesh.device_type
        self.device = torch.device(kind, torch.cuda.current_device()) if kind == "cuda" else torch.device(kind)
        self._reports = Reports(self.group, self.rank, self.size)
        self._group_timeout = None  # of collectives that are not of this class
        if self.device.type == "cpu":
            self._group_timeout = self.group._get_backend(self.device).options._timeout
        if self.group not in _LIVES:
            life = torch.tensor([uuid.uuid4().int >> 66], device=self.device)
            _LIVES[self.group] = int(self.broadcast(life, 0))
        self._reports.begin(_LIVES[self.group])

    def __deepcopy__(self, _memo: object) -> Ranks:
        return self  # copies of a state share the processes

    def __getstate__(self) -> NoReturn:
        raise TypeError(
            "Ranks: processes cannot be pickled, nor what is spread over them: save state_dict() with "
            "rlsedit_kernels.distributed.checkpoint"
        )

    def rows(self, n: int) -> slice:
        """The rows of n that are this rank's."""
        edges = bounds(n, self.size)
        return slice(edges[self.rank], edges[self.rank + 1])

    def shard(self, full: torch.Tensor) -> torch.Tensor:
        """This rank's rows of a tensor that every rank has; a copy."""
        return full[self.rows(full.shape[0])].clone()

    def dtensor(self, local: torch.Tensor, n: int, dim: int = 0) -> DTensor:
        """The tensor whose shards along `dim` (n long) are the ranks' `local`; nothing is sent."""
        shape = list(local.shape)
        shape[dim] = n
        size = torch.Size(shape)
        stride = torch.empty(size, device="meta").stride()
        return DTensor.from_local(local, self.mesh, [Shard(dim)], run_check=False, shape=size, stride=stride)

    def gather(self, local: torch.Tensor, n: int) -> torch.Tensor:
        """The (n, ...) tensor of which each rank has its rows: one all-gather of n rows."""
        edges = bounds(n, self.size)
        if local.shape[0] != edges[self.rank + 1] - edges[self.rank]:
            raise ValueError(f"gather: local must have {edges[self.rank + 1] - edges[self.rank]} rows of {n}, got "
                             f"{local.shape[0]}")  # fmt: skip
        if self.size == 1:
            return local.clone()
        parts = self._all_gather(_padded(local, edges[1]))
        return parts.reshape(self.size * edges[1], *local.shape[1:])[:n]

    def gather_columns(self, local: torch.Tensor, n: int) -> torch.Tensor:
        """The (m, n) matrix of which each rank has its columns: one all-gather of n columns."""
        return self.gather(local.mT.contiguous(), n).mT

    def turn(self, columns: torch.Tensor, n: int) -> torch.Tensor:
        """This rank's rows (m_p, n) of the (m, n) matrix of which each rank has its columns: one all-to-all."""
        m = columns.shape[0]
        rows, edges = bounds(m, self.size), bounds(n, self.size)
        if columns.shape[1] != edges[self.rank + 1] - edges[self.rank]:
            raise ValueError(f"turn: columns must have {edges[self.rank + 1] - edges[self.rank]} columns of {n}, got "
                             f"{columns.shape[1]}")  # fmt: skip
        sent = columns.new_zeros(self.size * rows[1], edges[1])
        sent[:m, : columns.shape[1]] = columns
        received = torch.empty_like(sent)
        if self.size == 1:
            return sent
        self._wait("all-to-all", lambda: dist.all_to_all_single(received, sent, group=self.group, async_op=True))
        blocks = received.view(self.size, rows[1], edges[1])[:, : rows[self.rank + 1] - rows[self.rank]]
        return blocks.transpose(0, 1).reshape(blocks.shape[1], self.size * edges[1])[:, :n].contiguous()

    def ordered_sum(self, term: torch.Tensor) -> torch.Tensor:
        """The sum over the ranks, added in their order: a reduce-scatter and an all-gather, the same bits on all."""
        if self.size == 1:
            return term.clone()
        flat = term.reshape(-1)
        step = -(-flat.numel() // self.size)
        sent = _padded(flat, step * self.size)
        received = torch.empty_like(sent)
        self._wait("all-to-all", lambda: dist.all_to_all_single(received, sent, group=self.group, async_op=True))
        parts = received.view(self.size, step)
        total = parts[0].clone()
        for part in parts[1:]:
            total += part
        return self._all_gather(total).reshape(-1)[: flat.numel()].reshape(term.shape)

    def ordered_rows(self, term: torch.Tensor) -> torch.Tensor:
        """This rank's rows of the sum of the ranks' `term` (n, ...), added in their order: one all-to-all."""
        if self.size == 1:
            return term.clone()
        edges = bounds(term.shape[0], self.size)
        sent = _padded(term, edges[1] * self.size)
        received = torch.empty_like(sent)
        self._wait("all-to-all", lambda: dist.all_to_all_single(received, sent, group=self.group, async_op=True))
        parts = received.view(self.size, edges[1], *term.shape[1:])
        total = parts[0].clone()
        for part in parts[1:]:
            total += part
        return total[: edges[self.rank + 1] - edges[self.rank]]

    def broadcast(self, value: torch.Tensor, source: int) -> torch.Tensor:
        """`value` of the rank `source` into that of all others, in place; contiguous, of the same shape and dtype."""
        if self.size > 1:
            at = dist.get_global_rank(self.group, source)
            self._wait("broadcast", lambda: dist.broadcast(value, at, group=self.group, async_op=True))
        return value

    def send(self, value: torch.Tensor, target: int) -> None:
        """A contiguous tensor to one rank, which calls `receive`."""
        at = dist.get_global_rank(self.group, target)
        self._wait("send", lambda: self._waited(dist.isend(value, at, group=self.group)))

    def receive(self, value: torch.Tensor, source: int) -> torch.Tensor:
        """Into `value`, contiguous, what the rank `source` sends."""
        at = dist.get_global_rank(self.group, source)
        self._wait("receive", lambda: self._waited(dist.irecv(value, at, group=self.group)))
        return value

    def barrier(self) -> None:
        """Returns once all ranks have come here."""
        self._all_gather(torch.zeros(1, dtype=torch.uint8, device=self.device))

    def agree(self, what: str, **values: float) -> None:
        """Check that all ranks have the same numbers: one all-gather of 8 bytes for each.

        Raises:
            ValueError: on every rank, with the name of the first that differs and what each rank has.
        """
        mine = torch.tensor(list(values.values()), dtype=torch.float64, device=self.device)
        every = self._all_gather(mine).view(self.size, -1).cpu()
        for i, name in enumerate(values):
            column = every[:, i]
            if not bool(_alike(column).all()):
                shown = ", ".join(f"{float(value):.17g}" for value in column)
                raise ValueError(f"{what}: {name} must be the same on all ranks, got {shown}; nothing was changed")

    @contextlib.contextmanager
    def together(self, what: str) -> Iterator[None]:
        """A block without communication that succeeds on all ranks or fails on all: one all-gather of a byte.

        The rank that failed raises what it was; the others raise `RankError` with its message. The ranks can go on.
        """
        failed: Exception | None = None
        try:
            yield
        except Exception as error:
            failed = error
        state = torch.tensor([failed is not None], dtype=torch.uint8, device=self.device)
        with _behind(failed):
            bad = self._all_gather(state).flatten().nonzero().flatten().tolist()
        if not bad:
            return
        text = "" if failed is None else f"{type(failed).__name__}: {failed}"
        messages = self._texts(text)
        if failed is not None:
            raise failed
        raise RankError(rank_error(what, {rank: messages[rank] for rank in bad}))

    @contextlib.contextmanager
    def confirmed(self, what: str) -> Iterator[dict[str, float]]:
        """`together` and `agree` in one: a block without communication whose numbers are the same on all ranks.

        The block puts at most `_NUMBERS` of them into the dictionary that it is given, by name. One all-gather of
        8 (`_NUMBERS` + 2) bytes; texts follow only where something is wrong. That `what` is the same is checked too.

        Raises:
            what the block raised, on the rank where it did; RankError with its message on the others.
            ValueError: on all ranks, where one of the numbers or `what` differs.
        """
        failed: Exception | None = None
        numbers: dict[str, float] = {}
        values: list[float] = []
        try:
            yield numbers
            values = [float(number) for number in numbers.values()]
        except Exception as error:
            failed, numbers = error, {}
        row = [float(failed is not None), float(_code(what)), *values]
        mine = torch.tensor(row + [0.0] * (_NUMBERS + 2 - len(row)), dtype=torch.float64)
        with _behind(failed):
            every = self._all_gather(mine.to(self.device)).view(self.size, _NUMBERS + 2).cpu()
        bad = every[:, 0].nonzero().flatten().tolist()
        if not bad and bool(_alike(every).all()):
            return
        texts = self._texts(what if not bad or failed is None else f"{type(failed).__name__}: {failed}")
        if failed is None and bad:
            failed = RankError(rank_error(what, {rank: texts[rank] for rank in bad}))
        elif failed is None and not bool(_alike(every[:, 1]).all()):
            failed = ValueError(f"the ranks must call the same method, got {', '.join(texts)}; nothing was changed")
        elif failed is None:
            column = int((~_alike(every)).any(dim=0).nonzero()[0])
            shown = ", ".join(f"{float(value):.17g}" for value in every[:, column])
            name = [*numbers, *["the call"] * _NUMBERS][column - 2]
            failed = ValueError(f"{what}: {name} must be the same on all ranks, got {shown}; nothing was changed")
        assert failed is not None
        failed.agreed = True  # type: ignore[attr-defined]
        raise failed

    @contextlib.contextmanager
    def guarded(self, what: str) -> Iterator[None]:
        """A block with communication: what fails on one rank is told to the others, which fail with its message.

        Collectives are out of step afterwards: the group is of no more use, and every later call says so. Not so where
        all ranks know of the failure already, because `confirmed` raised it or its `agreed` is true.
        """
        self._reports.check(sending=False)
        try:
            yield
        except RankError:
            raise
        except Exception as error:
            if not getattr(error, "agreed", False):
                self._reports.post(what, error)
            raise

    def heard(self, what: str, error: RuntimeError) -> None:
        """Raise what other ranks have reported where a collective that is not of this class broke down by it.

        Args:
            what: is being done.
            error: what the collective raised; an error of another kind is left to the caller.

        Raises:
            RankError: another rank has failed, or is gone.
        """
        try:
            self._reports.check(sending=False)
        except RankError as known:
            raise known from error
        if isinstance(error, dist.DistError) or "gloo" in str(error):
            raise self._reports.explain(what, error) from error

    def _texts(self, text: str) -> list[str]:
        data = text.encode()[:_MESSAGE]
        mine = torch.zeros(_MESSAGE, dtype=torch.uint8)
        mine[: len(data)] = torch.tensor(list(data), dtype=torch.uint8)
        rows = self._all_gather(mine.to(self.device)).view(self.size, _MESSAGE).cpu()
        return [bytes(row.tolist()).rstrip(b"\0").decode(errors="replace") for row in rows]

    def _all_gather(self, local: torch.Tensor) -> torch.Tensor:
        """(size, *local.shape), the tensors of all ranks."""
        if self.size == 1:
            return local.clone()[None]
        local = local.contiguous()
        into = torch.empty(self.size, *local.shape, dtype=local.dtype, device=local.device)
        flat = into.view(-1)
        self._wait("all-gather", lambda: _GATHER(flat, local.view(-1), group=self.group, async_op=True))
        return into

    def _wait(self, what: str, start: Callable[[], Any]) -> None:
        """Until the collective is done; at the latest when another rank reports a failure, is gone, or is too slow."""
        self._reports.check()
        try:
            work = self._started(start)
            if self.device.type == "cpu":
                self._poll(what, work)
            work.wait()
        except RankError:
            raise
        except RuntimeError as error:
            raise self._reports.explain(what, error) from error

    def _started(self, start: Callable[[], Any]) -> Any:
        """The collective, begun with our time limit: what outlives it keeps a process from exiting with gloo."""
        if self._group_timeout is None:
            return start()
        self.group.set_timeout(datetime.timedelta(seconds=self.timeout + 1.0))
        try:
            return start()
        finally:
            self.group.set_timeout(self._group_timeout)

    def _waited(self, work: Any) -> Any:
        return _Waited(work) if self.device.type == "cpu" else work

    def _poll(self, what: str, work: Any) -> None:
        begin = time.monotonic()
        pause, looked = 0.0, begin
        while not work.is_completed():
            now = time.monotonic()
            if now - begin > _SPIN:
                pause = min(2e-3, pause + 5e-5)
            if now - looked > 0.5:
                looked = now
                self._reports.check(sending=self._reports.lost is not None)  # lost twice: rank 0 may just be done
            if now - begin > self.timeout:
                seconds = datetime.timedelta(seconds=self.timeout)
                raise self._reports.explain(what, TimeoutError(f"no answer within {seconds}"))
            time.sleep(pause)


class _Waited:
    """A send or a receive; gloo says that one is done only to whoever waits for it, so that a thread does."""

    def __init__(self, work: Any) -> None:
        self._work = work
        self._error: RuntimeError | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._work.wait()
        except RuntimeError as error:
            self._error = error

    def is_completed(self) -> bool:
        return not self._thread.is_alive()

    def wait(self) -> None:
        self._thread.join()
        if self._error is not None:
            raise self._error


@contextlib.contextmanager
def _behind(failed: Exception | None) -> Iterator[None]:
    """Where another rank is gone before this one could tell what failed here, that is not lost: it is the cause."""
    try:
        yield
    except RankError as lost:
        if failed is None:
            raise
        raise lost from failed


def _alike(every: torch.Tensor) -> torch.Tensor:
    """Where the rows are like the first one; a NaN is like a NaN."""
    return (every == every[0]) | (every.isnan() & every[0].isnan())


def _code(text: str) -> int:
    """A number for a text, exact as a float64."""
    return zlib.crc32(text.encode())


def _padded(value: torch.Tensor, rows: int) -> torch.Tensor:
    """Contiguous, with rows of zeros at the end: shards of one size."""
    if value.shape[0] == rows:
        return value.contiguous()
    padded = value.new_zeros(rows, *value.shape[1:])
    padded[: value.shape[0]] = value
    return padded
