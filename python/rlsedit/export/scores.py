"""How well facts are known with the edited weights, and with the base model and an adapter on top."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..facts import Fact
from ..metrics import EvalReport, evaluate
from ..models.adapter import Adapter
from ..parallel import OneProcess
from .changes import Change, rounded
from .lowrank import LowRank

if TYPE_CHECKING:
    from torch.utils.hooks import RemovableHandle

__all__ = ["evaluate_both", "with_adapter", "with_weights"]

ALONE = OneProcess()


def evaluate_both(
    adapter: Adapter,
    tokenizer: Any,
    facts: Sequence[Fact],
    factors: Sequence[tuple[Change, LowRank]],
    *,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, EvalReport]:
    """Scores with the edited weights ("edited") and with the base and its adapter ("adapter").

    Args:
        adapter, tokenizer: the model, holding the base's or the edited weights; they are put back.
        facts: at least one.
        factors: changes and their factors.
        progress: called with (prompts done, all prompts) of both together.
    """

    def at(part: int) -> Callable[[int, int], None] | None:
        return None if progress is None else lambda done, total: progress(part * total + done, 2 * total)

    changes = [change for change, _ in factors]
    processes = adapter.processes
    with with_weights(adapter.model, {change.module: rounded(change) for change in changes}, processes):
        edited = evaluate(adapter.model, tokenizer, facts, adapter=adapter, progress=at(0))
    with (
        with_weights(adapter.model, {change.module: change.before() for change in changes}, processes),
        with_adapter(adapter.model, factors, processes),
    ):
        lora = evaluate(adapter.model, tokenizer, facts, adapter=adapter, progress=at(1))
    return {"edited": edited, "adapter": lora}


@contextmanager
def with_weights(model: nn.Module, weights: Mapping[str, Tensor], processes: OneProcess = ALONE) -> Iterator[None]:
    """Other weights for some modules inside, in the stored layout; the former ones come back bit for bit.

    Args:
        model: whose weights are exchanged.
        weights: by name of the module; of a model that lies on many processes the parts that are here.
        processes: those that hold the model.
    """
    modules = {name: model.get_submodule(name) for name in weights}
    saved = {name: processes.local(module).clone() for name, module in modules.items()}
    try:
        _copy(modules, weights, processes)
        yield
    finally:
        _copy(modules, saved, processes)


@contextmanager
def with_adapter(
    model: nn.Module, factors: Sequence[tuple[Change, LowRank]], processes: OneProcess = ALONE
) -> Iterator[None]:
    """y + B A x for the modules of an adapter inside, the product in the dtype of the factors as PEFT has it."""
    handles: list[RemovableHandle] = []
    try:
        for change, part in factors:
            module = model.get_submodule(change.module)
            device = processes.local(module).device
            left, right = part.left.to(device), part.right.to(device)
            handles.append(module.register_forward_hook(_adding(left, right, processes)))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _adding(
    left: Tensor, right: Tensor, processes: OneProcess
) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor]:
    def hook(_module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        x = processes.inputs(args[0], right.shape[1])
        return (output + x.to(right.dtype) @ right.T @ left.T).to(output.dtype)

    return hook


@torch.no_grad()
def _copy(modules: Mapping[str, nn.Module], values: Mapping[str, Tensor], processes: OneProcess) -> None:
    for name, module in modules.items():
        processes.local(module).copy_(values[name])  # FSDP2 may have it elsewhere after a forward pass
