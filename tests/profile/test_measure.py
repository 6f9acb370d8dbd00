"""A profile: every failure is a row, every group holds the baseline, stages have names."""

from __future__ import annotations

import re
import time
from collections import Counter
from pathlib import Path

import pytest
import torch

from rlsedit_kernels import profile
from rlsedit_kernels.profile import Contender, Problem, Settings
from rlsedit_kernels.profile.measuring import _Cell, _groups, _in_the_way

QUICK = Settings(repetitions=3, cold=False)


class Sleeper:
    """A step of known length in two stages."""

    def __init__(self, problem: Problem) -> None:
        self.calls = 0

    def __call__(self, K: torch.Tensor, V: torch.Tensor) -> None:
        self.calls += 1
        with profile.stage("short"):
            time.sleep(0.004)
        with profile.stage("long"), profile.stage("inner"):  # the outer one counts
            time.sleep(0.012)


class Editor:
    """A right step, to be spoilt in one way."""

    def __init__(self, p: Problem) -> None:
        self.C, self.weight = p.covariance(), p.weight.clone()

    def __call__(self, K: torch.Tensor, V: torch.Tensor) -> object:
        Y = self.C @ K.mT
        gain = torch.linalg.solve(torch.eye(len(K)) + K @ Y, Y.mT).mT
        self.C = self.C - gain @ Y.mT
        self.weight = self.weight + gain @ (V - K @ self.weight)
        return None


class ChangesKeys(Editor):
    def __call__(self, K: torch.Tensor, V: torch.Tensor) -> None:
        K.mul_(2.0)
        super().__call__(K, V)


class ChangesTargets(Editor):
    def __call__(self, K: torch.Tensor, V: torch.Tensor) -> None:
        V.numpy()[:] = 0.0
        super().__call__(K, V)


class ChangesTheFirstWeight(Editor):
    def __init__(self, p: Problem) -> None:
        super().__init__(p)
        self.first = p.weight

    def __call__(self, K: torch.Tensor, V: torch.Tensor) -> None:
        super().__call__(K, V)
        self.first.data.copy_(self.weight)


class ChangesAndRaises(ChangesKeys):
    def __call__(self, K: torch.Tensor, V: torch.Tensor) -> None:
        super().__call__(K, V)
        raise RuntimeError("in the middle")


class Yields(Editor):
    def __call__(self, K: torch.Tensor, V: torch.Tensor):
        yield super().__call__(K, V)


class Awaits(Editor):
    async def __call__(self, K: torch.Tensor, V: torch.Tensor) -> None:
        super().__call__(K, V)


class Transposed(Editor):
    def __call__(self, K: torch.Tensor, V: torch.Tensor) -> None:
        self.weight = self.weight[:1]


class Diverged(Editor):
    def __call__(self, K: torch.Tensor, V: torch.Tensor) -> None:
        self.weight = self.weight * float("nan")


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (ChangesKeys, "changed K in place"),
        (ChangesTargets, "changed V in place"),
        (ChangesTheFirstWeight, "changed problem.weight in place"),
        (ChangesAndRaises, "in the middle"),
        (Yields, "got a generator"),
        (Awaits, "got a coroutine"),
        (Transposed, r"must have shape \(d, v\) = \(96, 20\), got \(1, 20\)"),
        (Diverged, "not finite"),
    ],
)
def test_a_step_that_spoils_or_does_no_work_is_a_row_of_its_own(problem, found, kind, message) -> None:
    cells = [Contender("spoilt", kind, truth="anchor"), Contender("right", Editor, truth="anchor")]
    spoilt, right = profile.measure(cells, problem, QUICK, found=found).rows
    assert spoilt.status == "failed"
    assert re.search(message, spoilt.reason), spoilt.reason
    assert right.status == "measured"
    assert right.error is not None
    assert right.error < 1e-5
    assert problem.restore() == ()


def test_a_stage_may_be_called_other(problem, found) -> None:
    class Named:
        def __init__(self, p: Problem) -> None: ...

        def __call__(self, K: torch.Tensor, V: torch.Tensor) -> None:
            with profile.stage("other"):
                time.sleep(0.01)

    (row,) = profile.measure([Contender("named", Named)], problem, QUICK, found=found).rows
    assert row.times is not None
    assert [stage.name for stage in row.stages] == ["other"]
    assert row.stages[0].seconds == pytest.approx(row.times.median)


@pytest.mark.parametrize(
    ("arguments", "kind"),
    [(("", Editor), TypeError), (("mine", None), TypeError), (("mine", Editor, "", "S0"), ValueError)],
)
def test_a_contender_is_checked_when_it_is_made(arguments, kind) -> None:
    with pytest.raises(kind, match="Contender: "):
        Contender(*arguments)


def test_what_is_no_contender_is_refused(problem, found) -> None:
    with pytest.raises(TypeError, match="must be Contender"):
        profile.measure([Editor], problem, QUICK, found=found)


def test_seconds_may_be_without_end(problem, found) -> None:
    settings = Settings(repetitions=2, seconds=float("inf"))
    (row,) = profile.measure([Contender("mine", Editor)], problem, settings, found=found).rows
    assert row.times is not None
    assert row.times.repetitions == 2


@pytest.mark.parametrize("name", ["repetitions", "check"])
def test_counts_are_whole_numbers(name) -> None:
    with pytest.raises(TypeError, match=f"{name} must be an int, got 2.5"):
        Settings(**{name: 2.5})


@pytest.mark.parametrize("device", ["meta", "xpu"])
def test_a_device_without_a_clock_of_ours_is_refused(device) -> None:
    with pytest.raises(ValueError, match="device must be a CPU or a CUDA device"):
        Problem(8, 1, 1, device=device)


def test_rows_have_work_memory_and_ratio(whole) -> None:
    base = next(row for row in whole.rows if row.name == profile.BASELINE)
    assert base.ratio == 1.0
    d, u, v = 96, 8, 20
    assert base.flops == pytest.approx(3 * d * d * u + 3 * d * u * u + u**3 / 3 + 4 * d * u * v)
    for row in whole.rows:
        assert row.times is not None
        assert row.times.repetitions == 3
        assert row.ratio == pytest.approx(row.times.median / base.times.median)
        assert row.flops > 0
        assert row.bytes >= d * d * 4
        assert sum(s.flops for s in row.stages) == pytest.approx(row.flops)
        assert row.per_edit == row.times.median / u


def test_stages_are_timed_by_their_outermost_name(problem, found) -> None:
    (row,) = profile.measure([Contender("sleeper", Sleeper)], problem, QUICK, found=found).rows
    stages = {stage.name: stage.seconds for stage in row.stages}
    assert set(stages) == {"short", "long", "other"}
    assert 0.004 <= stages["short"] < stages["long"]
    assert row.times.median >= 0.016
    assert row.error is None
    assert row.ratio is None


def test_a_stage_outside_of_a_profile_does_nothing() -> None:
    with profile.stage("anything"):
        pass


def test_what_a_contender_does_wrong_is_a_row(problem, found) -> None:
    class Fails:
        def __init__(self, p: Problem, at: int) -> None:
            self.left = at

        def __call__(self, K: torch.Tensor, V: torch.Tensor) -> None:
            self.left -= 1
            if self.left < 0:
                raise RuntimeError("out of\nluck")

    late = [Contender(f"after {n}", lambda p, n=n: Fails(p, n)) for n in (0, 4)]
    rows = profile.measure(
        [*profile.named(["rlsedit, ops"], profile.catalogue("cpu")[:1]), *late], problem, QUICK, found=found
    ).rows
    assert [row.status for row in rows] == ["measured", "failed", "failed"]
    assert rows[1].reason == rows[2].reason == "RuntimeError: out of luck"
    assert rows[2].times is None


def test_what_does_not_fit_is_skipped_with_its_size(problem, found) -> None:
    rows = profile.measure(
        profile.catalogue("cpu"), problem, Settings(repetitions=1, memory=2.2e5, cold=False), found=found
    ).rows
    skipped = {row.name: row.reason for row in rows if row.status == "skipped"}
    assert "MEMIT, float64" in skipped
    need, most = re.fullmatch(r"needs (\S+) GB, (\S+) GB may be used", skipped["MEMIT, float64"]).groups()
    assert float(need) > float(most) == pytest.approx(2.2e-4)  # also where both are far below one
    assert any(row.status == "measured" for row in rows)


def test_what_would_take_too_long_is_skipped_with_its_estimate(problem, found) -> None:
    slow = Contender("slow", Sleeper, flops=lambda p: 1e15)
    (row,) = profile.measure([slow], problem, QUICK, found=found).rows
    assert row.status == "skipped"
    assert "the limit is 600 s" in row.reason


@pytest.mark.parametrize(
    ("settings", "history", "age", "told"),
    [
        (Settings(), 10**19, None, "10000000000000000000 batches before it would take about"),
        (Settings(), 10**19, 0.0, ""),
        (Settings(), 5, None, ""),
        (Settings(check=10**12), 0, None, "1000000000000 batches for its error would take about"),
    ],
)
def test_batches_before_the_clock_that_would_never_end_are_not_begun(problem, found, settings, history, age, told):
    """They were written one by one; what ages at no cost is not held back by the cost of its steps."""
    given = None if age is None else lambda p: age
    one = Contender("one", Sleeper, flops=lambda p: 1e6, age=given)
    reason = _in_the_way(_Cell(one, history), problem, settings, found, 1e9)
    assert reason.startswith(told)
    assert bool(reason) == bool(told)


def test_a_float64_solution_that_does_not_fit_is_told_of_and_not_tried(problem, found) -> None:
    one = Contender("one", Sleeper, bytes=lambda p: 1.0, truth="anchor")
    need = 16.0 * problem.d**2
    assert _in_the_way(_Cell(one, 0), problem, Settings(), found, need) == ""
    reason = _in_the_way(_Cell(one, 0), problem, Settings(), found, need - 1.0)
    assert reason == "needs 0.000147 GB for the float64 solution, 0.000147 GB may be used"


def test_a_problem_that_does_not_fit_is_refused_before_it_is_made(found, monkeypatch) -> None:
    """torch was asked for it, or the system ended the process."""
    huge = {"d": 10**6, "v": 10**6, "u": 100}
    need = 8.0 * 10**12 / 1e9  # the weight twice, while it is drawn
    with pytest.raises(ValueError, match=rf"d = 1000000, v = 1000000, u = 100: .* {need:.1f} GB on cpu, .* memory"):
        profile.require_room([huge])
    profile.require_room([huge], memory=1.01e9 * need)
    with pytest.raises(ValueError, match="--memory says otherwise"):
        profile.require_room([{**huge, "d": 8, "v": 8}, huge], 0.99e9 * need, "--memory")
    monkeypatch.setattr("rlsedit_kernels.profile.growth.Problem", None)  # none is made
    with pytest.raises(ValueError, match="d = 1000000, v = 20"):
        profile.sweep("d", (96, 10**6), lambda _: [], {"d": 96, "v": 20, "u": 8}, Settings(memory=1e6), found=found)


def test_the_baseline_is_in_every_group(problem, found) -> None:
    def of(name: str, size: float) -> _Cell:
        return _Cell(Contender(name, Sleeper, bytes=lambda p: size), 0)

    cells = [of("base", 2.0), of("a", 5.0), of("b", 4.0), of("c", 3.0), of("d", 8.0)]
    groups = [[cell.contender.name for cell in group] for group in _groups(cells, problem, "base", 10.0)]
    assert groups == [["base", "a"], ["base", "b", "c"], ["base", "d"]]


def test_history_is_written_first_and_ages_stand_side_by_side(problem, found) -> None:
    calls: Counter[str] = Counter()

    class Ages(Sleeper):
        def age(self, K: torch.Tensor, V: torch.Tensor) -> None:
            calls["aged"] += 1

    settings = Settings(repetitions=2, cold=False, check=1)
    rows = profile.measure([Contender("one", Ages)], problem, settings, history=(0, 5), found=found).rows
    assert [row.problem["history"] for row in rows] == [0, 5]
    assert calls["aged"] == 4  # five, less the batch of the check


def test_a_slow_contender_is_counted_on_the_clock_and_not_asked_for_again(problem, found, monkeypatch) -> None:
    monkeypatch.setattr("rlsedit_kernels.profile.measuring._SLOW", 0.0)
    (one,) = profile.named(["plain torch Woodbury"], profile.catalogue("cpu"))
    calls = []

    class Counts:
        def __init__(self, p: Problem) -> None:
            self.step = one.make(p)

        def __call__(self, K: torch.Tensor, V: torch.Tensor) -> None:
            calls.append(1)
            self.step(K, V)

    settings = Settings(repetitions=9, seconds=1e-9, cold=False)
    (row,) = profile.measure([Contender("slow", Counts)], problem, settings, found=found).rows
    assert len(calls) == row.times.repetitions == 2  # the batches of the check
    (quick,) = profile.measure([one], problem, QUICK, found=found).rows
    monkeypatch.undo()
    (reference,) = profile.measure([one], problem, QUICK, found=found).rows
    assert row.flops == quick.flops == reference.flops > 0
    assert [s.flops for s in row.stages] == [s.flops for s in reference.stages]
    calls.clear()
    profile.measure([Contender("old", Counts)], problem, settings, history=(5,), found=found)
    assert len(calls) == 5 + 4 + 1  # five written before, four of warming up and counting, one sample


def test_layers_multiply_the_steps(found) -> None:
    problem = Problem(32, 8, 4, layers=3)
    contenders = profile.catalogue("cpu", 3)
    rows = {row.name: row for row in profile.measure(contenders, problem, QUICK, found=found).rows}
    one = {
        row.name: row for row in profile.measure(profile.catalogue("cpu"), Problem(32, 8, 4), QUICK, found=found).rows
    }
    base = profile.BASELINE
    assert rows[base].flops == pytest.approx(3 * one[base].flops)
    assert rows["rlsedit, layers at once"].flops == pytest.approx(rows[base].flops)
    assert rows["rlsedit, layers at once"].error < 1e-5
    assert "rlsedit, layers at once" not in one


def test_a_forced_back_end_is_in_force(problem, found) -> None:
    import rlsedit_kernels as rk

    seen = []

    class Asks(Sleeper):
        def __call__(self, K: torch.Tensor, V: torch.Tensor) -> None:
            seen.append(rk.backends.__module__)
            Y, _ = rk.ops.gain_products(torch.eye(K.shape[1]), K)
            assert Y.shape == (K.shape[1], K.shape[0])

    (row,) = profile.measure([Contender("x", Asks, backend="nowhere")], problem, QUICK, found=found).rows
    assert row.status == "failed"
    assert "nowhere" in row.reason
    (row,) = profile.measure([Contender("x", Asks, backend="torch")], problem, QUICK, found=found).rows
    assert row.status == "measured"
    assert seen


@pytest.mark.parametrize(
    ("contenders", "history", "message"),
    [
        ([], (0,), "at least one, got none"),
        ([Contender("a", Sleeper), Contender("a", Sleeper)], (0,), "distinct names"),
        ([Contender("a", Sleeper)], (-1,), "none negative"),
        ([Contender("a", Sleeper)], (), "distinct numbers of batches"),
    ],
)
def test_wrong_calls(problem, found, contenders, history, message) -> None:
    with pytest.raises(ValueError, match=message):
        profile.measure(contenders, problem, QUICK, history=history, found=found)


@pytest.mark.parametrize("values", [{"repetitions": 0}, {"check": 0}, {"seconds": 0.0}, {"limit": float("nan")}])
def test_wrong_settings(values) -> None:
    with pytest.raises(ValueError, match=next(iter(values))):
        Settings(**values)


def test_a_truth_that_there_is_not_is_refused() -> None:
    """Any other word was compared with the solution on the null space."""
    with pytest.raises(ValueError, match="truth must be one of 'anchor', 'null_space', or None, got 'alphaedit'"):
        Contender("a", Sleeper, truth="alphaedit")  # type: ignore[arg-type]


def test_an_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(ValueError, match="none is called 'nobody'; there are rlsedit, ops"):
        profile.named(["nobody"], profile.catalogue("cpu"))


def test_the_example_of_the_documentation_runs(tmp_path, monkeypatch, found) -> None:
    text = (Path(__file__).resolve().parents[2] / "docs" / "profile.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert "d=1536, v=576, u=100" in code
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("rlsedit_kernels.profile.measuring.ceilings", lambda device: found)
    names: dict[str, object] = {}
    exec(code.replace("d=1536, v=576, u=100", "d=48, v=6, u=5"), names)
    row = next(row for row in profile.load(tmp_path / "profile.json").rows if row.name == "mine")
    assert row.status == "measured"
    assert row.error is not None
    assert row.error < 1e-3
    assert "solve" in [stage.name for stage in row.stages]


def test_a_ratio_is_to_the_baseline_of_its_own_group(found) -> None:
    """The baseline takes longer in the second group: each row keeps the median that its ratio is of."""
    made = []

    class Slowing:
        def __init__(self, problem: Problem) -> None:
            self.seconds = 0.002 * (1 + 20 * len(made))
            made.append(self)

        def __call__(self, K: torch.Tensor, V: torch.Tensor) -> None:
            time.sleep(self.seconds)

    class Other:
        def __init__(self, problem: Problem) -> None:
            pass

        def __call__(self, K: torch.Tensor, V: torch.Tensor) -> None:
            time.sleep(0.004)

    contenders = [
        Contender("base", Slowing, truth=None, bytes=lambda p: 1.0),
        Contender("a", Other, truth=None, bytes=lambda p: 6.0),
        Contender("b", Other, truth=None, bytes=lambda p: 6.0),
    ]
    settings = Settings(repetitions=3, cold=False, memory=10.0, baseline="base")
    base, a, b = profile.measure(contenders, Problem(16, 4, 2), settings, found=found).rows
    assert len(made) == 2
    assert base.baseline == a.baseline == base.times.median
    assert b.baseline > 2 * a.baseline
    for row in (base, a, b):
        assert row.ratio == pytest.approx(row.times.median / row.baseline)
        assert row.compared_with == row.baseline
        assert row.baseline_repetitions == 3


@pytest.mark.parametrize("name", ["seconds", "limit", "memory"])
@pytest.mark.parametrize("value", [0.0, -1.0, float("nan")])
def test_settings_that_leave_nothing_to_run_are_refused(name, value) -> None:
    with pytest.raises(ValueError, match=f"profile: {name} must be positive"):
        Settings(**{name: value})
