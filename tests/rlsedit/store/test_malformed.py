"""A thousand malformed requests: never a traceback, never a NaN in a weight, never a changed file after a refusal."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from support import language_models as lm
from support.editors import facts
from transformers import AutoModelForCausalLM

from rlsedit.cli import main
from rlsedit.facts import save_facts

LINES = 17  # of one run; 45 runs, and 150 files and 100 command lines besides: 1,015 requests
ONCE = dict(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
            derandomize=True)  # fmt: skip

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=6,
)


@st.composite
def spoilt(draw: st.DrawFn) -> bytes:
    """A fact with one thing wrong, as a line."""
    fact = facts(1, 20 + draw(st.integers(0, 15)))[0].to_dict()
    how = draw(st.sampled_from(["missing", "type", "blank", "prompt", "unknown", "surrogate", "cut", "list", "used"]))
    name = draw(st.sampled_from(["prompt", "subject", "target_new"]))
    if how == "missing":
        del fact[name]
    elif how == "type":
        fact[name] = draw(json_values.filter(lambda value: not isinstance(value, str)))
    elif how == "blank":
        fact[name] = draw(st.sampled_from(["", " ", "\n\t", "\u2003"]))
    elif how == "prompt":
        fact["prompt"] = draw(st.sampled_from(["no place", "{} and {}", "{x}", "{"]))
    elif how == "unknown":
        fact[draw(st.text(min_size=1, max_size=5).filter(lambda key: key not in fact))] = draw(json_values)
    elif how == "surrogate":
        fact[draw(st.sampled_from(["subject", "target_new", "id"]))] = "\ud800" + draw(st.text(max_size=3))
    elif how == "list":
        fact["paraphrases"] = draw(st.sampled_from(["text", [1], [None], {"a": 1}, [[]]]))
    elif how == "used":
        fact["id"] = "f0"
    line = json.dumps(fact).encode()
    return line[: draw(st.integers(1, len(line) - 1))] if how == "cut" else line


malformed = (
    spoilt()
    | st.binary(min_size=1, max_size=40).filter(
        lambda raw: b"\n" not in raw and raw.strip() and b"requested" not in raw
    )
    | json_values.map(lambda value: json.dumps(value).encode())
    | st.integers(900, 200_000).map(lambda depth: b"[" * depth)
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("malformed")
    lm.on_disk(root)
    save_facts(facts(2), root / "facts.jsonl")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RLSEDIT_CACHE", str(root / "cache"))
        assert main(["edit", str(root / "llama"), "--facts", str(root / "facts.jsonl"), "--out", str(root / "out"),
                     "--text", str(root / "text.txt"), "--layers", "1-2", "--set", "steps=2", "--set", "contexts=0",
                     "--device", "cpu", "--no-evaluate"]) == 0  # fmt: skip
    return root


def content(out: Path) -> dict[str, bytes]:
    return {str(path.relative_to(out)): path.read_bytes() for path in out.rglob("*") if path.is_file()}


def finite(out: Path) -> bool:
    model = AutoModelForCausalLM.from_pretrained(out, dtype="auto")
    return all(bool(value.isfinite().all()) for value in model.state_dict().values())


@settings(max_examples=45, **ONCE)  # type: ignore[arg-type]
@given(st.lists(malformed, min_size=LINES, max_size=LINES))
def test_lines_of_a_stream(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], lines: list[bytes]
) -> None:
    before = content(folder / "out")
    with monkeypatch.context() as patch:
        patch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"\n".join(lines) + b"\n")))
        assert main(["edit", str(folder / "llama"), "--facts", "-", "--out", str(folder / "out"), "--resume",
                     "--device", "cpu"]) == 0  # fmt: skip
    shown = capsys.readouterr()
    found: list[dict[str, Any]] = [json.loads(line) for line in shown.out.splitlines()]
    assert [answer["status"] for answer in found] == ["error"] * LINES
    assert [answer["line"] for answer in found] == list(range(1, LINES + 1))
    assert all(answer["error"] for answer in found)
    assert "Traceback" not in shown.err
    assert content(folder / "out") == before


@settings(max_examples=150, **ONCE)  # type: ignore[arg-type]
@given(malformed, st.integers(0, 2))
@example(b"\x1c", 0)  # white space to Python, not to JSON
@example("\u2028".encode(), 1)
def test_files_of_facts(folder: Path, capsys: pytest.CaptureFixture[str], line: bytes, place: int) -> None:
    good = [json.dumps(fact.to_dict()).encode() for fact in facts(2, 10)]
    file, before = folder / "bad.jsonl", content(folder / "out")
    file.write_bytes(b"\n".join([*good[:place], line, *good[place:]]))
    status = main(["edit", str(folder / "llama"), "--facts", str(file), "--out", str(folder / "out"), "--resume",
                   "--device", "cpu", "--no-evaluate"])  # fmt: skip
    error = capsys.readouterr().err
    assert status == 2, error
    assert "Traceback" not in error
    assert error.splitlines()[-1].startswith("rlsedit: ")
    assert content(folder / "out") == before


@settings(max_examples=100, **ONCE)  # type: ignore[arg-type]
@given(
    st.sampled_from(["edit", "log", "remove"]),
    st.lists(
        st.sampled_from(["--undo", "--follow", "--resume", "--force", "--on-conflict", "replace", "--batch", "-1",
                         "--last", "--state", "--check", "--json", "--set", "steps=x", "--layers", "OUT", "f0", "-"])
        | st.text(max_size=6).filter(lambda text: "-h" not in text and "\0" not in text),
        max_size=6,
    ),
)  # fmt: skip
def test_command_lines(folder: Path, capsys: pytest.CaptureFixture[str], command: str, words: list[str]) -> None:
    words = [str(folder / "none") if word == "OUT" else word for word in words]
    before = content(folder / "out")
    status = main([command, *words])
    error = capsys.readouterr().err
    assert status == 2, error
    assert "Traceback" not in error
    assert content(folder / "out") == before


def test_at_the_end_no_weight_is_nan(folder: Path) -> None:
    assert finite(folder / "out")
