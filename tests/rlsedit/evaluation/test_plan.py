"""Plans: every field checked and named, paths relative to the file, streams as they are meant."""

from __future__ import annotations

from dataclasses import replace

import pytest

from rlsedit.evaluation import Plan, load_plan, plan_from
from rlsedit.evaluation.streams import groups, ordered, with_conflicts
from rlsedit.facts import Fact

PLAN = """
model = "model"
facts = "facts.jsonl"
methods = ["rlsedit", "memit"]
checkpoints = [300, 100]
seeds = [0, 1]
orders = [0, 7]
[settings.all]
steps = 3
[settings.memit]
steps = 4
[ability]
sst = "sst.jsonl"
"""


def facts(n: int, relations: int = 2) -> list[Fact]:
    return [Fact(str(i), "{} is in", f"Town{i}", f"Land{i % 5}", relation=f"r{i % relations}") for i in range(n)]


def test_a_plan_from_toml(tmp_path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "plan.toml").write_text(PLAN)
    plan = load_plan(tmp_path / "plan.toml")
    assert plan.facts == tmp_path / "facts.jsonl"
    assert plan.model == str(tmp_path / "model")
    assert plan.ability == {"sst": tmp_path / "sst.jsonl"}
    assert plan.checkpoints == (100, 300)
    assert [spec.name for spec in plan.runs][:3] == [
        "rlsedit-seed0-order0", "memit-seed0-order0", "rlsedit-seed0-order7",
    ]  # fmt: skip
    assert len(plan.runs) == 8
    assert plan.config("memit", 1) == {"steps": 4, "seed": 1}
    assert plan.config("rlsedit", 0) == {"steps": 3, "seed": 0}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"modle": "x"}, "unknown field 'modle'"),
        ({"model": None}, "model must be str, got NoneType"),
        ({"facts": 3}, "facts must be str or Path, got int"),
        ({"methods": ["nobody"]}, "nobody"),
        ({"methods": []}, "methods must hold at least one"),
        ({"methods": ["memit", "memit"]}, "methods must hold each entry once"),
        ({"methods": "memit"}, "methods must be list or tuple, got str"),
        ({"metrics": ["beauty"]}, "metrics must be among counterfact, writing"),
        ({"checkpoints": [0]}, "checkpoints must be at least 1"),
        ({"checkpoints": ["x"]}, "checkpoints must hold int entries, got 'x'"),
        ({"seeds": [0, -1]}, "seeds must be at least 0, got -1"),
        ({"orders": [-2]}, "orders must be at least 0, got -2"),
        ({"batch": 0}, "batch must be at least 1"),
        ({"batch": True}, "batch must be int, got bool"),
        ({"limit": 0}, "limit must be at least 1"),
        ({"settings": {"rome": {}}}, "settings are for methods of the plan"),
        ({"settings": {"all": 3}}, "settings.all must be a table"),
        ({"skip_bad": 1}, "skip_bad must be bool"),
        ({"settings": {"all": {"step": 3}}}, "settings.all has no hyper-parameter 'step'; there are clamp"),
        ({"settings": {"rlsedit": {"seed": 3}}}, "settings.rlsedit has no hyper-parameter 'seed'; seeds of the plan"),
        ({"settings": {"all": {"batch_size": 3}}}, "no hyper-parameter 'batch_size'; batch of the plan says it"),
        ({"settings": {"all": {"steps": 0}}}, "settings of 'rlsedit': EditConfig: steps must be at least 1, got 0"),
        ({"settings": {"all": {"lr": "fast"}}}, "settings of 'rlsedit': EditConfig: lr must be a number, got 'fast'"),
        (
            {"methods": ["memit", "rome"], "settings": {"all": {"layers": [1, 2]}}},
            r"layers must be one layer for 'rome', got \[1, 2\]; settings.rome can have its own",
        ),
    ],
)
def test_a_wrong_field_is_named(change, words) -> None:
    with pytest.raises((ValueError, TypeError), match=words):
        plan_from({"model": "m", "facts": "f", **change})


def test_a_method_of_one_layer_has_its_own_beside_others() -> None:
    both = {"all": {"layers": [1, 2]}, "rome": {"layers": [2]}}
    plan = plan_from({"model": "m", "facts": "f", "methods": ["memit", "rome"], "settings": both})
    assert plan.config("rome", 0)["layers"] == [2]


def test_missing_fields_and_broken_files(tmp_path) -> None:
    with pytest.raises(ValueError, match="facts is missing"):
        plan_from({"model": "m"})
    (tmp_path / "p.toml").write_text("model = ")
    with pytest.raises(ValueError, match=r"p\.toml: not valid TOML"):
        load_plan(tmp_path / "p.toml")
    (tmp_path / "p.toml").write_text("batch = 0\nmodel = 'm'\nfacts = 'f'\n")
    with pytest.raises(ValueError, match=r"p\.toml: plan: batch must be at least 1"):
        load_plan(tmp_path / "p.toml")


def test_orders() -> None:
    stream = facts(20)
    assert ordered(stream, 0) == stream
    assert ordered(stream, 3) == ordered(stream, 3) != stream
    assert sorted(ordered(stream, 3), key=lambda f: int(f.id)) == stream


def test_conflicts_rewrite_every_fact_with_another_answer_of_its_relation() -> None:
    stream = with_conflicts(facts(10), 2, seed=1)
    assert [f.id for f in stream[10:12]] == ["0~1", "1~1"]
    assert stream[20].id == "0~2"
    for i in range(10):
        first, second, third = stream[i], stream[10 + i], stream[20 + i]
        assert first.text == second.text == third.text
        assert first.target_new == second.target_true != second.target_new
        assert second.target_new == third.target_true != third.target_new
        assert second.target_new in {f.target_new for f in stream[:10] if f.relation == first.relation}
    with pytest.raises(ValueError, match="at least two different answers"):
        with_conflicts(facts(1), 1)
    assert with_conflicts(facts(3), 0) == facts(3)


def test_a_conflict_leaves_neighbours_their_right_answers_and_drops_what_followed_from_the_first() -> None:
    about = {"portability": (("Berlin lies in", ("Gaul",)),), "references": ("Rome is old.",)}
    first = Fact("x", "{} is in", "Lyon", "Italy", "France", (), ("Nice is in",), **about)
    second = Fact(
        "x~1", "{} is in", "Bonn", "Spain", "Germany", (), ("Kiel is in", "Graz is in"), ("Germany", "Austria")
    )
    third = Fact("y", "{} is in", "Pisa", "Malta", None, (), ("Bari is in",))
    stream = with_conflicts([first, second, third], 1)
    assert len({fact.id for fact in stream}) == 6
    again = stream[3:]
    assert [(fact.neighbours, fact.neighbour_answers) for fact in again] == [
        (("Nice is in",), ("France",)),
        (("Kiel is in", "Graz is in"), ("Germany", "Austria")),
        ((), ()),  # nobody knows what is right there, least of all the answer that was written before
    ]
    assert again[0].target_true == "Italy"
    assert [(fact.portability, fact.references) for fact in again] == [((), ())] * 3


def test_groups() -> None:
    stream = with_conflicts(facts(6), 1)
    found = groups(stream[:8], batch=2, first=3, sample=0, once=6)
    assert [f.id for f in found["batch"]] == ["0~1", "1~1"]
    assert [f.id for f in found["all"]] == ["0~1", "1~1", "2", "3", "4", "5"]
    assert [f.id for f in found["first"]] == ["0~1", "1~1", "2"]
    assert "first" not in groups(stream[:3], batch=2, first=3, sample=0)
    assert "first" not in groups(stream, batch=2, first=0, sample=0)
    named = [replace(fact, id=f"record~{fact.id}") for fact in facts(5)]
    assert groups(named, batch=2, first=2, sample=0) == {"batch": named[3:], "all": named, "first": named[:2]}
    spread = groups(facts(10), batch=10, first=0, sample=4)["all"]
    assert [f.id for f in spread] == ["0", "2", "5", "7"]


def test_a_plan_is_plain_values_for_json() -> None:
    import json

    content = Plan("m", "f.jsonl", settings={"all": {"layers": (1, 2)}}).as_dict()
    assert json.loads(json.dumps(content))["settings"] == {"all": {"layers": [1, 2]}}
