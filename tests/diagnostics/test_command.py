"""`rlsedit stability` on the command line."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from pathlib import Path

import pytest
import torch
from support import markdown

from rlsedit.cli.main import main
from rlsedit.recorded import save_streams
from rlsedit.report import Console, stability
from rlsedit_kernels import Prior
from rlsedit_kernels.diagnostics import STREAMS, Batch, least_bytes, load, make_steps, make_stream, run_trials
from rlsedit_kernels.profile.machine import Peak

SMALL = ["--dk", "16", "--batch", "4", "--batches", "30"]


class Mine:
    """A step of one's own, named on the command line."""

    def __init__(self, stream) -> None:
        self.weight = stream.W_0.clone()

    def update(self, K, V, noise, forget) -> None:
        raise ArithmeticError("not mine")


class Buggy(Mine):
    """One that does not refuse but is wrong, at its third batch or when it is asked for its weight."""

    def update(self, K, V, noise, forget) -> None:
        self.left = getattr(self, "left", 3) - 1
        if not self.left:
            raise RuntimeError("boom | of a bar")


class Shapeless(Mine):
    def update(self, K, V, noise, forget) -> None:
        self.weight = K @ V


class Unmade:
    def __init__(self, stream) -> None:
        raise KeyError("nowhere")


def run(*arguments: str) -> int:
    return main(["stability", *arguments])


def test_tables_files_and_figures(tmp_path, capsys) -> None:
    out = tmp_path / "out"
    assert run(*SMALL, "--streams", "weak-1, mixed", "--condition", "1e6", "--out", str(out)) == 0
    shown = capsys.readouterr().out
    assert "weak-1" in shown
    assert "condition-1e6" in shown
    assert "said before" in shown
    settings, trials = load(out / "results.json")
    assert settings["batches"] == 30
    assert {trial.stream for trial in trials} == {"weak-1", "mixed", "condition-1e6"}
    for name in ("errors.svg", "health.svg"):
        root = ET.parse(out / name).getroot()
        assert root.tag.endswith("svg")
    assert "| weak-1 |" in (out / "stability.md").read_text(encoding="utf-8")


def test_a_step_of_ones_own_and_float64(capsys) -> None:
    status = run(
        *SMALL, "--streams", "easy", "--forms", "plain", "--dtypes", "float64", "--no-published", "--backend", "torch",
        "--step", f"{__name__}:Mine",
    )  # fmt: skip
    shown = capsys.readouterr().out
    assert status == 0
    assert "plain float64" in shown
    assert "refused 1" in shown
    assert "woodbury" not in shown


def test_a_recorded_stream(tmp_path, capsys) -> None:
    generator = torch.Generator().manual_seed(0)
    batches = [Batch(torch.randn(2, 6, generator=generator), torch.randn(2, 3, generator=generator)) for _ in range(3)]
    save_streams(tmp_path / "run.safetensors", {5: (Prior.ridge(6, 1.0), batches)})
    assert run("--stream", str(tmp_path / "run.safetensors")) == 0
    assert "run, layer 5" in capsys.readouterr().out


def test_sizes_are_those_of_the_stream_that_was_followed(tmp_path, capsys) -> None:
    """Not the defaults of --d, --u, --v and --batches; layers and batches may differ."""
    generator = torch.Generator().manual_seed(0)

    def batches(d: int, *sizes: int) -> list[Batch]:
        return [Batch(torch.randn(u, d, generator=generator), torch.randn(u, 3, generator=generator)) for u in sizes]

    file, out = tmp_path / "run.safetensors", tmp_path / "out"
    save_streams(file, {5: (Prior.ridge(6, 1.0), batches(6, 2, 2, 1))})
    assert run("--stream", str(file), "--out", str(out)) == 0
    sizes = "d = 6, u = 1 to 2, v = 3, 3 batches"
    assert sizes in capsys.readouterr().out
    assert f"({sizes})" in (out / "stability.md").read_text(encoding="utf-8")
    settings, _ = load(out / "results.json")
    assert settings["sizes"] == {"run, layer 5": {"d": 6, "u": [1, 2], "v": 3, "batches": 3}}
    assert not {"d", "u", "v", "batches", "seed"} & set(settings)
    save_streams(file, {5: (Prior.ridge(6, 1.0), batches(6, 2, 2, 1)), 7: (Prior.ridge(8, 1.0), batches(8, 2))})
    assert run("--stream", str(file), "--batches", "2") == 0
    assert "d = 6 to 8, u = 2, v = 3, 1 to 2 batches" in capsys.readouterr().out
    assert run(*SMALL, "--streams", "easy", "--forms", "plain", "--no-published") == 0
    assert "d = 16, u = 4, v = 4, 30 batches" in capsys.readouterr().out


def test_a_mistake_in_a_step_is_an_error_with_its_message_and_no_refusal(tmp_path, capsys) -> None:
    steps = [f"--step={__name__}:{name}" for name in ("Mine", "Buggy", "Shapeless", "Unmade")]
    out = tmp_path / "out"
    assert run(*SMALL, "--streams", "easy,weak-1", "--forms", "plain", "--no-published", *steps, "--out", str(out)) == 0
    shown, page = capsys.readouterr().out, (out / "stability.md").read_text(encoding="utf-8")
    expected = [
        "Mine: refused: easy at 1, weak-1 at 1: ArithmeticError: not mine",
        "Buggy: error: easy at 3, weak-1 at 3: RuntimeError: boom | of a bar",
        "Shapeless: error: easy at 1, weak-1 at 1: RuntimeError: mat1 and mat2 shapes cannot be multiplied",
        "Unmade: error: easy when made, weak-1 when made: KeyError: 'nowhere'",
    ]
    for text in (shown, page):
        assert all(f"{__name__}:{line}" in text for line in expected)
    assert "refused 1" in shown
    assert "error 3" in shown
    assert shown.count("refused 3") == 0
    errors, health = markdown.tables(page)
    assert errors[0][2:] == [f"{__name__}:{name}" for name in ("Mine", "Buggy", "Shapeless", "Unmade")]
    assert errors[1][2] == "†1"
    assert errors[1][3].endswith("‡3")
    assert errors[1][4:] == ["‡1", "‡0"]
    assert "‡: ended there by an error of the step" in page
    rows = {row[0]: row[1] for row in health[1:]}
    assert rows == {"plain": "2", f"{__name__}:Shapeless": "0 of 2", f"{__name__}:Unmade": "0 of 2"}
    kept = {trial.step.split(":")[-1]: trial for trial in load(out / "results.json")[1]}
    assert (kept["Buggy"].refused_at, kept["Buggy"].failed_at) == (None, 3)
    assert (kept["Mine"].refused_at, kept["Mine"].failed_at) == (1, None)


def test_nothing_but_errors_is_a_failed_run_that_writes_what_it_has(tmp_path, capsys) -> None:
    from rlsedit.cli import stability as command
    from rlsedit_kernels.diagnostics import make_stream, run_trials

    trials = run_trials(make_stream("easy", 8, 2), {"unmade": Unmade}, 3)
    command._report(Console(), {"sizes": {"easy": {"d": 8, "u": [2], "v": 4, "batches": 3}}}, trials, tmp_path / "out")
    assert "unmade: error: easy when made: KeyError: 'nowhere'" in capsys.readouterr().out
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"results.json", "stability.md"}


def test_lines_differ_in_grey(tmp_path, monkeypatch) -> None:
    from rlsedit.report import stability_plots
    from rlsedit_kernels.diagnostics import Point, Trial

    trials = [Trial("easy", f"step {i}", (Point(1, 0.1, 0.1, 0.1), Point(2, 0.1, 0.1, 0.1)), 0.0, None, None)
              for i in range(20)]  # fmt: skip
    seen = []
    monkeypatch.setattr(stability_plots, "save_figure", lambda figure, path: seen.extend(figure.axes[0].lines[:20]))
    stability_plots.plot_errors(trials, tmp_path / "x.svg")
    assert len({(line.get_marker(), line.get_fillstyle()) for line in seen}) == 20
    assert all(line.get_markevery()[0] < 2 for line in seen), "a short line has a mark as well"


def test_names(capsys) -> None:
    assert run("--list") == 0
    shown = capsys.readouterr().out
    assert all(name in shown for name in STREAMS)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--streams", "nothing"], "name must be"),
        (["--condition", "0"], "--condition: needs a number of at least 1, got '0'"),
        (["--condition", "x"], "--condition: needs a number of at least 1, got 'x'"),
        (["--forms", "cubic"], "form must be one of"),
        (["--dtypes", "float16"], "dtype must be one of"),
        (["--step", "nothing"], "needs MODULE:NAME"),
        (["--step", "math:nothing"], "has no 'nothing'"),
        (["--step", "math:pi"], "must be callable"),
        (["--step", "no_such_module:x"], "--step: no module 'no_such_module' beside or on the path"),
        (["--forms", ""], "--forms: needs at least one name, got ''"),
        (["--dtypes", ","], "--dtypes: needs at least one name, got ','"),
        (["--condition", "1e400"], "--condition: needs a number of at least 1, got '1e400'"),
        (["--backend", "cuda"], "back end 'cuda' is not available"),
        (["--batches", "0"], "at least 1"),
        (["--streams", ","], "at least one name"),
        (["--device", "nowhere"], "--device"),
        (["--device", "cpu", "--backend", "cubic"], "back end must be one of"),
    ],
)
def test_errors_take_one_line(arguments, message, capsys) -> None:
    assert run(*SMALL, *arguments) == 2
    shown = capsys.readouterr().err
    assert message in shown
    assert shown.count("\n") == 1
    assert "Traceback" not in shown


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--stream", "missing.safetensors"], "no file"),
        (["--stream", "missing.safetensors", "--streams", "easy"], "--streams: has no effect with --stream"),
        (["--stream", "missing.safetensors", "--condition", "1e5"], "--condition: has no effect with --stream"),
        (["--stream", "missing.safetensors", "--dk", "16"], "--dk: has no effect with --stream"),
        (["--full", "--batches", "30"], "--batches: has no effect with --full"),
        (["--full", "--out", "there"], "--out: has no effect with --full"),
        (["--full", "--streams", "condition-1e5"], "--streams: must be among"),
        (["--page", "--forms", "plain"], "--forms: has no effect with --page alone"),
        (["--again", "--streams", "easy"], "--again: goes with --full"),
    ],
)
def test_an_option_that_would_be_passed_over_is_refused(arguments, message, capsys, monkeypatch) -> None:
    """Before anything is followed or written; a recorded stream was followed in the place of those asked for."""
    for name in ("_follow", "_write_page"):
        monkeypatch.setattr(f"rlsedit.cli.stability.{name}", lambda *_: pytest.fail("nothing may be done"))
    assert run(*arguments) == 2
    shown = capsys.readouterr().err
    assert message in shown
    assert shown.count("\n") == 1


@pytest.mark.parametrize("sizes", [["--dk", "1000000"], ["--dv", "1000000000000"], ["--batch", "1000000000000"]])
def test_sizes_that_cannot_fit_are_refused_before_a_stream_is_made(sizes, capsys, monkeypatch) -> None:
    monkeypatch.setattr("rlsedit.cli.stability._streams", lambda *_: pytest.fail("nothing may be made"))
    assert run(*sizes) == 2
    shown = capsys.readouterr().err
    assert " ".join(sizes) in shown
    assert "take at least" in shown
    assert shown.count("\n") == 1


def test_the_least_memory_is_no_more_than_is_taken() -> None:
    """Above what a run takes it would refuse sizes that fit."""
    d, u, v = 1200, 40, 600
    steps = make_steps(("plain", "inverse-root"), published=False)
    run_trials(make_stream("easy", 8, 2, 2), steps, 2)  # what is loaded once is no part of it
    with Peak(torch.device("cpu")) as peak:
        run_trials(make_stream("easy", d, u, v), steps, 2, covariances=False)
    if peak.bytes is None:
        pytest.skip("the system does not tell the memory of a process")
    assert 0.2 * peak.bytes <= least_bytes(d, u, v, len(steps)) <= peak.bytes


def test_the_full_run_takes_the_streams_of_the_page() -> None:
    from rlsedit.cli.stability import _full_names

    committed = {trial.stream for trial in load(stability.RESULTS)[1]}
    assert set(_full_names(None)) == committed
    assert _full_names("all") == list(STREAMS)
    assert _full_names("tiny, easy") == ["tiny", "easy"]


def test_the_full_run_keeps_its_order_and_leaves_out_steps_that_are_no_more(tmp_path, monkeypatch) -> None:
    """Columns of the page are in one order, whichever was measured last; a step that was renamed does not stay."""
    from rlsedit.cli import stability as command
    from rlsedit_kernels.diagnostics import Point, Trial, save

    results = tmp_path / "results.json"
    monkeypatch.setattr(stability, "RESULTS", results)
    monkeypatch.setattr(command, "FULL", {"d": 8, "u": 2, "v": 2, "batches": 12, "each_decade": 3})
    point = (Point(1, 0.5, 0.5, 0.5),)
    kept = ("guarded float64", "normal-equations", "a step of once", "auto", "plain")
    save(results, {}, [Trial("weak-1", name, point, 0.0, None, None) for name in kept])
    assert run("--full", "--again", "--streams", "weak-1", "--forms", "plain", "--no-published") == 0
    trials = load(results)[1]
    assert [trial.step for trial in trials] == ["plain", "auto", "normal-equations", "guarded float64"]
    assert [trial.worst == 0.5 for trial in trials] == [False, True, True, True]


def test_the_full_run_resumes_and_the_page_is_written(tmp_path, monkeypatch, capsys) -> None:
    from rlsedit.cli import stability as command
    from rlsedit.report import theory_plots

    results, page = tmp_path / "results.json", tmp_path / "stability.md"
    monkeypatch.setattr(stability, "RESULTS", results)
    monkeypatch.setattr(command, "FULL", {"d": 8, "u": 2, "v": 2, "batches": 12, "each_decade": 3})
    assert run("--full", "--streams", "weak-1") == 0
    assert run("--full", "--streams", "weak-1,anchored") == 0
    shown = capsys.readouterr().out
    assert shown.count("weak-1") == 1
    order = [trial.stream for trial in load(results)[1]]
    assert order == sorted(order, key=list(STREAMS).index)
    page.write_text(f"# Stability\n{stability.BEGIN}\nout of date\n{stability.END}\nkept\n", encoding="utf-8")
    monkeypatch.setattr(theory_plots, "BATCHES", 10)
    for name in ("plot_bounds", "plot_consistency", "plot_limits"):
        monkeypatch.setattr(theory_plots, name, lambda path: Path(path).write_text("<svg/>"))
    stability.write_page(results, page)
    text = page.read_text(encoding="utf-8")
    assert text.startswith("# Stability\n")
    assert text.endswith("\nkept\n")
    assert "out of date" not in text
    assert "| anchored |" in text
    page.write_text("no markers", encoding="utf-8")
    with pytest.raises(ValueError, match="must hold"):
        stability.write_page(results, page)


def test_figures_of_theory(tmp_path) -> None:
    from rlsedit.report import theory_plots

    theory_plots.plot_bounds(tmp_path / "bounds.svg", 10)
    theory_plots.plot_consistency(tmp_path / "consistency.svg", 20)
    theory_plots.plot_limits(tmp_path / "limits.svg")
    for path in tmp_path.glob("*.svg"):
        assert ET.parse(path).getroot().tag.endswith("svg")
    again = tmp_path / "again.svg"
    theory_plots.plot_limits(again)
    assert again.read_bytes() == (tmp_path / "limits.svg").read_bytes()


def test_a_stream_that_is_named_twice_is_followed_once(capsys) -> None:
    assert run(*SMALL, "--streams", "easy,easy", "--forms", "plain", "--no-published") == 0
    shown = capsys.readouterr().out
    (line,) = [line for line in shown[shown.index("said before") :].splitlines() if line.startswith("plain")]
    assert line.split()[1] == "1"
