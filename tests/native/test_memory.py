"""Too little memory, at every place where the native CPU library asks for some: nothing is written, and a MemoryError.

What is asked for is counted, and refused once, by a library that is loaded before all others.
"""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support.kernel_cases import arguments

from rlsedit_kernels.backends import cpu
from rlsedit_kernels.ops.schemas import SCHEMAS, is_in_place

available, reason = cpu.load()
compiler = shutil.which(os.environ.get("CC", "cc"))
pytestmark = [
    pytest.mark.skipif(not available, reason=f"the native CPU library is not here: {reason}"),
    pytest.mark.skipif(compiler is None or sys.platform != "linux", reason="no C compiler, or no LD_PRELOAD"),
]

SOURCE = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <stdatomic.h>
#include <stdlib.h>
static atomic_long left = -1;
void refuse(long which) { left = which; }
long refused(void) { return atomic_exchange(&left, -1) == -1; }
int posix_memalign(void** p, size_t alignment, size_t size) {
  int (*real)(void**, size_t, size_t) = dlsym(RTLD_NEXT, "posix_memalign");
  if (left >= 0 && left-- == 0) return ENOMEM;
  return real(p, alignment, size);
}
"""
CASES = (((), 200, 20), ((), 60, 300), ((3,), 20, 5), ((2,), 200, 110))
"""Batch, d and u: elements one after the other and side by side, one block of columns and two, rows in two parts."""


def trial(library: str) -> dict[str, object]:
    """What is left changed, and what is raised, in a process in which memory can be refused."""
    memory = ctypes.CDLL(library)
    refusals, changed, errors = 0, [], set()
    for threads in (1, 2):
        torch.set_num_threads(threads)
        for batch, d, u in CASES:
            for op in (*filter(is_in_place, SCHEMAS), *cpu.HELPERS):
                given = arguments(op, torch.float32, batch, d, u)
                before = [a.clone() if isinstance(a, torch.Tensor) else a for a in given]
                for which in range(1000):
                    memory.refuse(ctypes.c_long(which))
                    try:
                        getattr(torch.ops.rlsedit_kernels_cpu, op)(*given)
                    except (MemoryError, RuntimeError) as error:
                        errors.add("of torch" if "new_empty" in str(error) else type(error).__name__)  # for a result
                    if not memory.refused():
                        break
                    refusals += 1
                    if not all(torch.equal(a, b) for a, b in zip(given, before, strict=True) if torch.is_tensor(a)):
                        changed.append([op, threads, batch, d, u, which])
                        break
                memory.refuse(ctypes.c_long(-1))
    return {"refusals": refusals, "changed": changed, "errors": sorted(errors)}


def test_an_op_takes_all_its_memory_before_it_writes(tmp_path: Path) -> None:
    source, library = tmp_path / "memory.c", tmp_path / "memory.so"
    source.write_text(SOURCE, encoding="utf-8")
    subprocess.run([str(compiler), "-shared", "-fPIC", "-o", str(library), str(source), "-ldl"], check=True)
    helpers = str(Path(__file__).resolve().parents[1] / "helpers")
    code = (
        f"import sys, json; sys.path[:0] = [{helpers!r}, {str(Path(__file__).parent)!r}];"
        f"import test_memory; json.dump(test_memory.trial({str(library)!r}), sys.stdout)"
    )
    environment = {**os.environ, "LD_PRELOAD": str(library)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout)
    assert found["refusals"] > 200
    assert not found["changed"]
    assert set(found["errors"]) <= {"MemoryError", "of torch"}
