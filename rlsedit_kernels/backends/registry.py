"""The registry of back ends and the rule by which one is taken.

Order of precedence: the context manager `use_backend`, then the environment variable `RLSEDIT_BACKEND`,
then the first available back end, in the order of the table below, that serves the device and has the op.
An automatic choice falls back silently; an explicit one that cannot be honoured raises with the reason.
"""

from __future__ import annotations

import contextlib
import contextvars
import logging
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache

from rlsedit_kernels.backends import triton

logger = logging.getLogger("rlsedit_kernels")

BACKEND_VARIABLE = "RLSEDIT_BACKEND"

Kernel = Callable[..., object]


class BackendUnavailableError(RuntimeError):
    """A back end was asked for by name and is not there; the text says why."""


@dataclass(frozen=True)
class Loaded:
    """What loading a back end gave: its kernels by op name, or the reason why there are none."""

    kernels: Mapping[str, Kernel] = field(default_factory=dict)
    reason: str = ""

    @property
    def available(self) -> bool:
        return bool(self.kernels)


@dataclass(frozen=True)
class Backend:
    """One provider of kernels: its name, the device types it serves ("*" for all) and its loader."""

    name: str
    devices: frozenset[str]
    load: Callable[[], Loaded]
    automatic: bool = True
    """Whether it is taken unasked: an interpreter of kernels is for checks, not for work."""

    def serves(self, device: str) -> bool:
        return "*" in self.devices or device in self.devices


@dataclass(frozen=True)
class BackendInfo:
    """One row of `backends()`: name, whether it can be used here, and the reason if it cannot."""

    name: str
    available: bool
    reason: str
    devices: tuple[str, ...]
    ops: tuple[str, ...]


def _load_cpu() -> Loaded:
    try:
        from rlsedit_kernels.backends import cpu
    except ImportError as error:  # a partial checkout; say so, do not fail the import of the package
        return Loaded(reason=f"the loader of the native CPU library cannot be imported: {error}")
    available, reason = cpu.load()
    return Loaded(cpu.kernels()) if available else Loaded(reason=reason)


def _load_cuda() -> Loaded:
    try:
        from rlsedit_kernels.backends import cuda
    except ImportError as error:
        return Loaded(reason=f"the loader of the CUDA library cannot be imported: {error}")
    available, reason = cuda.load()
    return Loaded(cuda.kernels()) if available else Loaded(reason=reason)


def _load_triton() -> Loaded:
    kernels, reason = triton.load()
    return Loaded(_enforced(kernels), reason)


def _load_torch() -> Loaded:
    from rlsedit_kernels.backends import fallback

    return Loaded(_enforced(fallback.kernels()))


def _enforced(kernels: Mapping[str, Kernel]) -> Mapping[str, Kernel]:
    """Kernels in Python, which check nothing themselves, behind what native ones check."""
    from rlsedit_kernels.ops.contract import enforced

    return {op: enforced(op, kernel) for op, kernel in kernels.items()}


# In order of preference. Only "torch" is always there: plain torch, on whatever device torch serves.
_TABLE: tuple[Backend, ...] = (
    Backend("cuda", frozenset({"cuda"}), _load_cuda),
    Backend("triton", triton.devices(), _load_triton, automatic=not triton.interpreted()),
    Backend("cpu", frozenset({"cpu"}), _load_cpu),
    Backend("torch", frozenset({"*"}), _load_torch),
)
_BY_NAME = {backend.name: backend for backend in _TABLE}
_forced: contextvars.ContextVar[str | None] = contextvars.ContextVar("rlsedit_backend", default=None)


@cache
def _loaded(name: str) -> Loaded:
    """Load a back end once; what is missing is logged once."""
    loaded = _BY_NAME[name].load()
    if not loaded.available:
        logger.info("back end %r is not available: %s", name, loaded.reason)
    return loaded


def _require(name: str, origin: str) -> Loaded:
    if name not in _BY_NAME:
        raise ValueError(f"{origin}: back end must be one of {', '.join(map(repr, _BY_NAME))}, got {name!r}")
    loaded = _loaded(name)
    if not loaded.available:
        raise BackendUnavailableError(f"{origin}: back end {name!r} is not available: {loaded.reason}")
    return loaded


def _explicit() -> tuple[str, str] | None:
    """The forced back end and what forced it, or None."""
    if (name := _forced.get()) is not None:
        return name, "use_backend"
    if name := os.environ.get(BACKEND_VARIABLE, ""):
        return name, BACKEND_VARIABLE
    return None


def kernel_for(op: str, device: str) -> Kernel:
    """The function that computes `op` for tensors of device type `device` under the present choice.

    Raises:
        BackendUnavailableError: an explicitly chosen back end is missing, does not serve the device, or
            lacks the op.
        ValueError: the chosen name is no back end.
    """
    explicit = _explicit()
    if explicit is None:
        for backend in _TABLE:
            if not (backend.automatic and backend.serves(device)):
                continue
            if op in (kernels := _loaded(backend.name).kernels):
                return kernels[op]
        raise BackendUnavailableError(f"{op}: no back end serves device type {device!r}")
    name, origin = explicit
    loaded = _require(name, origin)
    if not _BY_NAME[name].serves(device):
        served = ", ".join(sorted(_BY_NAME[name].devices))
        raise BackendUnavailableError(
            f"{origin}: back end {name!r} serves {served} tensors, {op} got a {device} tensor"
        )
    if op not in loaded.kernels:
        raise BackendUnavailableError(f"{origin}: back end {name!r} has no kernel for {op}")
    return loaded.kernels[op]


def active_backend(op: str, device: str = "cpu") -> str:
    """Name of the back end that `op` would run on for tensors of device type `device`."""
    kernel = kernel_for(op, device)
    return next(b.name for b in _TABLE if _loaded(b.name).kernels.get(op) is kernel)


def backends() -> list[BackendInfo]:
    """All back ends in order of preference: name, whether each is available here, and why not."""
    rows = []
    for backend in _TABLE:
        loaded = _loaded(backend.name)
        rows.append(
            BackendInfo(
                name=backend.name,
                available=loaded.available,
                reason=loaded.reason,
                devices=tuple(sorted(backend.devices)),
                ops=tuple(sorted(loaded.kernels)),
            )
        )
    return rows


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Force one back end for every op inside the `with` block (per thread and per asyncio task).

    Args:
        name: "cuda", "triton", "cpu" or "torch".

    Raises:
        ValueError: no such back end.
        BackendUnavailableError: it is not available here; the text gives the reason.
    """
    _require(name, "use_backend")
    token = _forced.set(name)
    try:
        yield
    finally:
        _forced.reset(token)
