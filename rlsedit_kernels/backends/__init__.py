"""Back ends: who computes an op, how one is chosen, and how to force one."""

from rlsedit_kernels.backends.info import build_info
from rlsedit_kernels.backends.registry import (
    BACKEND_VARIABLE,
    BackendInfo,
    BackendUnavailableError,
    active_backend,
    backends,
    kernel_for,
    use_backend,
)

__all__ = [
    "BACKEND_VARIABLE",
    "BackendInfo",
    "BackendUnavailableError",
    "active_backend",
    "backends",
    "build_info",
    "kernel_for",
    "use_backend",
]
