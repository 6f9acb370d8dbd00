"""Solver and figures of a layer before the first batch, and the folder, for one process or many."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..config import EditConfig
from ..deviations import Deviations
from ..methods import Method, Start
from ..methods.method import check_moment
from ..store.folder import Folder

if TYPE_CHECKING:
    from ..methods import Solver
    from ..models.adapter import Adapter
    from .folder import SharedFolder

    AnyFolder = Folder | SharedFolder
else:
    AnyFolder = Folder

__all__ = ["AnyFolder", "create_folder", "first_figures", "first_solver", "open_folder"]


def first_solver(
    method: Method, states: str, adapter: Adapter, config: EditConfig, layer: int, moment: Tensor, dtype: torch.dtype
) -> Solver:
    """The state of a layer before the first batch; factors the prior.

    Args:
        method: of the editor.
        states: where states go on many processes, "auto", "replicated", "layers" or "sharded".
        adapter, config: of the editor.
        layer: one of `config.layers`.
        moment: E[k k'] (d, d).
        dtype: of the edit.

    Raises:
        ValueError: the moment does not fit the method, or the placement the model.
    """
    weight, processes = adapter.rows(layer), adapter.processes
    if not processes.many:
        return method.start(moment, config, dtype, weight.device)
    from . import solver
    from .processes import Processes

    assert isinstance(processes, Processes)
    part = adapter.part(layer)
    place = solver.placement(states, len(config.layers), part.d, dtype)
    check_moment(moment)
    begin = Start(moment, config, dtype, weight.device)
    return solver.start(method, begin, processes, part, place, config.layers.index(layer))


def first_figures(adapter: Adapter, config: EditConfig, layer: int, moment: Tensor, dtype: torch.dtype) -> Deviations:
    """Figures of a layer that has not moved."""
    weight, processes = adapter.rows(layer), adapter.processes
    gram = config.mom2_weight * moment
    if not processes.many:
        return Deviations(
            torch.zeros(weight.shape, dtype=dtype, device=weight.device), gram.to(device=weight.device, dtype=dtype)
        )
    from . import deviations
    from .processes import Processes

    assert isinstance(processes, Processes)
    return deviations.start(processes, adapter.part(layer), gram, weight, dtype)


def create_folder(adapter: Adapter, path: Any, session: Any, base: Any, records: Any, **more: Any) -> AnyFolder:
    """`Folder.create`, by rank 0 where there are many processes."""
    if not adapter.processes.many:
        return Folder.create(path, session, base, records, **more)
    from .folder import SharedFolder

    return SharedFolder.create(adapter, path, session, base, records, **more)


def open_folder(adapter: Adapter, path: Any, **more: Any) -> AnyFolder:
    """`Folder.open`, by rank 0 where there are many processes."""
    if not adapter.processes.many:
        return Folder.open(path, **more)
    from .folder import SharedFolder

    return SharedFolder.open(adapter, path, **more)
