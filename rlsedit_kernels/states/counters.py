"""What a state remembers of its stream besides the matrix."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any


def weighted(largest: float, noise: float) -> float:
    """|k|^2 / noise, as a key enters S; |k|^2 of a hard write, which leaves nothing of C in its direction to round."""
    return largest / noise if noise > 0.0 else largest


@dataclass
class Counters:
    """Figures of the stream so far, as `health()` reports them.

    `careful_checked`, `worst_drift`, `repairs` and `again` are the guard's (`states/guard.py`), the last the steps from
    which on drift alone is cured by another rebuild. `largest_key` is the largest squared norm of a key,
    `largest_inner` the same in the coordinates of the form, `largest_weighted` the largest that `weighted` has given,
    `forgot` whether any batch came with forgetting, `restrictions` those of the singular writes that `restrict` made,
    `unheld` those of the hard writes that are kept by the covariance alone (`states/held.py`).
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
    largest_weighted: float = 0.0
    unheld: int = 0
    again: int = 0

    def __post_init__(self) -> None:
        self.largest_weighted = self.largest_weighted or self.largest_key  # saved by an earlier version

    @classmethod
    def restored(cls, saved: Mapping[str, Any]) -> Counters:
        """Those of which `asdict` was saved, by this version or an earlier one, which took back more than was written.

        Raises:
            ValueError: a name that is not known, or a value that is no such figure.
        """
        known = asdict(cls())
        for name, value in saved.items():
            if name not in known:
                raise ValueError(f"load_state_dict: counters have no {name!r}")
            usual = known[name]
            if isinstance(usual, bool):
                fits = isinstance(value, bool)
            elif isinstance(usual, int):
                fits = isinstance(value, int) and not isinstance(value, bool) and (value >= 0 or name == "steps")
            else:
                number = isinstance(value, (int, float)) and not isinstance(value, bool)
                fits = not math.isnan(value) if number else value is None and usual is None
            if not fits:
                raise ValueError(f"load_state_dict: the counter {name} cannot be {value!r}")
        return cls(**saved)

    def see(self, largest: float, noise: float) -> None:
        """Keys whose longest has this squared norm."""
        self.largest_key = max(self.largest_key, largest)
        self.largest_weighted = max(self.largest_weighted, weighted(largest, noise))

    def moved(self, before: object, after: object, largest: float) -> None:
        """The form has given way to another: its coordinates may be others, in which old keys can only be bounded.

        Args:
            before, after: the forms.
            largest: eigenvalue of C_0, by which |k T|^2 <= largest |k|^2.
        """
        if getattr(before, "maps", False) != getattr(after, "maps", False):
            self.largest_inner = self.largest_key * (largest if getattr(after, "maps", False) else 1.0)
