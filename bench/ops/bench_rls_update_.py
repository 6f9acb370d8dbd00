"""Benchmark of rls_update_: median time on each back end, with its error against float64."""

from __future__ import annotations

import rlsedit_kernels as rk


def test_rls_update_(benchmark, case, backend) -> None:
    C, K = case.covariance(), case.keys()
    before = C.double()
    gain, _ = rk.ops.rls_update_(C, K)
    exact = before @ K.double().mT
    defect = gain.double() + gain.double() @ (K.double() @ exact) - exact
    error = float(defect.norm() / exact.norm())
    benchmark.extra_info["relative_error"] = error
    benchmark.group = f"rls_update_ {case.name}"
    benchmark(rk.ops.rls_update_, C, K)
