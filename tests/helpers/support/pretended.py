"""A pretended GPU: tensors that say "cuda:0" and hold a CPU tensor, for a rehearsal of what runs on a lent one.

`pytest tests/ops --device cuda --pretend-cuda` runs on it, the back end "cuda" being the emulated kernels. It notices
what a GPU refuses and a CPU does not: a tensor handed to NumPy, tensors of both devices in one op, a generator of the
other device, a wait for the device where `set_sync_debug_mode` or a capture forbids it, and a captured graph that is
read before its replay (`pretended_cuda.py`).

It cannot show what only a GPU and CUDA's own libraries do: launches and their order on streams, memory, time, ops that
CUDA lacks or that are not deterministic there. `torch.compile` does not work on it: those tests are skipped.
"""

from __future__ import annotations

import functools
import itertools
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing

from rlsedit_kernels.ops import _register
from rlsedit_kernels.ops.schemas import NAMESPACE
from support import emulated

GPU = torch.device("cuda", 0)
GUARD = Path(__file__).with_name("pretended_guard.cpp")
MARK = 1 << 62
"""In the seed of a pretended generator: Python's object of a generator is lost on the way to an op."""

WAITS = {
    "_linalg_check_errors", "_local_scalar_dense", "_unique2", "equal", "is_nonzero", "masked_select", "nonzero",
}  # fmt: skip
"""Ops that read the device, apart from copies."""

COPIES = {"_to_copy", "copy_", "_copy_from"}
INDEXED = {"index", "index_put", "index_put_", "_index_put_impl_"}
"""Ops of which some arguments may be on the CPU."""


@dataclass
class State:
    """What the pretended device is doing."""

    debug: str = "default"
    recorded: list[Callable[[], None]] | None = None
    undo: list[Callable[[], None]] = field(default_factory=list)


STATE = State()


class Pretended(torch.Tensor):
    """A tensor on the pretended device.

    Attributes:
        inside: the CPU tensor with its values, strides and storage.
    """

    inside: torch.Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, inside: torch.Tensor) -> Pretended:
        assert not isinstance(inside, Pretended)
        self = torch.Tensor._make_wrapper_subclass(
            cls,
            inside.size(),
            strides=inside.stride(),
            storage_offset=inside.storage_offset(),
            dtype=inside.dtype,
            device=GPU,
        )
        self.inside = inside
        return self

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return dispatched(func, args, kwargs or {})

    def data_ptr(self) -> int:
        return self.inside.data_ptr()

    def untyped_storage(self) -> torch.UntypedStorage:
        return self.inside.untyped_storage()

    def __deepcopy__(self, memo: dict[int, Any]) -> Pretended:
        if id(self) not in memo:
            copied = self.detach().clone().requires_grad_(self.requires_grad)
            copied.__dict__.update({name: value for name, value in self.__dict__.items() if name != "inside"})
            memo[id(self)] = copied
        return memo[id(self)]

    def __format__(self, spec: str) -> str:
        return format(self.item() if self.dim() == 0 else repr(self), spec)

    def numpy(self, *, force: bool = False) -> Any:
        if force:
            return self.cpu().numpy()
        raise TypeError(
            "can't convert cuda:0 device type tensor to numpy. "
            "Use Tensor.cpu() to copy the tensor to host memory first."
        )

    def __repr__(self, **_: Any) -> str:
        return f"pretended {self.inside!r}"

    def tolist(self) -> Any:
        return self.cpu().tolist()


class Mode(TorchDispatchMode):
    """Sees every op, also those without a tensor among their arguments."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return dispatched(func, args, kwargs or {})


_modes: list[Mode] = []


def active() -> bool:
    """Whether tensors on "cuda" are pretended."""
    return bool(_modes)


def start() -> None:
    """Pretend from now on, in this thread."""
    torch._C._ensureCUDADeviceGuardSet()  # in a build with CUDA
    if not torch.backends.cuda.is_built():
        library = emulated.compile_for_cpu([GUARD], emulated.ROOT / "build" / "emulated" / "guard")
        torch.ops.load_library(str(library))
    torch._C._set_only_lift_cpu_tensors(True)
    _modes.append(Mode())
    _modes[-1].__enter__()


def unwrapped(tree: Any) -> Any:
    """What is inside, in tuples, lists and dicts too."""
    return pytree.tree_map_only(Pretended, lambda tensor: tensor.inside, tree)


def dispatched(func: Any, args: Any, kwargs: Any) -> Any:
    """One op: refused as a GPU would, or computed on what is inside."""
    given = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
    there = any(isinstance(tensor, Pretended) for tensor in given)
    asked = kwargs.get("device")
    target = torch.device(asked).type if asked is not None else "cuda" if there else "cpu"
    if not there and target != "cuda":
        return func(*args, **kwargs)
    name = func._schema.name.split("::")[1]
    if func.namespace == NAMESPACE:  # the router, which has to see the device; the mode is off in here
        with Mode():
            return _register._router(name)(*args, **kwargs)
    _check(func, name, args, kwargs, given, target)
    inner_args, inner_kwargs = unwrapped((args, kwargs))
    if target == "cuda" and asked is not None:
        inner_kwargs["device"] = torch.device("cpu")
    result = noted(lambda: func(*inner_args, **inner_kwargs), (inner_args, inner_kwargs), func._schema.is_mutable)
    if name == "linalg_cholesky_ex":  # cuSOLVER reports no NaN (pytorch issue 64818)
        result[1].masked_fill_(inner_args[0].isnan().flatten(-2).any(-1), 0)
    if target != "cuda" or (name == "copy_" and not isinstance(args[0], Pretended)):
        return args[0] if name == "copy_" else result
    known = {id(tensor.inside): tensor for tensor in given if isinstance(tensor, Pretended)}

    def wrap(made: torch.Tensor) -> torch.Tensor:
        if made.layout != torch.strided:  # sparse tensors are not pretended
            return made
        return known[id(made)] if id(made) in known else Pretended(made)

    wrapped = pytree.tree_map_only(torch.Tensor, wrap, result)
    if any(value.alias_info is not None for value in func._schema.returns):
        return return_and_correct_aliasing(func, args, kwargs, wrapped)
    return wrapped


def _check(func: Any, name: str, args: Any, kwargs: Any, given: list[torch.Tensor], target: str) -> None:
    """Raise what a GPU would."""
    here = [tensor for tensor in given if not isinstance(tensor, Pretended)]
    copies = name in COPIES and (target == "cpu" or bool(here))
    masks = name in INDEXED and any(index is not None and index.dtype == torch.bool for index in args[1])
    if name in WAITS or copies or masks:
        host_waits(name)
        if STATE.debug == "error":
            raise RuntimeError(f"called a synchronizing CUDA operation ({name})")
        if STATE.debug == "warn":
            warnings.warn(f"called a synchronizing CUDA operation ({name})", stacklevel=2)
    generator = kwargs.get("generator")
    if generator is not None and not generator.initial_seed() & MARK:
        raise RuntimeError("Expected a 'cuda' device type for generator but found 'cpu'")
    if name in COPIES:
        return
    if name in INDEXED:  # positions may come from the CPU
        mixed = not isinstance(args[0], Pretended)
    elif torch.Tag.pointwise in func.tags or name in ("where", "fill_", "masked_fill", "masked_fill_"):
        mixed = any(tensor.dim() > 0 for tensor in here)
    else:
        mixed = bool(here)
    if mixed:
        raise RuntimeError(
            f"Expected all tensors to be on the same device, but found at least two devices, cuda:0 and cpu! ({name})"
        )


def host_waits(what: str) -> None:
    """Refused within a capture."""
    if STATE.recorded is not None:
        raise RuntimeError(f"CUDA error: operation not permitted when stream is capturing ({what})")


def noted(call: Callable[[], Any], given: Any, mutable: bool) -> Any:
    """What `call` returns; while a graph is captured, also for its replay, and undone when the capture ends."""
    if STATE.recorded is None:
        return call()
    tensors = [leaf for leaf in pytree.tree_leaves(given) if isinstance(leaf, torch.Tensor)]
    places = {tensor.untyped_storage().data_ptr() for tensor in tensors}
    if mutable:
        STATE.undo.extend(functools.partial(tensor.copy_, tensor.clone()) for tensor in tensors)
    result = call()
    leaves = [leaf if isinstance(leaf, torch.Tensor) else None for leaf in pytree.tree_leaves(result)]
    fresh = [t is not None and t.untyped_storage().data_ptr() not in places for t in leaves]
    for tensor in itertools.compress(leaves, fresh):
        if tensor.is_floating_point():
            STATE.undo.append(functools.partial(tensor.fill_, float("nan")))

    def again() -> None:
        for tensor, value in itertools.compress(zip(leaves, pytree.tree_leaves(call()), strict=True), fresh):
            tensor.copy_(value)

    if any(fresh) or mutable:
        STATE.recorded.append(again)
    return result
