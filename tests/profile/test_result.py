"""Results: the same after a round trip, one schema, comparisons that say what else was different, growth."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from rlsedit_kernels import profile
from rlsedit_kernels.profile import Contender, Problem, Settings, Times
from rlsedit_kernels.profile.counting import Count
from rlsedit_kernels.profile.machine import Ceilings

QUICK = Settings(repetitions=2, cold=False, check=1)


@pytest.fixture(scope="module")
def small(found) -> profile.Profile:
    names = ["rlsedit, op", "woodbury", "MEMIT"]
    return profile.measure(profile.named(names, profile.catalogue("cpu")), Problem(40, 8, 4), QUICK, found=found)


def test_round_trip(small, tmp_path) -> None:
    small.save(tmp_path / "deep" / "a.json")
    assert profile.load(tmp_path / "deep" / "a.json") == small


def test_what_is_not_counted_is_said_in_the_row_and_below_the_table(small, tmp_path) -> None:
    from rlsedit.report.profile_tables import markdown, profile_table

    first, *others = small.rows
    marked = dataclasses.replace(
        small, rows=(dataclasses.replace(first, uncounted=("aten::linalg_matrix_exp",)), *others)
    )
    marked.save(tmp_path / "p.json")
    assert profile.load(tmp_path / "p.json") == marked
    for text in (profile_table(marked), markdown(marked)):
        assert f"{first.name}: GFLOP+ and of ceiling leave out aten::linalg_matrix_exp" in text
        assert text.count("+ ") == 2, "the cell of that row, and the note"
    old = json.loads((tmp_path / "p.json").read_text())
    for row in old["rows"]:
        del row["uncounted"]
    (tmp_path / "p.json").write_text(json.dumps(old))
    assert profile.load(tmp_path / "p.json") == small


def test_numbers_that_are_not_finite_become_null(small, tmp_path) -> None:
    rows = (dataclasses.replace(small.rows[0], error=float("inf")), *small.rows[1:])
    dataclasses.replace(small, rows=rows).save(tmp_path / "a.json")
    assert profile.load(tmp_path / "a.json").rows[0].error is None


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("no json", "must be JSON"),
        ("[1]", "schema must be 'rlsedit-profile/1', got 'list'"),
        ('{"schema": "rlsedit-profile/9"}', "got 'rlsedit-profile/9'"),
        ('{"schema": "rlsedit-profile/1"}', "not a whole profile"),
    ],
)
def test_what_is_no_profile(content, message, tmp_path) -> None:
    (tmp_path / "a.json").write_text(content)
    with pytest.raises(ValueError, match=message):
        profile.load(tmp_path / "a.json")


def test_medians_and_spread() -> None:
    times = Times.of([5.0, 1.0, 2.0, 4.0, 3.0])
    assert (times.p20, times.median, times.p80, times.repetitions) == (2.0, 3.0, 4.0, 5)


def test_the_ceiling_is_the_longer_of_two_times() -> None:
    ceilings = Ceilings(10.0, {"float32": 100.0, "float64": 50.0})
    assert ceilings.reached(Count(200.0, 10.0), 4.0) == pytest.approx(0.5)  # 2 s of flops, 1 s of bytes
    assert ceilings.reached(Count(200.0, 10.0, wide=100.0), 4.0) == pytest.approx(0.75)
    assert ceilings.reached(Count(10.0, 30.0), 6.0) == pytest.approx(0.5)
    assert ceilings.reached(Count(), 1.0) is None


def test_compare_tells_ratio_and_differences(small) -> None:
    def slower(row: profile.Row) -> profile.Row:
        t = row.times
        factor = 4.0 if "Woodbury" in row.name else 2.0
        return dataclasses.replace(
            row, times=Times(t.median * factor, t.p80 * factor, t.p80 * factor, 2), ratio=row.ratio * factor / 2.0
        )

    other = dataclasses.replace(
        small, rows=tuple(map(slower, small.rows[:-1])), machine={**small.machine, "torch": "9.9"}
    )
    rows, notes = profile.compare(small, other)
    assert [row.name for row in rows] == [row.name for row in small.rows[:-1]]
    assert all(row.change == pytest.approx(4.0 if "Woodbury" in row.name else 2.0) for row in rows)
    assert all(row.relative == pytest.approx(row.change / 2.0) for row in rows)
    assert any("torch differs" in note for note in notes)
    assert any("only in the first: 1 rows, such as MEMIT, float64" in note for note in notes)


def test_spreads_that_touch_are_not_apart(small) -> None:
    rows, notes = profile.compare(small, small)
    assert not any(row.apart for row in rows)
    assert notes == []


def test_sweep_has_a_row_for_each_value(found) -> None:
    base = {"d": 32, "v": 8, "u": 4, "layers": 1, "dtype": torch.float32, "device": "cpu"}

    def contenders(layers: int) -> list[Contender]:
        return profile.named(["rlsedit, ops"], profile.catalogue("cpu", layers))[:1]

    swept = profile.sweep("u", (8, 2), contenders, base, QUICK, found=found)
    assert swept.kind == "u"
    assert [row.problem["u"] for row in swept.rows] == [2, 8]
    with pytest.raises(ValueError, match="axis must be one of"):
        profile.sweep("v", (1,), contenders, base)
    with pytest.raises(ValueError, match="distinct"):
        profile.sweep("u", (2, 2), contenders, base)


def test_a_result_is_written_whole_or_not_at_all(tmp_path, monkeypatch, found) -> None:
    """A full disk left half of a result in the place of the one that was there."""
    result = profile.Profile("shape", {}, found, {}, ())
    result.save(tmp_path / "a.json")
    before = (tmp_path / "a.json").read_bytes()
    write = Path.write_text

    def half(path, text, **more):
        write(path, text[: len(text) // 2], **more)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", half)
    with pytest.raises(OSError, match="No space left"):
        result.save(tmp_path / "a.json")
    assert (tmp_path / "a.json").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


def test_extrapolation_is_marked_and_tells_how_far_it_was_off(monkeypatch, found) -> None:
    from rlsedit_kernels.profile import growth

    smaller = []

    def kept(*given, **more):
        smaller.append(rows_of(*given, **more))
        return smaller[-1]

    rows_of = growth.rows_of
    monkeypatch.setattr(growth, "rows_of", kept)
    base = {"d": 256, "v": 64, "u": 4, "layers": 1, "dtype": torch.float32, "device": "cpu"}
    contenders = profile.named(["rlsedit, ops", "MEMIT"], profile.catalogue("cpu"))
    measured = profile.measure(
        contenders, Problem(**base), Settings(repetitions=2, limit=1e-9, cold=False), found=found
    )
    assert {row.status for row in measured.rows} == {"skipped"}
    settings = Settings(repetitions=3, cold=False)
    filled = profile.extrapolated(measured, contenders, base, settings)
    for row in filled.rows:
        assert row.status == "extrapolated"
        assert "from the rate at d = 64" in row.reason
        assert "off by" in row.reason
        assert row.error is None
        assert row.times.repetitions == 0
    memit = next(row for row in filled.rows if row.name.startswith("MEMIT"))
    eighth, quarter = (next(row for row in rows if row.name == memit.name) for rows in smaller)
    assert (eighth.problem["d"], quarter.problem["d"]) == (32, 64)
    work = [2.0 * d * d * (2 / 3 * d + 24) for d in (64, 256)]
    assert memit.times.median == pytest.approx(
        quarter.times.median * work[1] / work[0], rel=0.3
    )  # it counts a few more


def test_extrapolation_counts_the_layers_of_a_step_that_writes_to_all(monkeypatch, found) -> None:
    """Its flops are those of all layers, at the small sizes and at the whole one."""
    from rlsedit_kernels.profile import growth

    base = {"d": 256, "v": 64, "u": 4, "layers": 6}
    one = Contender("at once", lambda problem: None, flops=lambda p: float(p.layers * p.d**2), at_once=True)
    row = profile.Row("at once", "", "skipped", "too large", {**base, "history": 0})
    timed = dataclasses.replace(row, status="measured", times=Times.of([1.0]))
    monkeypatch.setattr(growth, "rows_of", lambda *_, **__: [timed])
    whole = profile.Profile("shape", {}, found, {}, (row,))
    (filled,) = profile.extrapolated(whole, [one], base, QUICK).rows
    assert filled.times.median == pytest.approx(16.0)  # a quarter of d


def test_measured_rows_are_not_touched_by_extrapolation(small) -> None:
    assert profile.extrapolated(small, profile.catalogue("cpu"), {"d": 40, "v": 8, "u": 4}, QUICK) is small


def test_the_schema_is_json(small) -> None:
    content = json.loads(json.dumps(small.as_dict()))
    assert content["schema"] == profile.SCHEMA
    assert {"machine", "ceilings", "settings", "rows", "kind"} < set(content)


def test_older_files_give_the_baseline_by_time_and_ratio(small, tmp_path) -> None:
    content = small.as_dict()
    for row in content["rows"]:
        del row["baseline"], row["baseline_repetitions"]
    (tmp_path / "old.json").write_text(json.dumps(content))
    for old, new in zip(profile.load(tmp_path / "old.json").rows, small.rows, strict=True):
        assert old.baseline is None
        assert old.compared_with == pytest.approx(new.baseline)


def test_an_extrapolated_ratio_keeps_what_it_is_to(found) -> None:
    base = {"d": 256, "v": 64, "u": 4, "layers": 1, "dtype": torch.float32, "device": "cpu"}
    contenders = profile.named(["rlsedit, op", "MEMIT"], profile.catalogue("cpu"))
    settings = Settings(repetitions=2, cold=False)
    measured = profile.measure(contenders, Problem(**base), settings, found=found)
    rows = tuple(
        dataclasses.replace(r, status="skipped", times=None, ratio=None, baseline=None) if "MEMIT" in r.name else r
        for r in measured.rows
    )
    filled = profile.extrapolated(dataclasses.replace(measured, rows=rows), contenders, base, settings).rows
    first, memit = filled[0], next(row for row in filled if "MEMIT" in row.name)
    assert memit.baseline == first.times.median
    assert memit.baseline_repetitions == 2
    assert memit.ratio == pytest.approx(memit.times.median / memit.baseline)
