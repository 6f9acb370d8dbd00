"""One state over many processes: rows of a state on the ranks of a `DeviceMesh`."""

from rlsedit_kernels.distributed import checkpoint
from rlsedit_kernels.distributed.bank import StateBank
from rlsedit_kernels.distributed.bank_routing import Routed, route
from rlsedit_kernels.distributed.covariance import ShardedCovarianceState
from rlsedit_kernels.distributed.filter import ShardedRLSFilter
from rlsedit_kernels.distributed.placement import Placement, place
from rlsedit_kernels.distributed.ranks import Ranks, bounds
from rlsedit_kernels.distributed.square_root import ShardedSquareRootState

__all__ = [
    "Placement",
    "Ranks",
    "Routed",
    "ShardedCovarianceState",
    "ShardedRLSFilter",
    "ShardedSquareRootState",
    "StateBank",
    "bounds",
    "checkpoint",
    "place",
    "route",
]
