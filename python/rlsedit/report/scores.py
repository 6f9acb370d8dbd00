"""Scores of several states of a model side by side."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, is_dataclass
from typing import TYPE_CHECKING, Any

from rlsedit.report.tables import estimate, table

if TYPE_CHECKING:
    from rlsedit.metrics import EvalReport

__all__ = ["finite", "score_table"]

_GROUPS = ("efficacy", "paraphrase", "neighbourhood")
_ROWS = (
    *((group, kind, f"{group}_{kind}") for group in _GROUPS for kind in ("success", "accuracy", "tokens")),
    ("score", "", "score"),
    ("portability", "accuracy", "portability_accuracy"),
    ("portability", "tokens", "portability_tokens"),
    ("portability", "any question", "portability_any"),
)
_WHERE_ASKED = "portability"


def score_table(columns: Mapping[str, EvalReport]) -> str:
    """A row for each metric: success, accuracy and share of right tokens; a column for each entry of `columns`.

    Portability has rows where facts ask for it.
    """
    rows = []
    for name, kind, key in _ROWS:
        found = [report.summary[key] for report in columns.values()]
        if name != _WHERE_ASKED or any(value.count for value in found):
            rows.append((name, kind, *(estimate(value.mean, value.stderr) for value in found)))
    return table(("", "percent", *columns), rows, align="ll" + "r" * len(columns))


def finite(value: Any) -> Any:
    """`value` with every float that is not finite replaced by None, so that it is valid JSON; tuples become lists."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if is_dataclass(value) and not isinstance(value, type):
        value = asdict(value)
    if isinstance(value, Mapping):
        return {key: finite(entry) for key, entry in value.items()}
    return [finite(entry) for entry in value] if isinstance(value, (list, tuple)) else value
