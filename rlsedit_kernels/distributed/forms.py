"""Forms of a sharded covariance by name."""

from __future__ import annotations

from typing import Any

from rlsedit_kernels.distributed.inverse_root import InverseRootRows
from rlsedit_kernels.distributed.plain import PlainRows
from rlsedit_kernels.distributed.whitened import WhitenedRows

__all__ = ["FORM_CLASSES"]

FORM_CLASSES: dict[str, Any] = {form.name: form for form in (PlainRows, WhitenedRows, InverseRootRows)}
