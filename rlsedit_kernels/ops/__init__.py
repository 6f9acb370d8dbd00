"""The ops with checks and docstrings; `torch.ops.rlsedit_kernels.<name>` are the same without the checks."""

from rlsedit_kernels.ops.cholesky import cholesky
from rlsedit_kernels.ops.downdate_ import downdate_
from rlsedit_kernels.ops.downdate_gain_products_ import downdate_gain_products_
from rlsedit_kernels.ops.gain_products import gain_products
from rlsedit_kernels.ops.gain_solve import gain_solve
from rlsedit_kernels.ops.qr_append_ import qr_append_
from rlsedit_kernels.ops.qr_append_rhs_ import qr_append_rhs_
from rlsedit_kernels.ops.qr_gain import qr_gain
from rlsedit_kernels.ops.rls_update_ import rls_update_
from rlsedit_kernels.ops.schemas import SCHEMAS
from rlsedit_kernels.ops.weight_update_ import weight_update_

__all__ = [
    "SCHEMAS",
    "cholesky",
    "downdate_",
    "downdate_gain_products_",
    "gain_products",
    "gain_solve",
    "qr_append_",
    "qr_append_rhs_",
    "qr_gain",
    "rls_update_",
    "weight_update_",
]
