"""Benchmark of key_products with d columns: median time on each back end, with its error against float64."""

from __future__ import annotations

import rlsedit_kernels as rk


def test_key_products(benchmark, case, backend) -> None:
    A, K = case.randn(case.d, case.d), case.keys()
    exact = K.double() @ A.double()
    benchmark.extra_info["relative_error"] = float((rk.ops.key_products(A, K) - exact).norm() / exact.norm())
    benchmark.group = f"key_products {case.name}"
    benchmark(rk.ops.key_products, A, K)
