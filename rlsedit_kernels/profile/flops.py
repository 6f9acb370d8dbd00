"""Floating-point operations of single torch calls, by formula.

A multiplication and an addition are two. Factorisations count as in Golub and Van Loan, "Matrix Computations": m x n
with n the smaller side, whichever comes first; vectors only where a call works them out.
"""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from typing import Any

import torch
from torch.utils.flop_counter import flop_registry

__all__ = ["flops_of", "known", "uncounted"]

Formula = Callable[..., float]
"""(first result, *positional arguments) -> operations in real arithmetic."""


def flops_of(name: str, func: Any, args: tuple, kwargs: dict, out: Any, *, values: bool = False) -> float:
    """Operations of a call; 0.0 for additions, copies and the like.

    Args:
        name: of the operator without its overload, such as "aten::mm".
        func: the operator.
        args, kwargs, out: what it was called with, and what it gave.
        values: eigenvalues or singular values are asked for without vectors.
    """
    first = out[0] if isinstance(out, (tuple, list)) and out else out
    if values and name in _VALUES:
        return _complex(args) * _VALUES[name](args[0])
    if name in _FLOPS:
        return _complex(args) * _FLOPS[name](first, *args, **_options(name, kwargs))
    packet = getattr(func, "_overloadpacket", None)
    if packet in flop_registry:  # convolutions and attention
        return float(flop_registry[packet](*args, **kwargs, out_val=out))
    return 0.0


def known(name: str) -> bool:
    """Whether a call of this name is counted as a whole, not by the calls that it is made of."""
    return name in _FLOPS


def uncounted(name: str, func: Any) -> bool:
    """Whether a call is work for which there is no formula, so that its 0.0 says nothing: foreign operators as well."""
    if name in _FLOPS or getattr(func, "_overloadpacket", None) in flop_registry:
        return False
    return not name.startswith(_OF_TORCH) or name.startswith(_UNCOUNTED)


def _complex(args: tuple) -> float:
    """A complex product and sum are eight operations in the place of two."""
    return 4.0 if isinstance(args[0], torch.Tensor) and args[0].is_complex() else 1.0


def _options(name: str, kwargs: dict) -> dict:
    """Keyword-only arguments that change the work."""
    return {"hermitian": kwargs.get("hermitian", False)} if name == "aten::linalg_pinv" else {}


def _batch(shape: torch.Size) -> int:
    return prod(shape[:-2])


def _sides(a: torch.Tensor) -> tuple[int, float, float]:
    """Matrices, longer side, shorter side."""
    n, m = sorted(a.shape[-2:])
    return _batch(a.shape), float(m), float(n)


def _product(out: torch.Tensor, a: torch.Tensor, _b: torch.Tensor, *_: Any) -> float:
    return 2.0 * out.numel() * a.shape[-1]


def _added_product(out: torch.Tensor, _c: torch.Tensor, a: torch.Tensor, b: torch.Tensor, *_: Any) -> float:
    return _product(out, a, b)


def _cubed(factor: float) -> Formula:
    """`factor` n^3 for square matrices."""
    return lambda _out, a, *_: factor * _batch(a.shape) * float(a.shape[-1]) ** 3


def _lu(_out: torch.Tensor, a: torch.Tensor, *_: Any) -> float:
    count, m, n = _sides(a)
    return count * (m * n * n - n**3 / 3.0)


def _solve(x: torch.Tensor, a: torch.Tensor, *_: Any) -> float:
    """An LU factorisation of each matrix and two triangular solves for each column of the result."""
    return _lu(x, a) + 2.0 * a.shape[-1] * x.numel()


def _householder(a: torch.Tensor) -> float:
    """R and the reflectors, without Q."""
    count, m, n = _sides(a)
    return count * (2.0 * m * n * n - 2.0 / 3.0 * n**3)


def _columns(rows: float, columns: float, reflectors: float) -> float:
    """The first columns of Q (rows, rows) from its reflectors."""
    k = reflectors
    return 4.0 * rows * columns * k - 2.0 * (rows + columns) * k * k + 4.0 / 3.0 * k**3


def _qr(q: torch.Tensor, a: torch.Tensor, mode: str = "reduced", *_: Any) -> float:
    if mode == "r":
        return _householder(a)
    return _householder(a) + _batch(a.shape) * _columns(q.shape[-2], q.shape[-1], min(a.shape[-2:]))


def _form_q(q: torch.Tensor, _a: torch.Tensor, tau: torch.Tensor, *_: Any) -> float:
    return _batch(q.shape) * _columns(q.shape[-2], q.shape[-1], tau.shape[-1])


def _apply_q(
    c: torch.Tensor, _a: torch.Tensor, tau: torch.Tensor, other: torch.Tensor, left: bool = True, *_: Any
) -> float:
    k = float(tau.shape[-1])
    rows, columns = (c.shape[-2], c.shape[-1]) if left else (c.shape[-1], c.shape[-2])
    return _batch(c.shape) * (4.0 * rows * columns * k - 2.0 * columns * k * k)


def _least_squares(x: torch.Tensor, a: torch.Tensor, *_: Any) -> float:
    """By a QR factorisation (LQ where there are more unknowns than equations), whichever driver is asked for."""
    count, m, n = _sides(a)
    columns = x.numel() / (max(1, count) * a.shape[-1])
    return _householder(a) + count * columns * (4.0 * m * n - 2.0 * n * n + n * n)


def _svd(_out: torch.Tensor, a: torch.Tensor, full_matrices: bool = False, compute_uv: bool = True, *_: Any) -> float:
    """By way of a QR factorisation."""
    if not compute_uv:
        return _singular_values(a)
    count, m, n = _sides(a)
    return count * (4.0 * m * m * n + 22.0 * n**3 if full_matrices and m > n else 6.0 * m * n * n + 20.0 * n**3)


def _singular_values(a: torch.Tensor) -> float:
    count, m, n = _sides(a)
    return count * (2.0 * m * n * n + 2.0 * n**3)


def _eigh(_out: torch.Tensor, a: torch.Tensor, _uplo: str = "L", compute_v: bool = True, *_: Any) -> float:
    return (9.0 if compute_v else 4.0 / 3.0) * _batch(a.shape) * float(a.shape[-1]) ** 3


def _pinv(_out: torch.Tensor, a: torch.Tensor, *_: Any, hermitian: bool = False) -> float:
    """From singular values (eigenvalues) and vectors, multiplied out."""
    count, m, n = _sides(a)
    return (_eigh(a, a) if hermitian else _svd(a, a)) + 2.0 * count * m * n * n


def _euclidean(out: torch.Tensor, a: torch.Tensor, *_: Any) -> float:
    """By a product of rows with two columns more."""
    return 2.0 * out.numel() * (a.shape[-1] + 2)


def _distances(out: torch.Tensor, a: torch.Tensor, b: torch.Tensor, p: float, mode: int | None = None) -> float:
    """A difference, a power and a sum a coordinate, unless they are Euclidean and many or asked for by a product."""
    if p == 2.0 and (mode == 1 or (mode != 2 and max(a.shape[-2], b.shape[-2]) > 25)):
        return _euclidean(out, a)
    return 3.0 * out.numel() * a.shape[-1]


def _attention(out: torch.Tensor, q: torch.Tensor, k: torch.Tensor, *_: Any) -> float:
    """Scores and their product with the values, whole also where they are masked."""
    return 2.0 * prod(q.shape[:-1]) * k.shape[-2] * (q.shape[-1] + out.shape[-1])


def _attention_backward(_out: Any, _grad: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *_: Any) -> float:
    """The scores again, and four products."""
    return 2.0 * prod(q.shape[:-1]) * k.shape[-2] * (3.0 * q.shape[-1] + 2.0 * v.shape[-1])


def _gain_products(_out: Any, C: torch.Tensor, K: torch.Tensor) -> float:
    d, u = C.shape[-1], K.shape[-2]
    return _batch(C.shape) * (2.0 * d * d * u + float(d) * u * u)


def _gain_solve(_out: Any, Y: torch.Tensor, *_: Any) -> float:
    d, u = Y.shape[-2], Y.shape[-1]
    return _batch(Y.shape) * (u**3 / 3.0 + 2.0 * d * u * u)


def _downdate(_out: Any, C: torch.Tensor, Z: torch.Tensor, *_: Any) -> float:
    return _batch(C.shape) * float(C.shape[-1]) ** 2 * Z.shape[-1]


def _rls_update(_out: Any, C: torch.Tensor, K: torch.Tensor, *_: Any) -> float:
    return _gain_products(None, C, K) + _gain_solve(None, K.mT) + _downdate(None, C, K.mT)


def _weight_update(_out: Any, W: torch.Tensor, K: torch.Tensor, *_: Any) -> float:
    return 4.0 * K.numel() * W.shape[-1]


def _qr_append(_out: Any, R: torch.Tensor, K: torch.Tensor, *_: Any) -> float:
    return 2.0 * _batch(R.shape) * float(R.shape[-1]) ** 2 * K.shape[-2]


def _qr_append_rhs(_out: Any, R: torch.Tensor, B: torch.Tensor, K: torch.Tensor, *_: Any) -> float:
    return _qr_append(None, R, K) + _batch(R.shape) * 4.0 * R.shape[-1] * K.shape[-2] * B.shape[-1]


_OF_TORCH = ("aten::", "prim::", "prims::", "profiler::", "rlsedit_kernels::")
# The work of a matrix exponential depends on the values; of the others nobody has asked for a formula yet.
_UNCOUNTED = (
    "aten::linalg_matrix_exp", "aten::_trilinear", "aten::_fft_", "aten::_sparse_", "aten::_cslt_", "aten::_grouped_mm",
    "aten::_scaled_", "aten::_efficient_attention", "aten::_flash_attention", "aten::_weight_int", "aten::conv_tbc",
    "aten::mkldnn_", "aten::_thnn_", "aten::_cudnn_rnn", "aten::miopen_", "aten::_cdist_backward", "aten::_pdist_",
    "aten::_embedding_bag", "aten::_native_multi_head", "aten::_transformer_encoder", "aten::quantized_",
    "aten::fbgemm_",
)  # fmt: skip

# By name without its overload. What is not here counts its bytes alone: it is additions, copies and the like, or
# `uncounted`.
_FLOPS: dict[str, Formula] = {
    "aten::mm": _product,
    "aten::bmm": _product,
    "mkldnn::_linear_pointwise": _product,
    "aten::mv": lambda _out, a, *_: 2.0 * a.numel(),
    "aten::addmv": lambda _out, _c, a, *_: 2.0 * a.numel(),
    "aten::addmv_": lambda _out, _c, a, *_: 2.0 * a.numel(),
    "aten::addr": lambda out, *_: 2.0 * out.numel(),
    "aten::addr_": lambda out, *_: 2.0 * out.numel(),
    "aten::dot": lambda _out, a, *_: 2.0 * a.numel(),
    "aten::vdot": lambda _out, a, *_: 2.0 * a.numel(),
    "aten::addmm": _added_product,
    "aten::addmm_": _added_product,
    "aten::baddbmm": _added_product,
    "aten::baddbmm_": _added_product,
    "aten::addbmm": lambda _out, _c, a, b, *_: 2.0 * a.numel() * b.shape[-1],
    "aten::addbmm_": lambda _out, _c, a, b, *_: 2.0 * a.numel() * b.shape[-1],
    "aten::_addmm_activation": _added_product,
    "aten::_int_mm": _product,
    "aten::_cdist_forward": _distances,
    "aten::_euclidean_dist": _euclidean,
    "aten::_scaled_dot_product_flash_attention_for_cpu": _attention,
    "aten::_scaled_dot_product_flash_attention_for_cpu_backward": _attention_backward,
    "aten::_linalg_solve_ex": _solve,
    "aten::linalg_lu_factor_ex": _lu,
    "aten::linalg_lu": _lu,
    "aten::linalg_lu_solve": lambda x, a, *_: 2.0 * a.shape[-1] * x.numel(),
    "aten::_linalg_det": _lu,
    "aten::_linalg_slogdet": _lu,
    "aten::linalg_inv_ex": _cubed(2.0),
    "aten::linalg_cholesky_ex": _cubed(1.0 / 3.0),
    "aten::cholesky": _cubed(1.0 / 3.0),
    "aten::cholesky_inverse": _cubed(2.0 / 3.0),
    "aten::cholesky_solve": lambda x, _b, a, *_: 2.0 * a.shape[-1] * x.numel(),
    "aten::linalg_ldl_factor_ex": _cubed(1.0 / 3.0),
    "aten::linalg_ldl_solve": lambda x, a, *_: 2.0 * a.shape[-1] * x.numel(),
    "aten::linalg_solve_triangular": lambda x, a, *_: float(a.shape[-1]) * x.numel(),
    "aten::triangular_solve": lambda x, _b, a, *_: float(a.shape[-1]) * x.numel(),
    "aten::geqrf": lambda _out, a, *_: _householder(a),
    "aten::linalg_qr": _qr,
    "aten::linalg_householder_product": _form_q,
    "aten::ormqr": _apply_q,
    "aten::linalg_lstsq": _least_squares,
    "aten::_linalg_svd": _svd,
    "aten::_linalg_eigh": _eigh,
    "aten::linalg_eig": _cubed(25.0),
    "aten::_linalg_eigvals": _cubed(10.0),
    "aten::linalg_pinv": _pinv,
    "rlsedit_kernels::gain_products": _gain_products,
    "rlsedit_kernels::key_products": lambda out, _A, K, *_: 2.0 * out.numel() * K.shape[-1],
    "rlsedit_kernels::cholesky": _cubed(1.0 / 3.0),
    "rlsedit_kernels::gain_solve": _gain_solve,
    "rlsedit_kernels::downdate_": _downdate,
    "rlsedit_kernels::downdate_gain_products_": lambda out, C, Z, K, *_: (
        _downdate(out, C, Z) + _gain_products(out, C, K)
    ),
    "rlsedit_kernels::rls_update_": _rls_update,
    "rlsedit_kernels::weight_update_": _weight_update,
    "rlsedit_kernels_cpu::add_product_": lambda _out, A, left, *_: 2.0 * A.numel() * left.shape[-1],
    "rlsedit_kernels::qr_append_": _qr_append,
    "rlsedit_kernels::qr_append_rhs_": _qr_append_rhs,
    "rlsedit_kernels::qr_gain": _qr_append,  # two triangular solves
}

_VALUES: dict[str, Callable[[torch.Tensor], float]] = {
    "aten::_linalg_svd": _singular_values,
    "aten::_linalg_eigh": lambda a: _eigh(a, a, "L", False),
    "aten::linalg_eig": lambda a: _cubed(10.0)(a, a),
}
