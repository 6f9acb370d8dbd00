"""One rank of a stream is killed, or stopped: the others say so and end, and a restart gives what would have come."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from support.rank_kills import CARRIED, Job, Outcome
from support.rank_trials import Reference, judge, names, reference, trial

KIND = "square_root"
QUICK = {"patience": 1.5}
STREAMS = ((KIND, 3), (KIND, 2), (CARRIED, 3), (CARRIED, 2))

References = dict[tuple[str, int], Reference]


@pytest.fixture(scope="module")
def references(tmp_path_factory: pytest.TempPathFactory) -> References:
    """Streams that nobody interrupted."""
    with ThreadPoolExecutor(2) as pool:
        found = pool.map(lambda which: reference(tmp_path_factory.mktemp("reference"), which[1], which[0]), STREAMS)
    return dict(zip(STREAMS, found, strict=True))


def _place(references: References, kind: str, rank: int, phase: str, part: float) -> int:
    """The number of an event of a rank that lies in a phase, `part` of the way through it."""
    places = [i for i, name in enumerate(references[kind, 3].events[rank], 1) if name == phase]
    return places[int(part * (len(places) - 1))]


TRIALS = {
    "in a batch": (1, "batch", 0.6, {}, 3),
    "rank 0 with the store, in a batch": (0, "batch", 0.9, {"tcp": True}, 2),
    "rank 0 in a save": (0, "save", 0.95, {}, 3),
    "in a save": (2, "save", 0.6, {"tcp": True}, 3),
    "stopped in a save": (1, "save", 0.9, {"stop": True, "timeout": 5.0}, 2),
    "in a batch whose weight is read": (2, "batch", 0.8, {"kind": CARRIED}, 3),
    "in a first batch whose weight is read": (1, "batch", 0.2, {"kind": CARRIED, "tcp": True}, 2),
}


def test_the_others_fail_and_a_restart_gives_what_would_have_come(references: References, tmp_path: Path) -> None:
    def one(name: str) -> list[str]:
        rank, phase, part, more, then = TRIALS[name]
        given: dict[str, Any] = {"kind": KIND, **QUICK, **more}
        job = Job("", victim=rank, event=_place(references, given["kind"], rank, phase, part), **given)
        ended, wrong = trial(tmp_path / name.replace(" ", "-"), [job], then, references)
        return [f"{name}: {text}" for text in wrong] + ([] if ended[0].phase == phase else [f"{name}: {ended}"])

    with ThreadPoolExecutor(3) as pool:
        assert [text for texts in pool.map(one, TRIALS) for text in texts] == []


def test_what_is_wrong_is_found() -> None:
    job = Job("", victim=1)
    good = "RankError: save: no sign of life from rank 1 for 5 s: closed"
    for codes, errors, hung, count in (
        ([1, -9, 1], [good, "", good], [], 0),
        ([0, -9, 1], ["", "", good], [], 1),
        ([1, -9, 1], [good.replace("rank 1", "rank 12"), "", good], [], 1),
        ([1, -9, 1], ["RuntimeError: closed", "", good], [], 1),
        ([1, -9, -9], [good, "", good], [2], 1),
    ):
        assert len(judge(job, Outcome(codes, errors, [""] * 3, 1.0, hung, []), "batch")) == count
    assert names("no sign of life from rank 0, 2 for 5 s", 2)
    assert not names("no sign of life from rank 0, 2 for 5 s", 1)
