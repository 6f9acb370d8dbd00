"""Styles of curves and points: no two alike however many there are, also where a print shows no colours."""

from __future__ import annotations

from typing import Any

__all__ = ["COLOURS", "HATCHES", "point"]

COLOURS = (
    "#0b6e99", "#d1603d", "#5b8c5a", "#7d5ba6", "#c9a227", "#4c4c4c", "#b3589a", "#2a9d8f", "#8c564b", "#1f3b73",
    "#00a6d6", "#7a7a00",
)  # fmt: skip

HATCHES = ("", "///", "||", "xx")
"""Of stacked bars."""

_MARKS = ("o", "s", "^", "D", "v", "P", "X", "*", "<", ">", "d", "p")
_FILLS = {True: ("full", "left", "top"), False: ("none", "right", "bottom")}


def point(index: int, *, filled: bool = True) -> dict[str, Any]:
    """Colour and mark of curve `index`: shape and filling differ from those of every other index of either kind.

    Args:
        index: from 0, counted apart for the two kinds.
        filled: the kind, so that a figure can tell ours from others; beyond 36 of a kind marks are numbers.
    """
    fills, shapes = _FILLS[filled], len(_MARKS)
    style: dict[str, Any] = {"color": COLOURS[index % len(COLOURS)], "markerfacecoloralt": "white"}
    if index < shapes * len(fills):
        return {**style, "marker": _MARKS[index % shapes], "fillstyle": fills[index // shapes]}
    return {**style, "marker": f"${index}$" if filled else f"$-{index}$", "fillstyle": "full"}
