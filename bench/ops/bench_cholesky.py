"""Benchmark of cholesky: median time on each back end, with its error against float64."""

from __future__ import annotations

import rlsedit_kernels as rk


def test_cholesky(benchmark, case, backend) -> None:
    A = rk.ops.gain_products(case.covariance(), case.keys())[1]
    A.diagonal(dim1=-2, dim2=-1).add_(1.0)
    L = rk.ops.cholesky(A)[0].double()
    error = float((L @ L.mT - A).norm() / A.norm())
    benchmark.extra_info["relative_error"] = error
    benchmark.group = f"cholesky {case.name}"
    benchmark(rk.ops.cholesky, A)
