"""The ops in Triton: the portable GPU back end, one file an op, and what others read and change first.

Every function here takes what the op of its name takes, and `input_precision`: how products of float32 are formed,
"ieee", "tf32x3" (the default where the tensor cores have it) or "tf32" (a single pass: breaks a recurrence within tens
of batches, docs/mathematics.md; for measurements only). Importing this package imports triton.
"""

from collections.abc import Callable

from rlsedit_kernels.triton_kernels.cholesky import cholesky
from rlsedit_kernels.triton_kernels.downdate_ import downdate_
from rlsedit_kernels.triton_kernels.downdate_gain_products_ import downdate_gain_products_
from rlsedit_kernels.triton_kernels.gain_products import gain_products
from rlsedit_kernels.triton_kernels.gain_solve import gain_solve
from rlsedit_kernels.triton_kernels.key_products import key_products
from rlsedit_kernels.triton_kernels.qr_append_ import qr_append_
from rlsedit_kernels.triton_kernels.qr_append_rhs_ import qr_append_rhs_
from rlsedit_kernels.triton_kernels.qr_gain import qr_gain
from rlsedit_kernels.triton_kernels.rls_update_ import rls_update_
from rlsedit_kernels.triton_kernels.weight_update_ import weight_update_

KERNELS: dict[str, Callable[..., object]] = {
    "gain_products": gain_products,
    "key_products": key_products,
    "cholesky": cholesky,
    "gain_solve": gain_solve,
    "downdate_": downdate_,
    "downdate_gain_products_": downdate_gain_products_,
    "rls_update_": rls_update_,
    "weight_update_": weight_update_,
    "qr_append_": qr_append_,
    "qr_append_rhs_": qr_append_rhs_,
    "qr_gain": qr_gain,
}
"""By op name: every op of the schema table."""

__all__ = ["KERNELS", *KERNELS]
