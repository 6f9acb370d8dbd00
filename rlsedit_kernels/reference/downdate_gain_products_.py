"""Reference of downdate_gain_products_."""

from __future__ import annotations

from typing import Any

from rlsedit_kernels.reference.arrays import Array
from rlsedit_kernels.reference.downdate_ import downdate_
from rlsedit_kernels.reference.gain_products import gain_products


def downdate_gain_products_(C: Any, Z: Any, K: Any, alpha: float = -1.0) -> tuple[Array, Array, Array]:
    """The new C, and Y, G of the keys K with it."""
    C = downdate_(C, Z, alpha)
    return (C, *gain_products(C, K))
