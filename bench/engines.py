"""The engines of the native CPU library beside each other: baseline, AVX2, AVX-512, and plain torch.

A process has one engine, chosen when it starts, so each measurement is a process of its own and the engines take turns.
Time: the median over rounds of the fastest call of each; the ratio is that to the first engine, likewise. Error: of all
that an op returns or changes, relative, against plain torch in float64.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from typing import Any

import torch
from cases import Case
from harness import arguments, report

import rlsedit_kernels as rk

ENGINES = ("avx512", "avx2", "baseline", "torch")
OPS = ("gain_products", "downdate_", "rls_update_", "key_products", "weight_update_", "qr_append_", "qr_gain")


def given(op: str, case: Case, dtype: torch.dtype) -> list[torch.Tensor]:
    """Fresh arguments of an op."""
    C, R, K, W = case.covariance(), case.triangular(), case.keys(), case.randn(case.d, case.d)
    gain = 1e-3 * case.randn(case.d, case.u)
    found = {
        "gain_products": (C, K),
        "downdate_": (C, gain),
        "rls_update_": (C, K),
        "key_products": (W, K),
        "weight_update_": (W, K, case.randn(case.u, case.d), gain),
        "qr_append_": (R, K),
        "qr_gain": (R, K),
    }[op]
    return [A.to(dtype) for A in found]


def outcome(op: str, arguments: list[torch.Tensor]) -> list[torch.Tensor]:
    """What an op returns, and its arguments as it leaves them."""
    returned = getattr(rk.ops, op)(*arguments)
    outputs = returned if isinstance(returned, tuple) else (returned,)
    return [A for A in (*outputs, *arguments) if A.is_floating_point()]


def measured(case: Case, calls: int, exact: bool) -> dict[str, dict[str, float]]:
    """Milliseconds and errors by op, in this process."""
    found = {}
    for op in OPS:
        arguments, seconds = given(op, case, torch.float32), []
        for _ in range(calls + 1):
            begin = time.perf_counter()
            getattr(rk.ops, op)(*arguments)
            seconds.append(time.perf_counter() - begin)
        found[op] = {"ms": 1e3 * min(seconds[1:])}
        if exact:
            mine = outcome(op, given(op, case, torch.float32))
            with rk.use_backend("torch"):
                true = outcome(op, given(op, case, torch.float64))
            errors = [float((a.double() - b).norm() / b.norm()) for a, b in zip(mine, true, strict=True)]
            found[op]["error"] = max(errors)
    return found


def child(engine: str, case: Case, calls: int, exact: bool) -> dict[str, Any] | None:
    """`measured` by an engine in a process of its own; None where this processor lacks it."""
    environment = {**os.environ, "RLSEDIT_BACKEND": "torch" if engine == "torch" else "cpu"}
    if engine != "torch":
        environment["RLSEDIT_CPU_ENGINE"] = engine
    command = [sys.executable, __file__, "--one", json.dumps([case.d, case.u, calls, exact])]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    found = json.loads(done.stdout)
    return found["ops"] if engine in ("torch", found["engine"]) else None


def main() -> None:
    parser = arguments((__doc__ or "").splitlines()[0])
    parser.add_argument("--d", type=int, default=4096)
    parser.add_argument("--u", type=int, nargs="+", default=[100, 1])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--calls", type=int, default=5, help="of each op in a process")
    parser.add_argument("--one", type=json.loads, help="for the processes that this one starts")
    options = parser.parse_args()
    if options.one is not None:
        d, u, calls, exact = options.one
        engine = rk.build_info()["float32"]["in_use"]["name"]
        json.dump({"engine": engine, "ops": measured(Case("", d, u), calls, exact)}, sys.stdout)
        return
    rows = []
    for u in options.u:
        case = Case("", options.d, u)
        found: dict[str, list[dict[str, dict[str, float]]]] = {engine: [] for engine in ENGINES}
        for i in range(options.rounds):
            for engine in ENGINES:
                if (one := child(engine, case, options.calls, i == 0)) is not None:
                    found[engine].append(one)
        first = next(runs for runs in found.values() if runs)
        for op in OPS:
            for engine, runs in found.items():
                if runs:
                    ratios = [one[op]["ms"] / base[op]["ms"] for one, base in zip(runs, first, strict=True)]
                    rows.append(
                        {
                            "op": op,
                            "u": u,
                            "engine": engine,
                            "ms": statistics.median(one[op]["ms"] for one in runs),
                            "ratio": statistics.median(ratios),
                            "error": runs[0][op]["error"],
                        }
                    )
    report("engines", {"d": options.d, "rounds": options.rounds, "calls": options.calls}, rows, options.json)


if __name__ == "__main__":
    main()
