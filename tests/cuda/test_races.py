"""No kernel has two accesses to the same memory that nothing orders; and ThreadSanitizer would say so."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from support import emulated, races

SMALL = """
import ctypes, sys
import numpy as np
library = ctypes.CDLL(sys.argv[1])
out, given, counters = np.zeros(64, np.float32), np.arange(64, dtype=np.float32), np.zeros(64, np.uint32)
arrays = {"out": out, "given": given, "counters": counters}
words = [ctypes.c_void_p(arrays[word].ctypes.data) if word in arrays else int(word) for word in sys.argv[3:]]
getattr(library, sys.argv[2])(*words)
print(*out)
"""


@pytest.fixture(scope="module")
def small() -> Any:
    """The races that a small kernel of emulator.cpp has, and what it wrote."""
    source = Path(__file__).with_name("emulator.cpp")
    target = emulated.ROOT / "build" / "emulated" / "emulator_races"
    try:
        races.runtime()
        library = emulated.compile_for_cpu([source], target, with_torch=False, races=True)
        races.watched(["-c", "pass"])
    except emulated.CannotEmulate as error:
        pytest.skip(f"races of CUDA kernels: {error}")
    return lambda *words: races.watched(["-c", SMALL, str(library), *map(str, words)])


@pytest.mark.parametrize(
    ("kernel", "ordered", "not_ordered"),
    [
        ("neighbour", ["out", 1], ["out", 0]),
        ("lanes", ["out", 0], ["out", 1]),
        ("lanes", ["out", 0], ["out", 2]),
        ("borrowed", ["given", "out", 1], ["given", "out", 0]),
        ("chained", ["counters", "out", 9, 1, 1], ["counters", "out", 9, 1, 0]),
    ],
    ids=["barrier", "shuffle", "warp", "copy", "blocks"],
)
def test_what_nothing_orders_is_found(kernel, ordered, not_ordered, small) -> None:
    """Also where the emulator's own order happens to give the right result."""
    right, none = small(kernel, *ordered)
    assert none == []
    result, found = small(kernel, *not_ordered)
    assert found
    assert all("emulator.cpp" in races.brief(race) for race in found)
    if kernel == "chained" or (kernel, not_ordered[-1]) == ("lanes", 1):
        assert result == right


@pytest.mark.parametrize("half", [0, 1])
def test_no_kernel_has_a_race(half, small) -> None:
    """In two processes: under ThreadSanitizer the imports take as long as an op."""
    ops = list(races.SIZES)[half::2]
    output, found = races.found_in(ops)
    assert not found, "\n\n".join(dict.fromkeys(map(races.brief, found)))
    lines = [line.split() for line in output.splitlines()]
    assert [line[0] for line in lines] == [op for op in ops for _ in races.cases(op)]
    assert all(int(line[-1]) >= 2 for line in lines)


@pytest.mark.parametrize(("op", "source"), [("downdate_", "downdate_.cu"), ("qr_gain", "dataflow.h")])
def test_a_barrier_that_orders_nothing_is_found(op, source, small, monkeypatch) -> None:
    """The last barrier of a source, passed together but without an order: what follows it races."""
    text = (emulated.SOURCES / source).read_text().splitlines()
    line = max(number for number, code in enumerate(text, 1) if re.match(r" *__syncthreads\(\)", code))
    monkeypatch.setenv("RLSEDIT_UNORDERED", f"{source}:{line}")
    _, found = races.found_in([op])
    assert found
