"""Float64 NumPy/SciPy versions of every op and state, and the batch solution.

Independent of everything else in the package: nothing of ours is imported here.
"""

from rlsedit_kernels.reference.batch import batch_covariance, batch_objective, batch_precision, batch_solution
from rlsedit_kernels.reference.cholesky import cholesky
from rlsedit_kernels.reference.downdate_ import downdate_
from rlsedit_kernels.reference.downdate_gain_products_ import downdate_gain_products_
from rlsedit_kernels.reference.gain_products import gain_products
from rlsedit_kernels.reference.gain_solve import gain_solve
from rlsedit_kernels.reference.key_products import key_products
from rlsedit_kernels.reference.qr_append_ import qr_append_
from rlsedit_kernels.reference.qr_append_rhs_ import qr_append_rhs_
from rlsedit_kernels.reference.qr_gain import qr_gain
from rlsedit_kernels.reference.rls_filter import RLSFilter
from rlsedit_kernels.reference.rls_update_ import rls_update_
from rlsedit_kernels.reference.states import CovarianceState, SquareRootState
from rlsedit_kernels.reference.weight_update_ import weight_update_

__all__ = [
    "CovarianceState",
    "RLSFilter",
    "SquareRootState",
    "batch_covariance",
    "batch_objective",
    "batch_precision",
    "batch_solution",
    "cholesky",
    "downdate_",
    "downdate_gain_products_",
    "gain_products",
    "gain_solve",
    "key_products",
    "qr_append_",
    "qr_append_rhs_",
    "qr_gain",
    "rls_update_",
    "weight_update_",
]
