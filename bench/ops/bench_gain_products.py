"""Benchmark of gain_products: median time on each back end, with its error against float64."""

from __future__ import annotations

import rlsedit_kernels as rk


def test_gain_products(benchmark, case, backend) -> None:
    C, K = case.covariance(), case.keys()
    Y, _ = rk.ops.gain_products(C, K)
    exact = C.double() @ K.double().mT
    error = float((Y - exact).norm() / exact.norm())
    benchmark.extra_info["relative_error"] = error
    benchmark.group = f"gain_products {case.name}"
    benchmark(rk.ops.gain_products, C, K)
