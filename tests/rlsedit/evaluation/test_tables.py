"""Tables and figures of an evaluation: what they average, what ± is, where seconds are booked, valid Markdown."""

from __future__ import annotations

import csv
import dataclasses
import io
import math

import pytest
from support import markdown

from rlsedit.evaluation import RunRecord, RunSpec, figures
from rlsedit.evaluation.tables import batches_csv, means_csv, tables
from rlsedit.methods import list_methods
from rlsedit.report.styles import point

SECONDS = {"targets": 3.0, "keys": 0.5, "solve": 0.25, "report": 0.125}


def estimate(mean: float, stderr: float) -> dict[str, float]:
    return {"mean": mean, "stderr": stderr, "low": 0.0, "high": 1.0, "count": 8}


def record(method: str, order: int, before: float, after: float) -> RunRecord:
    def entry(facts: int, value: float) -> dict:
        found = {"counterfact": {name: estimate(value, 0.1) for name in ("efficacy_success", "score")}}
        return {"facts": facts, "groups": {"all": found, "first": found}}

    batch = {"facts": 4, "seconds": SECONDS, "fit": 1.0, "parameter": 2.0, "anchor": 3.0, "parameter_bound": 2.0,
             "anchor_bound": None, "target_loss": 0.1, "steps": 5}  # fmt: skip
    ability = {"before": {"text": {"perplexity": estimate(10.0, 0.5)}}, "after": {"text": {"perplexity": estimate(
        10.0 + order, 0.5)}}}  # fmt: skip
    return RunRecord(RunSpec(method, 0, order), {}, [batch], [entry(0, before), entry(4, after)], [], ability, True)


ONE = [record("rlsedit", 0, 0.75, 0.5), record("memit", 0, 0.75, 0.25)]
SEVERAL = [record("rlsedit", 0, 0.75, 0.5), record("memit", 0, 0.75, 0.25),
           record("rlsedit", 1, 0.5, 0.7), record("memit", 1, 0.5, 0.25)]  # fmt: skip


def rows_of(records, title: str) -> tuple[str, dict[str, dict[str, str]]]:
    (found,) = [table for table in tables(records) if table.title == title]
    return found.about, {row[0]: dict(zip(found.header, row, strict=True)) for row in found.rows}


def test_the_row_before_is_the_mean_over_the_runs() -> None:
    _, rows = rows_of(SEVERAL, "Scores")
    assert rows["before"]["efficacy"] == "62.5 ± 12.5", "75 and 50, each of them once and not once a method"
    assert rows["rlsedit"]["efficacy"] == "60.0 ± 10.0"
    assert rows["memit"]["efficacy"] == "25.0 ± 0.0"
    _, rows = rows_of(SEVERAL, "Ability")
    assert rows["before"]["text, perplexity"] == "10 ± 0"
    assert rows["rlsedit"]["text, perplexity"] == "10.5 ± 0.5"


@pytest.mark.parametrize("title", ["Scores", "Retention", "Ability"])
def test_one_sign_has_one_meaning_and_the_caption_names_it(title) -> None:
    about, _ = rows_of(ONE, title)
    assert f"± is the standard error over {'the items of the task' if title == 'Ability' else 'facts'}." in about
    (found,) = [table for table in tables(ONE) if table.title == title]
    assert found.header[0] == ("± over items" if title == "Ability" else "± over facts")
    (found,) = [table for table in tables(SEVERAL) if table.title == title]
    assert found.header[0] == "± over runs"
    about, _ = rows_of(SEVERAL, title)
    assert "Means over the runs (seeds and orders); ± is the standard error over them" in about


def test_a_single_run_among_several_has_no_error() -> None:
    """Its error over facts would stand beside errors over runs."""
    _, rows = rows_of(SEVERAL[:3], "Scores")
    assert rows["memit"]["efficacy"] == "25.0"
    _, rows = rows_of(ONE, "Scores")
    assert rows["memit"]["efficacy"] == "25.0 ± 10.0"


def test_both_errors_are_in_a_file() -> None:
    found = {(r["method"], r["facts"], r["group"], r["metric"]): r for r in csv.DictReader(io.StringIO(
        means_csv(SEVERAL)))}  # fmt: skip
    row = found["rlsedit", "4", "all", "efficacy_success"]
    values = {name: float(row[name]) for name in ("runs", "mean", "stderr_over_runs", "stderr_over_facts")}
    assert values == pytest.approx({"runs": 2, "mean": 0.6, "stderr_over_runs": 0.1, "stderr_over_facts": 0.1})
    (alone,) = [r for r in csv.DictReader(io.StringIO(means_csv(ONE[:1]))) if r["facts"] == "4" and r["group"] == "all"
                and r["metric"] == "score"]  # fmt: skip
    assert alone["stderr_over_runs"] == ""
    assert float(alone["stderr_over_facts"]) == pytest.approx(0.1)


def test_the_steps_of_fine_tuning_are_its_update() -> None:
    records = [record("rlsedit", 0, 0.5, 0.5), record("ft", 0, 0.5, 0.5), record("of another version", 0, 0.5, 0.5)]
    about, rows = rows_of(records, "Speed")
    assert "the steps of fine-tuning are its update" in about
    assert (rows["rlsedit"]["z*"], rows["rlsedit"]["update"]) == ("0.7500", "0.0625")
    assert (rows["ft"]["z*"], rows["ft"]["update"], rows["ft"]["update of a batch"]) == ("", "0.8125", "3.2500")
    assert rows["of another version"]["z*"] == "0.7500"
    assert len({row["a fact"] for row in rows.values()}) == 1
    lines = {row["method"]: row for row in csv.DictReader(io.StringIO(batches_csv(records)))}
    assert [float(lines["ft"][f"seconds_{name}"]) for name in ("targets", "solve")] == [0.0, 3.25]
    figure = figures.FIGURES["time"](records)
    bars = {bar.get_label(): [patch.get_width() for patch in bar] for bar in figure.axes[0].containers}
    assert bars["z*"] == [0.75, 0.0, 0.75]
    assert bars["update"] == [0.0625, 0.8125, 0.0625]


@pytest.mark.parametrize("records", [ONE, SEVERAL], ids=["one", "several"])
def test_tables_are_valid_markdown(records) -> None:
    for table in tables(records):
        (found,) = markdown.tables(table.markdown())
        assert len(found) == 1 + len(table.rows)
        assert [cell.replace("\\|", "|") for cell in found[0]] == table.header


def test_every_method_has_a_style_of_its_own_also_in_grey() -> None:
    records = [record(name, 0, 0.5, 0.5) for name in list_methods()]
    for name in ("scores", "objective"):
        lines = [
            line for line in figures.FIGURES[name](records).axes[0].lines if line.get_marker() not in ("None", "_")
        ]
        seen = [(line.get_marker(), line.get_fillstyle()) for line in lines]
        assert len(seen) == len(set(seen)) == len(records)


def test_the_legend_has_the_methods_in_the_order_of_the_tables() -> None:
    """One without a fit, as fine-tuning, stood behind all others, and one whose first run has no figures nowhere."""

    def without(name: str, order: int, *terms: str) -> RunRecord:
        one = record(name, order, 0.5, 0.5)
        return dataclasses.replace(one, batches=[{**one.batches[0], **dict.fromkeys(terms, math.nan)}])

    records = [
        without("ft", 0, "fit"), without("memit", 0, "fit", "parameter", "anchor"), without("rlsedit", 0),
        without("memit", 1),
    ]  # fmt: skip
    (legend,) = figures.FIGURES["objective"](records).legends
    assert [text.get_text() for text in legend.get_texts()] == ["ft", "memit", "rlsedit"]


def test_styles_never_repeat() -> None:
    styles = [(point(i, filled=kind)["marker"], point(i, filled=kind)["fillstyle"]) for kind in (True, False)
              for i in range(60)]  # fmt: skip
    assert len(styles) == len(set(styles))


def test_a_metric_that_was_not_measured_is_left_out() -> None:
    records = [record("memit", 0, math.nan, math.nan)]
    about, rows = rows_of(records, "Scores")
    assert "efficacy" not in rows["memit"]
    assert "±" in about


def fact_rows(generation: list[tuple[float, float, float]]) -> list[dict]:
    names = ("efficacy_success", "paraphrase_success", "neighbourhood_success")
    return [{"id": str(i), **dict(zip(names, values, strict=True))} for i, values in enumerate(generation)]


OURS = fact_rows([(1.0, 1.0, 0.5), (1.0, 0.0, 0.75), (0.0, 1.0, 1.0), (1.0, 1.0, 0.25)])
THEIRS = fact_rows([(1.0, 0.0, 0.5), (0.0, 0.0, 0.5), (0.0, 1.0, 1.0), (1.0, 1.0, 0.25)])


def test_differences_are_taken_fact_by_fact_with_the_first_method() -> None:
    records = [dataclasses.replace(one, rows=rows) for one, rows in zip(ONE, (OURS, THEIRS[::-1]), strict=True)]
    about, rows = rows_of(records, "Differences from rlsedit")
    assert "percentage points" in about
    assert list(rows) == ["memit"]
    assert rows["memit"]["efficacy"] == "-25.0 ± 25.0"  # of 0, -1, 0, 0; beside 25 and 29 of the two alone
    assert rows["memit"]["specificity"] == "-6.2 ± 6.2"
    scores = [3 / sum(1 / m for m in means) for means in ((0.5, 0.5, 0.5625), (0.75, 0.75, 0.625))]
    assert rows["memit"]["score"].startswith(f"{100 * (scores[0] - scores[1]):+.1f} ± ")


def test_differences_need_the_same_facts_of_runs_that_have_ended() -> None:
    other = [{**row, "id": f"other {row['id']}"} for row in THEIRS]
    for rows, complete in ((other, True), (THEIRS[:2], True), ([], True), (THEIRS, False)):
        second = dataclasses.replace(ONE[1], rows=rows, complete=complete)
        records = [dataclasses.replace(ONE[0], rows=OURS), second]
        assert not [table for table in tables(records) if table.title.startswith("Differences")]


def test_differences_over_runs_have_their_errors_over_runs() -> None:
    records = [
        dataclasses.replace(one, rows=rows) for one, rows in zip(SEVERAL, (OURS, THEIRS, OURS, OURS), strict=True)
    ]
    about, rows = rows_of(records, "Differences from rlsedit")
    assert "over the runs" in about
    assert rows["memit"]["efficacy"] == "-12.5 ± 12.5"
