"""Benchmark of gain_solve: median time on each back end, with its error against float64."""

from __future__ import annotations

import rlsedit_kernels as rk


def test_gain_solve(benchmark, case, backend) -> None:
    Y, G = rk.ops.gain_products(case.covariance(), case.keys())
    gain = rk.ops.gain_solve(Y, G, 1.0)[0].double()
    error = float((gain @ G.double() + gain - Y).norm() / Y.norm())
    benchmark.extra_info["relative_error"] = error
    benchmark.group = f"gain_solve {case.name}"
    benchmark(rk.ops.gain_solve, Y, G, 1.0)
