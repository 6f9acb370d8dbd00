"""Facts from files in Hugging Face's cache, by name and in Parquet; nothing is fetched."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants

from rlsedit.cli import main
from rlsedit.evaluation import load_plan
from rlsedit.facts import Fact, load_facts, save_facts
from rlsedit.facts.hub import cached_file

FACTS = [Fact("a", "The capital of {} is", "Mali", "Paris"), Fact("b", "The capital of {} is", "Peru", "Rome")]
COMMIT = "0" * 39 + "1"


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache that holds data/facts.jsonl of the data set owner/name at "main"."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    repo = tmp_path / "datasets--owner--name"
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text(COMMIT)
    folder = repo / "snapshots" / COMMIT / "data"
    folder.mkdir(parents=True)
    save_facts(FACTS, folder / "facts.jsonl")
    return tmp_path


@pytest.mark.parametrize("revision", ["", "@main", f"@{COMMIT}"])
def test_a_cached_file_is_read_by_its_name(cache: Path, revision: str) -> None:
    name = f"hf://datasets/owner/name{revision}/data/facts.jsonl"
    assert load_facts(name) == FACTS
    assert cached_file(name).name == "facts.jsonl"


def test_a_path_stays_what_it_is(tmp_path: Path) -> None:
    assert cached_file(tmp_path / "x.jsonl") == tmp_path / "x.jsonl"


def test_what_is_not_cached_is_named_with_what_is_and_how_to_fetch_it(cache: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"holds data/facts.jsonl .*hf download --repo-type dataset owner"):
        load_facts("hf://datasets/owner/name/x.jsonl")
    with pytest.raises(FileNotFoundError, match=r"not in the cache of Hugging Face; fetch .*--revision v2"):
        load_facts("hf://datasets/owner/other@v2/x.jsonl")


@pytest.mark.parametrize("name", ["hf://models/owner/name/x", "hf://datasets/owner/x.jsonl", "hf:owner"])
def test_other_names_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match="hf://datasets/OWNER/NAME"):
        cached_file(name)


def test_the_command_says_so_in_one_line(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", "smollm2", "--facts", "hf://datasets/owner/name/none.jsonl"]) == 2
    assert "not in the cache of Hugging Face" in capsys.readouterr().err


def test_a_plan_may_name_one(cache: Path, tmp_path: Path) -> None:
    file = tmp_path / "plan.toml"
    file.write_text('model = "smollm2"\nfacts = "hf://datasets/owner/name/data/facts.jsonl"\n')
    assert load_facts(load_plan(file).facts) == FACTS


def _parquet(path: Path, rows: list[dict[str, Any]]) -> Path:
    pyarrow = pytest.importorskip("pyarrow", reason="no package pyarrow")
    from pyarrow import parquet

    parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return path


def test_parquet_gives_the_records_of_json(tmp_path: Path) -> None:
    record = {
        "case_id": 7,
        "requested_rewrite": {
            "prompt": "{} plays the",
            "relation_id": "P1303",
            "subject": "Toko",
            "target_new": {"str": "piano", "id": "Q1"},
            "target_true": {"str": "guitar", "id": "Q2"},
        },
        "paraphrase_prompts": ["Toko is good at the "],
        "neighborhood_prompts": ["Brian plays the"],
    }
    (fact,) = load_facts(_parquet(tmp_path / "facts.parquet", [record]))
    assert fact == Fact(
        "7", "{} plays the", "Toko", "piano", "guitar",
        relation="P1303", paraphrases=("Toko is good at the",), neighbours=("Brian plays the",),
    )  # fmt: skip


def test_bad_parquet_is_an_error_with_file_and_record(tmp_path: Path) -> None:
    file = _parquet(tmp_path / "facts.parquet", [{"prompt": "{} is", "subject": "Mali"}])
    with pytest.raises(ValueError, match=r"facts.parquet, record 1: target_new is missing"):
        load_facts(file)
    file.write_bytes(b"PAR1 cut off")
    with pytest.raises(ValueError, match="not a whole Parquet file"):
        load_facts(file)
