"""What a state remembers of its stream besides the matrix."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class Counters:
    """Figures of the stream so far, as `health()` reports them.

    `careful_checked`, `worst_drift` and `repairs` are the guard's (`states/guard.py`), `largest_inner` is the largest
    squared norm of a key in the coordinates of the form, `forgot` whether any batch came with forgetting,
    `restrictions` those of the singular writes that `restrict` made.
    """

    steps: int = 0
    largest_key: float = 0.0
    smallest_pivot: float | None = None
    largest_leverage: float | None = None
    singular_writes: int = 0
    careful_steps: int = 0
    careful_checked: int = 0
    worst_drift: float = 0.0
    repairs: int = 0
    forgot: bool = False
    largest_inner: float = 0.0
    restrictions: int = 0
