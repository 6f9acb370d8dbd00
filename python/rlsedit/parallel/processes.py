"""The ranks of a mesh over which the weights of a model are spread, or that hold a copy each."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate, Shard

from rlsedit_kernels.distributed import Ranks, bounds
from rlsedit_kernels.errors import RankError

from . import fsdp
from .one import OneProcess, flat, row_form
from .part import Part

__all__ = ["Processes", "spread"]


class Processes(OneProcess):
    """The ranks of a one-dimensional mesh; all of them make the same calls.

    Args:
        ranks: of the mesh.
        model: the causal LM.
        layers: its decoder layers.
    """

    many = True

    def __init__(self, ranks: Ranks, model: nn.Module, layers: nn.ModuleList) -> None:
        self.ranks = ranks
        self.rank, self.size = ranks.rank, ranks.size
        self.writes = ranks.rank == 0
        self._fsdp = fsdp.Units(model, layers)
        self._shared: Exception | None = None

    def part(self, module: nn.Module, layout: str) -> Part:
        """Which part of the weight of an edited module is here.

        Raises:
            ValueError: it is spread in a way that is not known.
        """
        self._fsdp.rest(module)
        weight: Any = module.weight
        d, v = row_form(weight.shape, layout)
        whole = slice(0, d), slice(0, v)
        if not isinstance(weight, DTensor):
            return Part(d, v, *whole, "whole")
        (placement,) = [p for p, n in zip(weight.placements, weight.device_mesh.shape, strict=True) if n > 1] or [
            Replicate()
        ]
        if isinstance(placement, Replicate):
            return Part(d, v, *whole, "whole")
        if type(placement) is not Shard:
            raise ValueError(f"Adapter: the edited weight must be sharded evenly or replicated, got {placement}")
        of_rows = (placement.dim % 2 == 1) == (layout == "out_in")
        edges = bounds(d if of_rows else v, self.size)
        mine = slice(edges[self.rank], edges[self.rank + 1])
        part = Part(d, v, mine, whole[1], "rows") if of_rows else Part(d, v, whole[0], mine, "columns")
        if row_form(weight.to_local().shape, layout) != part.shape:
            raise ValueError(
                f"Adapter: rank {self.rank} must hold {part.shape} of the edited weight ({d}, {v}), it holds "
                f"{row_form(weight.to_local().shape, layout)}"
            )
        return part

    def local(self, module: nn.Module) -> Tensor:
        """The tensor that holds this process's part of the weight, as it is stored."""
        self._fsdp.rest(module)
        weight: Any = module.weight
        weight = weight.detach()
        return weight.to_local() if isinstance(weight, DTensor) else weight

    @contextmanager
    def together(self, what: str) -> Iterator[None]:
        """See `Ranks.together`."""
        with self.in_step(), self.ranks.together(what):
            yield

    @contextmanager
    def in_step(self) -> Iterator[None]:
        """What fails inside fails on all ranks at the same place, so that they can go on together."""
        try:
            yield
        except Exception as error:
            self._shared = error
            raise

    @contextmanager
    def guarded(self, what: str) -> Iterator[None]:
        """See `Ranks.guarded`, less what failed on all ranks in step; a broken collective of the model is explained."""
        shared: Exception | None = None
        with self.ranks.guarded(what):
            try:
                yield
            except RankError:
                raise
            except Exception as error:
                if isinstance(error, RuntimeError) and error is not self._shared:
                    self.ranks.heard(what, error)
                if error is not self._shared:
                    raise
                shared = error
        if shared is not None:
            raise shared

    def agree(self, what: str, **values: float) -> None:
        """See `Ranks.agree`."""
        with self.in_step():
            self.ranks.agree(what, **values)

    def of_first(self, what: str, work: Callable[[], Any]) -> Any:
        """What `work` gives on rank 0, on every rank.

        Raises:
            RankError: with what rank 0 has raised.
        """
        value = None
        with self.together(what):
            if self.writes:
                value = work()
        return self.shared(value)

    def shared(self, value: Any, source: int = 0) -> Any:
        """What the rank `source` has, on every rank: two broadcasts. Tensors of it should lie on the CPU."""
        here = self.rank == source
        data = torch.frombuffer(bytearray(pickle.dumps(value)), dtype=torch.uint8) if here else torch.empty(0)
        size = torch.tensor([len(data)], device=self.ranks.device)
        length = int(self.ranks.broadcast(size, source))
        sent = data.to(self.ranks.device) if here else torch.empty(length, dtype=torch.uint8, device=self.ranks.device)
        return pickle.loads(self.ranks.broadcast(sent.contiguous(), source).cpu().numpy().tobytes())

    def same(self, *values: Tensor) -> tuple[Tensor, ...]:
        """The values of rank 0: one broadcast each."""
        return tuple(self._broadcast(value) for value in values)

    def total(self, *values: Tensor) -> tuple[Tensor, ...]:
        """The sums over the ranks, added in their order."""
        return tuple(self.ranks.ordered_sum(value.to(self.ranks.device)).to(value.device) for value in values)

    def inputs(self, local: Tensor, width: int) -> Tensor:
        """Inputs (..., d): gathered from the shards (one all-gather), or those of rank 0 (one broadcast)."""
        local = local.to_local() if isinstance(local, DTensor) else local
        if local.shape[-1] == width:
            return self._broadcast(local)
        flat = local.reshape(-1, local.shape[-1])
        return self.ranks.gather_columns(flat, width).reshape(*local.shape[:-1], width)

    def samples(self, parameters: Sequence[Tensor], count: int) -> list[Tensor]:
        """As in one process: each rank gives what it holds of them, and one sum puts them together."""
        found: list[Tensor] = []
        shared: list[int] = []
        for parameter in parameters:
            index = torch.arange(0, parameter.numel(), max(1, parameter.numel() // count), device="cpu")
            if not isinstance(parameter, DTensor) or all(isinstance(p, Replicate) for p in parameter.placements):
                value = parameter.to_local() if isinstance(parameter, DTensor) else parameter
                found.append(flat(value).cpu()[index].double())
                continue
            placements = [p for p, n in zip(parameter.placements, parameter.device_mesh.shape, strict=True) if n > 1]
            if len(placements) != 1 or type(placements[0]) is not Shard or parameter.device_mesh.size() != self.size:
                found.append(flat(parameter.full_tensor()).cpu()[index].double())
                continue
            found.append(_mine(parameter, placements[0].dim, index, self.rank, self.size))
            shared.append(len(found) - 1)
        if shared:
            total = self.ranks.ordered_sum(torch.cat([found[i] for i in shared]).to(self.ranks.device)).cpu()
            for i, part in zip(shared, total.split([len(found[i]) for i in shared]), strict=True):
                found[i] = part
        return found

    def awake(self) -> None:
        """Gather what FSDP2 keeps sharded beside the decoder layers."""
        self._fsdp.awake()

    @contextmanager
    def idle(self, layers: Sequence[nn.Module]) -> Iterator[None]:
        """FSDP2 does not gather layers that are called inside."""
        with self._fsdp.idle(layers):
            yield

    def _broadcast(self, value: Tensor) -> Tensor:
        kind = value.dtype
        # NCCL sends nothing from the host, where figures and drawn tokens may lie
        sent = value.detach().to(self.ranks.device, torch.uint8 if kind == torch.bool else kind, copy=True)
        return self.ranks.broadcast(sent.contiguous(), 0).to(value.device, kind)


def spread(model: nn.Module, layers: nn.ModuleList, module: nn.Module, ranks: Ranks | None = None) -> OneProcess:
    """The processes that hold a model, from the weight of its first edited module.

    Args:
        model: the causal LM.
        layers: its decoder layers.
        module: the first module that could be edited.
        ranks: of a model of which every process has a copy; None for one that this process has for itself, or that is
            spread.

    Raises:
        ValueError: a mesh of several dimensions.
    """
    fsdp.Units(model, layers).rest(module)
    weight: Any = getattr(module, "weight", None)
    if not isinstance(weight, DTensor):
        return OneProcess() if ranks is None else _started(Processes(ranks, model, layers), model)
    mesh = weight.device_mesh
    wide = [i for i, n in enumerate(mesh.shape) if n > 1]
    if len(wide) > 1:
        raise ValueError(
            f"Adapter.for_model: the edited weights must lie on a mesh of one dimension, got {mesh}; tensor "
            "parallelism and FSDP2 together, or replicas of sharded models (HSDP), cannot be edited yet: load the "
            "model with one of them"
        )
    if mesh.ndim > 1:
        if mesh.mesh_dim_names is None:
            raise ValueError(f"Adapter.for_model: the dimensions of the mesh must have names, got {mesh}")
        mesh = mesh[mesh.mesh_dim_names[wide[0] if wide else 0]]
    if ranks is not None and ranks.size != mesh.size():
        raise ValueError(f"Adapter.for_model: ranks must be the {mesh.size()} of the model's mesh, got {ranks.size}")
    return _started(Processes(ranks or Ranks(mesh), model, layers), model)


@torch.no_grad()
def _started(processes: Processes, model: nn.Module) -> Processes:
    """A first pass through the whole model: FSDP2 finds its root by it."""
    if processes._fsdp.any:
        token = torch.zeros(1, 1, dtype=torch.long, device=processes.ranks.device)
        model(input_ids=token, use_cache=False)
    return processes


def _mine(parameter: DTensor, dim: int, index: Tensor, rank: int, size: int) -> Tensor:
    """The values at flat indices of the whole that are here, zeros for the others."""
    shape = parameter.shape
    dim %= len(shape)
    edges = bounds(shape[dim], size)
    first, last = edges[rank], edges[rank + 1]
    inner = 1
    for n in shape[dim + 1 :]:
        inner *= n
    at = index // inner % shape[dim]
    here = (at >= first) & (at < last)
    place = (index // (inner * shape[dim]) * (last - first) + at - first) * inner + index % inner
    values = torch.zeros(len(index), dtype=torch.float64, device="cpu")
    values[here] = flat(parameter.to_local()).cpu()[place[here]].double()
    return values
