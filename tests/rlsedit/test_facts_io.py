"""Facts from files: both record shapes, compression, encodings, and errors that name file, line and field."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from rlsedit.cli import serving
from rlsedit.facts import Fact, load_facts, save_facts

OURS: dict[str, Any] = {
    "id": "a",
    "prompt": "The capital of {} is",
    "subject": "Côte d'Ivoire",
    "target_new": "Århus",
    "target_true": "Yamoussoukro",
    "paraphrases": ["In 東京 they say:"],
    "neighbours": ["The capital of Mali is", "The capital of Peru is"],
    "neighbour_answers": ["Bamako", "Lima"],
}
COUNTERFACT: dict[str, Any] = {
    "case_id": 7,
    "requested_rewrite": {
        "prompt": "{} plays the",
        "relation_id": "P1303",
        "subject": "Toko",
        "target_new": {"str": "piano"},
        "target_true": {"str": "guitar"},
    },
    "paraphrase_prompts": ["Toko is good at the "],
    "neighborhood_prompts": ["Brian plays the"],
    "attribute_prompts": ["kept out"],
}


def write(path: Path, *records: Any) -> Path:
    path.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records), encoding="utf-8")
    return path


def test_our_fields_with_unicode(tmp_path: Path) -> None:
    (fact,) = load_facts(write(tmp_path / "f.jsonl", OURS))
    assert fact.text == "The capital of Côte d'Ivoire is"
    assert fact.paraphrases == ("In 東京 they say:",)
    assert fact.neighbour_answers == ("Bamako", "Lima")


def test_counterfact_record(tmp_path: Path) -> None:
    (fact,) = load_facts(write(tmp_path / "f.jsonl", COUNTERFACT))
    assert (fact.id, fact.subject, fact.target_new, fact.target_true) == ("7", "Toko", "piano", "guitar")
    assert (fact.relation, fact.neighbours) == ("P1303", ("Brian plays the",))
    assert fact.paraphrases == ("Toko is good at the",), "a blank at the end would double before the target"


def test_gzip_array_and_byte_order_mark_read_the_same(tmp_path: Path) -> None:
    plain = load_facts(write(tmp_path / "f.jsonl", OURS, COUNTERFACT))
    packed = tmp_path / "f.jsonl.gz"
    packed.write_bytes(gzip.compress((tmp_path / "f.jsonl").read_bytes()))
    array = tmp_path / "f.json"
    array.write_text(json.dumps([OURS, COUNTERFACT]), encoding="utf-8-sig")
    assert load_facts(packed) == plain
    assert load_facts(array) == plain


def test_saved_facts_read_back_equal(tmp_path: Path) -> None:
    facts = load_facts(write(tmp_path / "f.jsonl", OURS, COUNTERFACT))
    save_facts(facts, tmp_path / "deep" / "g.jsonl")
    assert load_facts(tmp_path / "deep" / "g.jsonl") == facts


def test_a_missing_id_is_made_from_the_text(tmp_path: Path) -> None:
    """The same in every file and at every place of it; equal facts are counted."""
    record = {k: v for k, v in OURS.items() if k != "id"}
    other = {**record, "subject": "Peru"}
    path = tmp_path / "f.jsonl"
    path.write_text(
        "\n" + json.dumps(record) + "\n\n" + json.dumps(other) + "\n" + json.dumps(record), encoding="utf-8"
    )
    first, second, third = (fact.id for fact in load_facts(path))
    assert third == f"{first}-2"
    assert len({first, second}) == 2
    assert [fact.id for fact in load_facts(write(tmp_path / "g.jsonl", other, {**record, "relation": "x"}))] == [
        second,
        first,
    ], "neither place nor other fields count"
    both = load_facts(path)
    save_facts(both, tmp_path / "saved.jsonl")
    assert load_facts(tmp_path / "saved.jsonl") == both
    given = write(tmp_path / "i.jsonl", {**record, "id": third}, record, record)
    assert [fact.id for fact in load_facts(given)] == [third, f"{first}-3", f"{first}-4"], "never one that was given"
    with pytest.raises(ValueError, match=f"id must be unique, got '{first}' again"):
        load_facts(write(tmp_path / "h.jsonl", {**record, "id": first}, {**record, "id": first}))


def test_what_the_log_says_of_a_request_is_passed_over(tmp_path: Path) -> None:
    assert load_facts(write(tmp_path / "f.jsonl", {**OURS, "state": "applied"})) == load_facts(
        write(tmp_path / "g.jsonl", OURS)
    )


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"target_new": None}, "target_new must be a string"),
        ({"target_new": " "}, "target_new must not be empty"),
        ({"subject": 3}, "subject must be a string, got int"),
        ({"prompt": "no place"}, "prompt must contain {} exactly once"),
        ({"prompt": "{} and {}"}, "prompt must contain {} exactly once"),
        ({"paraphrases": "one"}, "paraphrases must be a list"),
        ({"paraphrases": ["fine", ""]}, r"paraphrases\[1\] must not be empty"),
        ({"neighbour_answers": ["Bamako"]}, "neighbour_answers must be empty or have one answer for each of the 2"),
        ({"targetnew": "x"}, "unknown field 'targetnew'"),
        ({"id": True}, "id must be a string, got bool"),
    ],
)
def test_a_bad_record_is_named(tmp_path: Path, change: dict[str, Any], words: str) -> None:
    path = write(tmp_path / "f.jsonl", OURS, {**OURS, "id": "b", **change})
    with pytest.raises(ValueError, match=words) as error:
        load_facts(path)
    assert f"{path}:2: " in str(error.value)
    assert [fact.id for fact in load_facts(path, on_error="skip")] == ["a"]


@pytest.mark.parametrize(
    ("rewrite", "words"),
    [
        ("x", "requested_rewrite must be an object, got str"),
        ({"prompt": "{} is"}, "requested_rewrite.subject is missing"),
        ({"prompt": "{} is", "subject": "x", "target_new": {}}, "requested_rewrite.target_new.str is missing"),
    ],
)
def test_a_bad_counterfact_record_is_named(tmp_path: Path, rewrite: Any, words: str) -> None:
    path = write(tmp_path / "f.jsonl", {"requested_rewrite": rewrite})
    with pytest.raises(ValueError, match=words):
        load_facts(path)


@pytest.mark.parametrize("name", ["prompt", "subject", "target_new"])
def test_a_missing_field_is_named(tmp_path: Path, name: str) -> None:
    path = write(tmp_path / "f.jsonl", {k: v for k, v in OURS.items() if k != name})
    with pytest.raises(ValueError, match=f"f.jsonl:1: {name} is missing"):
        load_facts(path)


def test_repeated_ids_name_both_lines(tmp_path: Path) -> None:
    path = write(tmp_path / "f.jsonl", OURS, OURS)
    with pytest.raises(ValueError, match=r"f\.jsonl:2: id must be unique, got 'a' again \(first at .*f\.jsonl:1\)"):
        load_facts(path)
    assert len(load_facts(path, on_error="skip")) == 1


def test_broken_files(tmp_path: Path) -> None:
    path = tmp_path / "f.jsonl"
    path.write_text(json.dumps(OURS) + "\n{broken\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"f\.jsonl:2: not valid JSON: .* at column 2"):
        load_facts(path)
    path.write_text(json.dumps(OURS) + "\n[1]\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"f\.jsonl:2: a record must be a JSON object, got list"):
        load_facts(path)
    path.write_bytes(json.dumps(OURS).encode() + b"\n\xff\xfe\n")
    with pytest.raises(ValueError, match=r"f\.jsonl:2: not UTF-8"):
        load_facts(path)
    path.write_text("\n \n", encoding="utf-8")
    with pytest.raises(ValueError, match="no facts in this file"):
        load_facts(path)
    packed = tmp_path / "f.jsonl.gz"
    packed.write_bytes(gzip.compress(json.dumps(OURS).encode())[:-12])
    with pytest.raises(ValueError, match="not a whole gzip file"):
        load_facts(packed)
    with pytest.raises(FileNotFoundError):
        load_facts(tmp_path / "none.jsonl")
    with pytest.raises(ValueError, match="a folder"):
        load_facts(tmp_path)


def test_a_name_that_stands_twice_is_refused(tmp_path: Path) -> None:
    """Which of its values was meant nobody can tell."""
    line = '{"prompt": "{} is in", "subject": "Oslo", "target_new": "Peru", "target_new": "Japan"}'
    for text, where in ((line, "facts.jsonl:1: "), (f"[{line}]", "facts.jsonl: ")):
        (tmp_path / "facts.jsonl").write_text(text)
        with pytest.raises(ValueError, match=f"{where}not valid JSON: 'target_new' stands twice in one object"):
            load_facts(tmp_path / "facts.jsonl")
    with pytest.raises(ValueError, match="'target_new' stands twice"):
        serving._fact(line.encode())


def test_wrong_mode_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match='on_error must be "raise" or "skip"'):
        load_facts(tmp_path / "f.jsonl", on_error="ignore")  # type: ignore[arg-type]


def test_fact_refuses_outer_blanks_and_is_frozen() -> None:
    with pytest.raises(ValueError, match="target_new must have no blanks"):
        Fact("a", "{} is", "x", " y")
    fact = Fact("a", "{} is", "x{0}", "y", paraphrases=["p"])  # type: ignore[arg-type]
    assert fact.text == "x{0} is", "braces in a subject are no format fields"
    assert fact.paraphrases == ("p",)
    with pytest.raises(AttributeError):
        fact.subject = "z"  # type: ignore[misc]
