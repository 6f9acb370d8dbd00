"""Benchmark of weight_update_ with d targets: median time on each back end, with its error against float64."""

from __future__ import annotations

import rlsedit_kernels as rk


def test_weight_update_(benchmark, case, backend) -> None:
    W, K = case.randn(case.d, case.d), case.keys()
    V, gain = case.randn(case.u, case.d), 1e-3 * case.randn(case.d, case.u)
    exact = W.double() + gain.double() @ (V.double() - K.double() @ W.double())
    rk.ops.weight_update_(W, K, V, gain)
    benchmark.extra_info["relative_error"] = float((W - exact).norm() / exact.norm())
    benchmark.group = f"weight_update_ {case.name}"
    benchmark(rk.ops.weight_update_, W, K, V, 1e-3 * gain)
