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

_ROWS = (
    ("efficacy", "efficacy_success", "efficacy_accuracy"),
    ("paraphrase", "paraphrase_success", "paraphrase_accuracy"),
    ("neighbourhood", "neighbourhood_success", "neighbourhood_accuracy"),
    ("score", "score", None),
)


def score_table(columns: Mapping[str, EvalReport]) -> str:
    """A table with a row for each metric, success and accuracy, and a column for each entry of `columns`."""
    rows = []
    for name, success, accuracy in _ROWS:
        for kind, key in (("success", success), ("accuracy", accuracy)):
            if key is not None:
                shown = [estimate(r.summary[key].mean, r.summary[key].stderr) for r in columns.values()]
                rows.append((name, kind if name != "score" else "", *shown))
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
