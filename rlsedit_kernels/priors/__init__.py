"""Priors: what the recursion knows before the first batch, factored once in float64."""

from rlsedit_kernels.priors.factor import PriorFactor
from rlsedit_kernels.priors.prior import Prior

__all__ = ["Prior", "PriorFactor"]
