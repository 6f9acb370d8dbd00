"""`torch.cuda` of the pretended GPU: one device of compute capability 9.0 whose streams do at once what they are told.

A graph notes the ops of its capture and undoes what they did; a replay does them again, into the same tensors.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import torch
from torch._subclasses import fake_tensor

from rlsedit_kernels.backends import cuda, registry, triton
from support import emulated, pretended
from support.pretended import MARK, STATE, host_waits

NAME = "pretended GPU"
TRITON = (
    "Triton's kernels run on a pretended GPU under Triton's interpreter (TRITON_INTERPRET=1) or as PTX (--ptx) only"
)


class Generator(torch.Generator):
    """A generator of either device; one of the pretended GPU shows in its seed."""

    def __new__(cls, device: Any = "cpu") -> Generator:
        self = super().__new__(cls, "cpu")
        self.cuda = torch.device(device).type == "cuda"
        return self.manual_seed(0) if self.cuda else self

    def manual_seed(self, seed: int) -> Generator:
        super().manual_seed(seed | MARK if self.cuda else seed)
        return self

    @property
    def device(self) -> torch.device:
        return pretended.GPU if self.cuda else torch.device("cpu")


class Event:
    """The host's clock where the event is recorded."""

    def __init__(self, enable_timing: bool = False, **_: Any) -> None:
        self.timing, self.at = enable_timing, None

    def record(self, stream: Any = None) -> None:
        self.at = time.perf_counter()

    def synchronize(self) -> None:
        host_waits("event synchronize")

    def wait(self, stream: Any = None) -> None:
        pass

    def query(self) -> bool:
        return True

    def elapsed_time(self, other: Event) -> float:
        if self.at is None or other.at is None or not (self.timing and other.timing):
            raise RuntimeError("both events must be recorded, with enable_timing")
        return 1e3 * (other.at - self.at)


class Stream:
    """A stream; all of them are one."""

    def __init__(self, *_: Any, **__: Any) -> None:
        self.cuda_stream, self.device = 0, pretended.GPU

    def wait_stream(self, other: Stream) -> None:
        pass

    wait_event = wait_stream

    def record_event(self, event: Event | None = None) -> Event:
        event = event or Event()
        event.record()
        return event

    def synchronize(self) -> None:
        host_waits("stream synchronize")

    query = Event.query


class Graph:
    """What was done within `capture`, to be done again."""

    def __init__(self, *_: Any, **__: Any) -> None:
        self.ops: list[Any] | None = None

    def replay(self) -> None:
        if self.ops is None:
            raise RuntimeError("replay before a capture has ended")
        for op in self.ops:
            op()

    def reset(self) -> None:
        self.ops = None


@contextlib.contextmanager
def capture(graph: Graph, *_: Any, **__: Any) -> Iterator[None]:
    """`torch.cuda.graph`: nothing has happened when it ends."""
    STATE.recorded, STATE.undo = [], []
    try:
        yield
        graph.ops = STATE.recorded
    finally:
        STATE.recorded = None
        for undo in reversed(STATE.undo):
            undo()
        STATE.undo = []


@contextlib.contextmanager
def _nothing(*_: Any, **__: Any) -> Iterator[None]:
    yield


def _debug(mode: str | int) -> None:
    STATE.debug = ("default", "warn", "error")[mode] if isinstance(mode, int) else mode


def _patches() -> dict[tuple[Any, str], Any]:
    """What takes the place of what."""
    stream, memory = Stream(), SimpleNamespace(
        name=NAME, major=9, minor=0, multi_processor_count=132, total_memory=2**37, warp_size=32,
        shared_memory_per_block_optin=232_448, regs_per_multiprocessor=65_536, gcnArchName=NAME,
    )  # fmt: skip
    functions: dict[str, Any] = {
        "_lazy_init": lambda: None,
        "_sleep": lambda cycles: None,
        "init": lambda: None,
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "set_device": lambda device: None,
        "device": _nothing,
        "get_device_name": lambda device=None: NAME,
        "get_device_capability": lambda device=None: (9, 0),
        "get_device_properties": lambda device=None: memory,
        "synchronize": lambda device=None: host_waits("device synchronize"),
        "empty_cache": lambda: None,
        "get_rng_state": lambda device=None: torch.zeros(16, dtype=torch.uint8, device="cpu"),
        "set_rng_state": lambda state, device=None: None,
        "manual_seed": lambda seed: None,
        "manual_seed_all": lambda seed: None,
        "mem_get_info": lambda device=None: (2**37, 2**37),
        "Event": Event,
        "Stream": Stream,
        "current_stream": lambda device=None: stream,
        "default_stream": lambda device=None: stream,
        "stream": _nothing,
        "CUDAGraph": Graph,
        "graph": capture,
        "is_current_stream_capturing": lambda: STATE.recorded is not None,
        "set_sync_debug_mode": _debug,
        "get_sync_debug_mode": lambda: ("default", "warn", "error").index(STATE.debug),
    }
    for name in ("memory_reserved", "memory_allocated", "max_memory_allocated", "reset_peak_memory_stats"):
        functions[name] = lambda device=None: 0
    patches = {(torch.cuda, name): function for name, function in functions.items()}
    patches[fake_tensor, "init_gpu_context"] = lambda device: None
    return {**patches, (torch, "Generator"): Generator, (cuda, "load"): lambda: (True, "")}


def _table() -> tuple[registry.Backend, ...]:
    """The back ends, with the emulated kernels as those of the pretended GPU, and Triton's where it interprets."""
    kernels = registry.Loaded(cuda.kernels("CPU"))
    gpu, rows = frozenset({"cuda"}), []
    for row in registry._TABLE:
        if row.name == "cuda":
            row = replace(row, load=lambda: kernels)
        elif row.name == "triton" and (triton.interpreted() or emulated.uses_ptx()):
            row = replace(row, devices=gpu, automatic=True)
        elif row.name == "triton":
            row = replace(row, load=lambda: registry.Loaded(reason=TRITON))
        rows.append(row)
    return tuple(rows)


def _interpret_what_is_inside() -> None:
    from triton.runtime import interpreter

    launch = interpreter.GridExecutor.__call__

    def launched(self: Any, *args: Any, **kwargs: Any) -> Any:
        args, kwargs = pretended.unwrapped((args, kwargs))
        return pretended.noted(lambda: launch(self, *args, **kwargs), (args, kwargs), True)

    interpreter.GridExecutor.__call__ = launched


def install() -> None:
    """Pretend that there is a GPU, from now on and in this thread."""
    emulated.load()
    emulated._active.append(True)  # sizes for an emulator
    for (owner, name), value in _patches().items():
        setattr(owner, name, value)
    table = _table()
    registry._TABLE = table
    registry._BY_NAME.update({row.name: row for row in table})
    registry._loaded.cache_clear()
    if triton.interpreted():
        _interpret_what_is_inside()
    elif emulated.uses_ptx():
        from support.ptx import triton_driver

        triton_driver.install()
    # Where a module moves, its parameters become the pretended ones, tied ones together.
    torch.__future__.set_swap_module_params_on_conversion(True)
    with contextlib.suppress(ImportError):
        from rlsedit.models import quantised

        quantised._TYPES = (*quantised._TYPES, pretended.Pretended)
    pretended.start()
