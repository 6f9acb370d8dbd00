"""Records of the published data sets, with contents of our own: every field arrives, every malformed one is named."""

from __future__ import annotations

import contextlib
import copy
import json
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlsedit.facts import Fact, load_facts, save_facts
from rlsedit.facts.ids import text_id
from rlsedit.facts.io import fact_from_record, facts_from_record

MQUAKE: dict[str, Any] = {
    "case_id": 4,
    "requested_rewrite": [
        {
            "prompt": "{} lives in",
            "relation_id": "P551",
            "subject": "Mara Oll",
            "target_new": {"str": "Tavo", "id": "Q1"},
            "target_true": {"str": "Brin", "id": "Q2"},
            "question": "Where does Mara Oll live?",
        },
        {"prompt": "{} belongs to", "subject": "Tavo", "target_new": {"str": "Ostland"}},
    ],
    "questions": ["Which country does Mara Oll live in?", "Mara Oll lives in which country?"],
    "new_answer": "Ostland",
    "new_answer_alias": ["Kingdom of Ostland", "Ostland"],
}
MEND: dict[str, Any] = {
    "subject": "Mara Oll",
    "src": "Where does Mara Oll live?",
    "pred": "Brin",
    "rephrase": "In which town is Mara Oll at home?",
    "alt": "Tavo",
    "answers": ["Brin"],
    "loc": "nq question: who wrote the long river",
    "loc_ans": "Ada Penn",
    "cond": "Brin >> Tavo || Where does Mara Oll live?",
    "portability": {"New Question": "Which river flows by Mara Oll's house?", "New Answer": "the Tav"},
}
EASYEDIT: dict[str, Any] = {
    "subject": "Mara Oll",
    "prompt": "Where does Mara Oll live?",
    "target_new": "Tavo",
    "ground_truth": ["Brin"],
    "rephrase_prompt": "In which town is Mara Oll at home?",
    "locality": {"Relation_Specificity": [{"prompt": "The trade of Mara Oll is", "ground_truth": [["weaver"]]}]},
    "portability": {
        "Reasoning": [{"prompt": "Mara Oll lives on the river", "ground_truth": "the Tav"}],
        "Subject_Aliasing": [{"prompt": "Where does the weaver live?", "ground_truth": [["Tavo", "Tavo town"]]}],
    },
}


def test_mquake_has_a_fact_for_each_rewrite() -> None:
    first, second = facts_from_record(copy.deepcopy(MQUAKE))
    assert (first.id, first.subject, first.target_new, first.target_true) == ("4.0", "Mara Oll", "Tavo", "Brin")
    assert (first.relation, first.paraphrases) == ("P551", ("Where does Mara Oll live?",))
    answers = ("Ostland", "Kingdom of Ostland")
    assert first.portability == tuple((question, answers) for question in MQUAKE["questions"])
    assert (second.id, second.subject, second.portability) == ("4.1", "Tavo", ())
    with pytest.raises(ValueError, match="must hold one fact, got 2"):
        fact_from_record(copy.deepcopy(MQUAKE))


def test_ids_of_several_facts_without_a_case() -> None:
    record = {key: value for key, value in MQUAKE.items() if key != "case_id"}
    found = facts_from_record(record)
    assert [fact.id for fact in found] == [text_id(fact) for fact in found]


def test_zsre_of_mend() -> None:
    (fact,) = facts_from_record(dict(MEND))
    assert (fact.id, fact.prompt, fact.subject) == (text_id(fact), "Where does {} live?", "Mara Oll")
    assert (fact.target_new, fact.target_true) == ("Tavo", "Brin")
    assert fact.neighbours == ("nq question: who wrote the long river?",)
    assert fact.neighbour_answers == ("Ada Penn",)
    assert fact.portability == (("Which river flows by Mara Oll's house?", ("the Tav",)),)


def test_wikidata_of_knowedit_has_no_former_answer() -> None:
    (whole,) = facts_from_record(EASYEDIT)
    (fact,) = facts_from_record({key: value for key, value in EASYEDIT.items() if key != "ground_truth"})
    assert fact == replace(whole, target_true=None)
    assert fact.portability
    assert fact.neighbour_answers == ("weaver",)


def test_zsre_of_easyedit() -> None:
    (fact,) = facts_from_record(dict(EASYEDIT))
    assert (fact.text, fact.target_new, fact.target_true) == ("Where does Mara Oll live?", "Tavo", "Brin")
    assert (fact.neighbours, fact.neighbour_answers) == (("The trade of Mara Oll is",), ("weaver",))
    assert [answers for _, answers in fact.portability] == [("the Tav",), ("Tavo", "Tavo town")]


def test_counterfact_keeps_its_generation_prompts() -> None:
    rewrite = {"prompt": "{} is", "subject": "x", "target_new": {"str": "y"}}
    (fact,) = facts_from_record({"requested_rewrite": rewrite, "generation_prompts": ["x was ", "x has"]})
    assert fact.generation == ("x was", "x has")


def test_all_formats_survive_saving(tmp_path) -> None:
    path = tmp_path / "mixed.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in (MQUAKE, MEND, EASYEDIT)), encoding="utf-8")
    facts = load_facts(path)
    assert [fact.id for fact in facts] == ["4.0", "4.1", text_id(facts[2]), f"{text_id(facts[2])}-2"], (
        "an id of its own is not counted"
    )
    save_facts(facts, tmp_path / "ours.jsonl")
    assert load_facts(tmp_path / "ours.jsonl") == facts


@pytest.mark.parametrize(
    ("record", "change", "words"),
    [
        (MEND, {"alt": ""}, "alt must not be empty"),
        (MEND, {"src": "Where does she live?"}, "src must contain the subject 'Mara Oll'"),
        (MEND, {"subject": None}, "subject must be a string, got nothing"),
        (MEND, {"answers": [" "]}, "answers must hold an answer"),
        (MEND, {"loc": 3}, "loc must be a string, got int"),
        (EASYEDIT, {"prompt": "Where?"}, "prompt must contain the subject"),
        (EASYEDIT, {"locality": []}, None),
        (EASYEDIT, {"locality": [1]}, "locality must be an object, got list"),
        (EASYEDIT, {"locality": {"a": [{"prompt": "x"}]}}, r"locality.a\[0\].ground_truth must hold an answer"),
        (EASYEDIT, {"portability": {"b": ["x"]}}, r"portability.b\[0\] must be an object, got str"),
        (MQUAKE, {"requested_rewrite": []}, "requested_rewrite must hold at least one"),
        (MQUAKE, {"requested_rewrite": [{"subject": "x"}]}, r"requested_rewrite\[0\].prompt is missing"),
        (MQUAKE, {"requested_rewrite": [3]}, r"requested_rewrite\[0\] must be an object"),
        (MQUAKE, {"new_answer": None, "new_answer_alias": []}, "new_answer must hold an answer"),
        (MQUAKE, {"questions": 7}, "questions must be a list, got int"),
        (MQUAKE, {"questions": [7]}, r"portability\[0\]\[0\] must be a string"),
    ],
)
def test_a_malformed_field_is_named(record, change, words, tmp_path) -> None:
    path = tmp_path / "f.jsonl"
    path.write_text(json.dumps({**record, **change}) + "\n" + json.dumps(EASYEDIT) + "\n", encoding="utf-8")
    if words is None:
        assert len(load_facts(path)) == 2
        return
    with pytest.raises(ValueError, match=f"f.jsonl:1: {words}"):
        load_facts(path)
    assert [fact.id for fact in load_facts(path, on_error="skip")] == [text_id(facts_from_record(EASYEDIT)[0])]


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ("x", "must be a list of"),
        ([["q"]], r"portability\[0\] must be \[prompt, answers\]"),
        ([["q", []]], r"portability\[0\]\[1\] must hold an answer"),
        ([["q", "a"]], r"portability\[0\]\[1\] must be a list of strings"),
    ],
)
def test_wrong_portability(value, words) -> None:
    with pytest.raises((ValueError, TypeError), match=words):
        Fact("a", "{} is", "x", "y", portability=value)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


@given(st.sampled_from([MQUAKE, MEND, EASYEDIT]), st.data())
def test_nothing_but_a_named_error(record, data) -> None:
    """Any field may hold anything: a fact comes out, or a ValueError or TypeError does."""
    changed = {**record, data.draw(st.sampled_from(sorted(record))): data.draw(JSON)}
    with contextlib.suppress(ValueError, TypeError):
        assert all(isinstance(fact, Fact) for fact in facts_from_record(changed))
