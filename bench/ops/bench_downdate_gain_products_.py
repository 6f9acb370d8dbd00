"""Benchmark of downdate_gain_products_: median time on each back end, with its error against float64."""

from __future__ import annotations

import rlsedit_kernels as rk


def test_downdate_gain_products_(benchmark, case, backend) -> None:
    C, K = case.covariance(), case.keys()
    Z = K.mT.contiguous() * 1e-3
    exact = (C.double() - Z.double() @ Z.double().mT) @ K.double().mT
    Y, _ = rk.ops.downdate_gain_products_(C, Z, K)
    error = float((Y - exact).norm() / exact.norm())
    benchmark.extra_info["relative_error"] = error
    benchmark.group = f"downdate_gain_products_ {case.name}"
    benchmark(rk.ops.downdate_gain_products_, C, Z, K)
