"""`rlsedit stability` on the command line."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from pathlib import Path

import pytest
import torch

from rlsedit.cli.main import main
from rlsedit.recorded import save_streams
from rlsedit.report import stability
from rlsedit_kernels import Prior
from rlsedit_kernels.diagnostics import STREAMS, Batch, load

SMALL = ["--d", "16", "--u", "4", "--batches", "30"]


class Mine:
    """A step of one's own, named on the command line."""

    def __init__(self, stream) -> None:
        self.weight = stream.W_0.clone()

    def update(self, K, V, noise, forget) -> None:
        raise ArithmeticError("not mine")


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


def test_names(capsys) -> None:
    assert run("--list") == 0
    shown = capsys.readouterr().out
    assert all(name in shown for name in STREAMS)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--streams", "nothing"], "name must be"),
        (["--condition", "0"], "name must be"),
        (["--forms", "cubic"], "form must be one of"),
        (["--dtypes", "float16"], "dtype must be one of"),
        (["--step", "nothing"], "needs MODULE:NAME"),
        (["--step", "math:nothing"], "has no 'nothing'"),
        (["--step", "math:pi"], "must be callable"),
        (["--step", "no_such_module:x"], "no_such_module"),
        (["--stream", "missing.safetensors"], "no file"),
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
