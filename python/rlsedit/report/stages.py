"""Stages of an edit as tables and figures name them, and which stage the seconds of a method belong to."""

from __future__ import annotations

from collections.abc import Mapping

__all__ = ["STAGES", "TITLES", "booked", "has_targets"]

TITLES = {"targets": "z*", "keys": "keys", "solve": "update", "report": "terms of the objective"}
"""Titles by name of the stage."""

STAGES = tuple(TITLES)


def has_targets(method: str) -> bool:
    """Whether the seconds of "targets" are spent before the weights change; FT's steps change them."""
    from rlsedit.methods import get_method

    try:
        return get_method(method).signal != "steps"
    except ValueError:  # a record may be of a method that is not in this version
        return True


def booked(method: str, seconds: Mapping[str, float]) -> dict[str, float]:
    """Seconds by stage; the editor books FT's steps as targets, here they are the update that they are."""
    found = {stage: seconds.get(stage, 0.0) for stage in STAGES}
    if not has_targets(method):
        found["solve"] += found["targets"]
        found["targets"] = 0.0
    return found
