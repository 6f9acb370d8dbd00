"""States: the covariance of the recursion in the forms that survive working precision."""

from rlsedit_kernels.states.covariance import FORMS, CovarianceState
from rlsedit_kernels.states.health import Health

__all__ = ["FORMS", "CovarianceState", "Health"]
