"""100 kills of one rank of a stream over 3 and 4 ranks, a restart after each: python bench/rank_kills.py [--kills N]

Every rank and every phase: while a state is made, loaded, given a batch, saved, and at any time; a tenth of the ranks
is stopped (SIGSTOP) rather than killed. The others must fail by themselves and name the rank; a restart with as many
ranks must give the state and weight of the uninterrupted stream to the bit, with another number to rounding.
"""

from __future__ import annotations

import random
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import harness

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "helpers"))

from support import rank_kills, rank_trials

SIZES = (3, 4)


def main() -> int:
    parser = harness.arguments(__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--together", type=int, default=2, help="streams at a time; most of a trial is waiting")
    parser.add_argument("--kinds", nargs="+", choices=rank_kills.KINDS, default=rank_kills.KINDS, help="of states")
    args = parser.parse_args()
    if args.kills < 1 or args.together < 1:
        parser.error("--kills and --together must be at least 1")
    with tempfile.TemporaryDirectory() as scratch:
        ended, wrong, restarts = run(args.kills, args.seed, args.together, args.kinds, Path(scratch))
    settings = {
        "kills": sum(one.phase != "over" for one in ended),
        "seed": args.seed,
        "d": rank_kills.D,
        "u": rank_kills.U,
        "batches": rank_kills.BATCHES,
        "checkpoint every": rank_kills.EVERY,
        "ranks": SIZES,
        "states": args.kinds,
        "seconds without a sign of life": rank_kills.Job("").patience,
        "restarts": restarts,
        "wrong": wrong,
    }
    phases = sorted({one.phase for one in ended}, key=[*rank_trials.PHASES, "at any time", "over"].index)
    rows = [_row(phase, [one for one in ended if one.phase == phase]) for phase in phases]
    rows.append(_row("all", [one for one in ended if one.phase != "over"]))
    print(f"{settings['kills']} ranks ended, {restarts} restarts, {len(wrong)} wrong")
    for text in wrong:
        print(text)
    harness.report("rank_kills", settings, rows, args.json)
    return 1 if wrong else 0


def run(
    kills: int, seed: int, together: int, kinds: list[str], scratch: Path
) -> tuple[list[rank_trials.Ended], list[str], int]:
    """At least `kills` ranks ended.

    Returns:
        what was ended, what was wrong, and how many streams were begun again.
    """
    choose = random.Random(seed)
    known = {(kind, size): rank_trials.reference(scratch, size, kind) for kind in kinds for size in (2, *SIZES)}
    plans: list[tuple[list[rank_kills.Job], int]] = []
    while sum(len(jobs) for jobs, _ in plans) < kills:
        number = len(plans)
        size, kind = SIZES[number % len(SIZES)], kinds[number // len(SIZES) % len(kinds)]
        phase = ("start", "batch", "save", "at any time", "batch", "save", "end")[number % 7]
        jobs = [rank_trials.drawn(choose, size, kind, phase, known[kind, size])]
        if choose.random() < 0.3 and phase != "start":  # ended again while it goes on
            jobs.append(rank_trials.again(choose, jobs[0]))
        plans.append((jobs, size if choose.random() < 0.7 else choose.choice([n for n in (2, *SIZES) if n != size])))
    ended: list[rank_trials.Ended] = []
    wrong: list[str] = []

    def one(index: int) -> tuple[list[rank_trials.Ended], list[str]]:
        jobs, then = plans[index]
        return rank_trials.trial(scratch / f"trial-{index}", jobs, then, known)

    with ThreadPoolExecutor(together) as pool:
        for index, (gone, errors) in enumerate(pool.map(one, range(len(plans)))):
            ended += gone
            wrong += errors
            print(f"{index + 1}/{len(plans)}: {', '.join(f'{g.phase} {g.seconds:.1f} s' for g in gone)}"
                  + "".join(f"; WRONG: {text}" for text in errors), file=sys.stderr)  # fmt: skip
    return ended, wrong, sum(len(jobs) for jobs, _ in plans)


def _row(phase: str, ended: list[rank_trials.Ended]) -> dict[str, Any]:
    row: dict[str, Any] = {"ended while": phase, "ranks ended": len(ended)}
    for how in ("killed", "stopped"):
        of = [one.seconds for one in ended if one.how == how]
        row[how] = len(of)
        row[f"longest until others failed, {how}, s"] = round(max(of), 1) if of and phase != "over" else None
    return row


if __name__ == "__main__":
    raise SystemExit(main())
