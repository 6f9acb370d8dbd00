"""Benchmark of downdate_: median time on each back end, with its error against float64."""

from __future__ import annotations

import rlsedit_kernels as rk


def test_downdate_(benchmark, case, backend) -> None:
    C, Z = case.covariance(), case.keys().mT.contiguous() * 1e-3
    exact = C.double() - Z.double() @ Z.double().mT
    error = float((rk.ops.downdate_(C, Z) - exact).norm() / exact.norm())
    benchmark.extra_info["relative_error"] = error
    benchmark.group = f"downdate_ {case.name}"
    benchmark(rk.ops.downdate_, C, Z)
