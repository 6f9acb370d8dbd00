"""States: what is known of the keys so far, in the forms that survive working precision."""

from rlsedit_kernels.states.covariance import CovarianceState
from rlsedit_kernels.states.forms import FORMS
from rlsedit_kernels.states.health import Health
from rlsedit_kernels.states.square_root import SquareRootState

__all__ = ["FORMS", "CovarianceState", "Health", "SquareRootState"]
