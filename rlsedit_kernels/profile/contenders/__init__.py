"""Who is measured: this package in each form and back end, and the published sequences."""

from rlsedit_kernels.profile.contenders.catalogue import BASELINE, catalogue, named
from rlsedit_kernels.profile.contenders.contender import Contender, Step

__all__ = ["BASELINE", "Contender", "Step", "catalogue", "named"]
