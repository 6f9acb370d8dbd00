"""Trials: any step beside the truth, what is told of it, and the file it is kept in."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from support.tolerances import relative_error

import rlsedit_kernels as rk
from rlsedit_kernels.diagnostics import (
    FORMS,
    PUBLISHED,
    Truth,
    checkpoints,
    filter_step,
    load,
    make_steps,
    make_stream,
    measures,
    run_trials,
    save,
)
from rlsedit_kernels.diagnostics.steps import ReleasedStep, WoodburyStep

D, U = 24, 4


class Bare:
    """The least that a step can be: it writes nothing at all."""

    def __init__(self, stream) -> None:
        self.weight = stream.W_0.clone()

    def update(self, K, V, noise, forget) -> None:
        pass


class Refusing(Bare):
    def update(self, K, V, noise, forget) -> None:
        self.left = getattr(self, "left", 7) - 1
        if not self.left:
            raise rk.BreakdownError("that\nis enough")


@pytest.fixture(scope="module")
def trials():
    steps = make_steps(("plain", "square-root"), ("float32", "float64")) | {"bare": Bare, "refusing": Refusing}
    return {t.step: t for t in run_trials(make_stream("condition-1e6", D, U), steps, 60)}


def test_float64_is_exact_and_float32_is_not(trials) -> None:
    for name in ("plain", "square-root"):
        last, wide = trials[name].points[-1], trials[f"{name} float64"].points[-1]
        assert wide.error_W < 1e-9
        assert 1e-8 < last.error_W < 1e-2
        for error in ("error_W_plain", "error_C", "error_C_plain", "error_gain", "error_gain_plain"):
            assert getattr(wide, error) < 1e-7
            assert getattr(wide, error) < getattr(last, error) < 1.0
        assert wide.smallest == pytest.approx(1.0, abs=1e-6)
        assert last.asymmetry == wide.asymmetry == 0.0
        assert wide.condition == pytest.approx(last.condition, rel=0.1)
        assert 0.0 < wide.leverage < 1.0
        assert last.status == "ok"


def test_a_bare_step_is_told_by_its_weight(trials) -> None:
    points = trials["bare"].points
    assert [point.error_W for point in points] == pytest.approx([1.0] * len(points))
    assert {point.error_C for point in points} == {None}
    assert {point.status for point in points} == {None}
    assert trials["bare"].broke_at == 1
    assert trials["bare"].warned_in_time is False


def test_a_refusal_ends_one_trial_only(trials) -> None:
    assert trials["refusing"].refused_at == 7
    assert trials["refusing"].reason == "BreakdownError: that is enough"
    assert trials["refusing"].points[-1].batches == 6
    assert trials["bare"].points[-1].batches == 60


def test_published_sequences_are_worse_than_ours() -> None:
    found = {t.step: t for t in run_trials(make_stream("condition-1e8", D, U), make_steps(("guarded",)), 40)}
    assert set(found) == {"guarded", *PUBLISHED}
    assert found["guarded"].worst < 1e-2
    assert found["released"].worst > 3 * found["guarded"].worst
    assert found["normal-equations"].worst > 10 * found["guarded"].worst


@pytest.mark.parametrize("kind", [ReleasedStep, WoodburyStep])
def test_a_published_sequence_is_the_recursion(kind) -> None:
    stream = make_stream("forgetting", D, U)
    step, truth = kind(stream, torch.float64), Truth(stream)
    for batch in islice(stream.batches(), 20):
        step.update(batch.K, batch.V, batch.noise, batch.forget)
        truth.add(batch)
    assert measures.weight_errors(step.weight, truth.now())[0] < 1e-12
    assert measures.covariance_error(step.covariance(), truth.now()).relative < 1e-12


def test_the_released_sequence_adds_a_jitter_only_where_the_factor_of_its_prior_fails() -> None:
    """As `_robust_spd_inverse` does: 1e-6 of the mean of the diagonal, ten times as much at each further try."""

    class Given:
        def __init__(self, S: torch.Tensor) -> None:
            self.W_0, self.prior = torch.zeros(len(S), 2), self
            self.information = lambda: S

    root = torch.randn(D, D, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    mild = root @ root.mT + D * torch.eye(D, dtype=torch.float64)
    assert relative_error(ReleasedStep(Given(mild), torch.float64).C, torch.linalg.inv(mild)) < 1e-13
    singular = root[:, 1:] @ root[:, 1:].mT - 1e-9 * torch.eye(D, dtype=torch.float64)
    jitter = 1e-6 * float(singular.diagonal().mean())
    eye = torch.eye(D, dtype=torch.float64)
    assert (
        relative_error(ReleasedStep(Given(singular), torch.float64).C, torch.linalg.inv(singular + jitter * eye)) < 1e-6
    )
    indefinite = singular - 3.0 * jitter * eye  # one jitter and the next are 11
    found = ReleasedStep(Given(indefinite), torch.float64).C
    assert relative_error(found, torch.linalg.inv(indefinite + 11.0 * jitter * eye)) < 1e-3
    hopeless = -mild
    assert torch.isfinite(ReleasedStep(Given(hopeless), torch.float64).C).all()


def test_measures_see_what_was_done_to_a_covariance() -> None:
    stream = make_stream("weak-1", D, U)
    truth = Truth(stream)
    for batch in islice(stream.batches(), 9):
        truth.add(batch)
    exact = truth.now()
    C = exact.C
    values, vectors = torch.linalg.eigh(C)
    indefinite = C - 2.0 * values[-1] * torch.outer(vectors[:, -1], vectors[:, -1])
    assert measures.covariance_error(1.01 * C, exact).relative == pytest.approx(0.01, rel=1e-6)
    assert measures.covariance_error(1.01 * C, exact).plain == pytest.approx(0.01, rel=1e-6)
    assert measures.covariance_error(indefinite, exact).smallest < 0.0
    assert measures.covariance_error(indefinite, exact).condition == math.inf
    skew = torch.zeros_like(C)
    skew[0, 1] = float(C.norm())
    assert measures.covariance_error(C + skew, exact).asymmetry > 0.5
    assert measures.covariance_error(C * math.nan, exact).relative == math.inf
    assert measures.weight_errors(exact.W * math.nan, exact) == (math.inf, math.inf)
    shifted = exact.W_0 + 1.5 * exact.shift
    assert measures.weight_errors(shifted, exact) == pytest.approx((0.5, 0.5))
    K = next(stream.batches()).K
    assert measures.gain_errors(2.0 * exact.C @ K.double().mT, exact.C @ K.double().mT, exact) == pytest.approx(
        (1.0, 1.0)
    )


def test_a_file_keeps_everything(trials, tmp_path) -> None:
    path = tmp_path / "deep" / "results.json"
    save(path, {"d": D}, list(trials.values()))
    settings, loaded = load(path)
    assert settings == {"d": D}
    for one, two in zip(trials.values(), loaded, strict=True):
        assert (one.step, one.stream, one.refused_at, one.reason) == (two.step, two.stream, two.refused_at, two.reason)
        assert [p.error_W for p in two.points] == pytest.approx([p.error_W for p in one.points], rel=5e-3)
        assert [p.status for p in two.points] == [p.status for p in one.points]
    json.loads(path.read_text(), parse_constant=pytest.fail)  # NaN and Infinity are no JSON
    assert not list(path.parent.glob("*.part"))


@pytest.mark.parametrize("text", ["{", "[]", '{"schema": "other/1"}'])
def test_other_files_are_refused(tmp_path, text) -> None:
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(ValueError, match=r"load: x\.json must"):
        load(tmp_path / "x.json")


def test_checkpoints() -> None:
    assert checkpoints(1) == (1,)
    assert checkpoints(100, 1) == (1, 10, 100)
    points = checkpoints(10_000)
    assert points[0] == 1
    assert points[-1] == 10_000
    ratios = np.diff(np.log(points[30:]))
    assert ratios.max() < 0.25


class Right(WoodburyStep):
    """A right step, to be spoilt in one way."""


class SpoilsKeys(Right):
    def update(self, K, V, noise, forget) -> None:
        super().update(K, V, noise, forget)
        K.zero_()
        V.mul_(2.0)


class SpoilsTheFirstWeight(Right):
    def __init__(self, stream) -> None:
        super().__init__(stream)
        self.first = stream.W_0

    def update(self, K, V, noise, forget) -> None:
        super().update(K, V, noise, forget)
        self.first.add_(1.0)


def test_what_a_step_does_to_its_arguments_is_its_own() -> None:
    """The pool of the stream "repeated" is handed out again and again."""
    stream = make_stream("repeated", D, U)
    makers = {"keys": SpoilsKeys, "weight": SpoilsTheFirstWeight, "right": Right}
    spoilt = run_trials(stream, makers, 20)[-1]
    (alone,) = run_trials(make_stream("repeated", D, U), {"right": Right}, 20)
    assert spoilt.points == alone.points
    assert alone.points[-1].error_W < 1e-3
    assert float(stream.W_0.abs().max()) == 0.0


def test_a_step_of_another_shape_or_that_does_nothing_is_an_error() -> None:
    class Flat(Bare):
        def update(self, K, V, noise, forget) -> None:
            self.weight = self.weight[:1]

    class Later(Bare):
        def update(self, K, V, noise, forget):
            yield K

    flat, later = run_trials(make_stream("easy", D, U), {"flat": Flat, "later": Later}, 3)
    assert flat.failed_at == later.failed_at == 1
    assert "weight must have shape (d, v) = (24, 4), got (1, 4)" in str(flat.reason)
    assert "got a generator" in str(later.reason)


def test_steps_are_followed_where_the_precision_is_beyond_float64() -> None:
    whole = make_stream("easy", D, U)
    huge = replace(whole, batches=lambda: (replace(batch, K=batch.K * 1e10) for batch in whole.batches()))
    (trial,) = run_trials(huge, {"root": filter_step("square-root", "float64")}, 2)
    assert trial.refused_at is None
    assert trial.points[-1].error_W < 1e-4


@pytest.mark.parametrize("part", ["settings", "columns", "trials"])
def test_a_file_that_is_not_whole_is_named(tmp_path, part, trials) -> None:
    path = tmp_path / "results.json"
    save(path, {}, list(trials.values()))
    content = json.loads(path.read_text())
    del content[part]
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"results\.json is not a whole file"):
        load(path)


def test_a_stream_that_ends_sooner_is_looked_at_at_its_end() -> None:
    whole = make_stream("easy", D, U)
    short = replace(whole, batches=lambda: islice(whole.batches(), 13))
    steps = {"plain": filter_step("plain")}
    (trial,) = run_trials(short, steps, 1000, at=(5, 100))
    assert [point.batches for point in trial.points] == [5, 13]
    (exact,) = run_trials(whole, steps, 13, at=(13,))
    assert trial.points[-1] == exact.points[-1]
    (alone,) = run_trials(short, steps, 13, at=(5,))
    assert [point.batches for point in alone.points] == [5]  # nobody asked for its end


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match="at must hold numbers >= 1, got 0"):
        run_trials(make_stream("easy", D, U), {}, 3, at=(2, 0))
    with pytest.raises(ValueError, match="batches must be >= 1"):
        run_trials(make_stream("easy", D, U), {}, 0)
    with pytest.raises(ValueError, match="form must be one of"):
        filter_step("nothing")
    with pytest.raises(ValueError, match="dtype must be one of"):
        filter_step("plain", "float16")
    assert set(make_steps(tuple(FORMS), published=False)) == set(FORMS)


def test_covariances_can_be_left_out() -> None:
    (trial,) = run_trials(make_stream("easy", D, U), {"plain": filter_step("plain")}, 3, covariances=False)
    assert {point.error_C for point in trial.points} == {None}
    assert {point.status for point in trial.points} == {"ok"}


def test_files_older_than_errors_are_read(trials, tmp_path) -> None:
    path = tmp_path / "results.json"
    save(path, {"d": D}, list(trials.values()))
    content = json.loads(path.read_text())
    for entry in content["trials"]:
        del entry["failed_at"]
    path.write_text(json.dumps(content))
    assert {trial.failed_at for trial in load(path)[1]} == {None}


@pytest.mark.parametrize("method", ["covariance", "health"])
def test_what_a_step_raises_when_it_is_looked_at_ends_its_trial_alone(method) -> None:
    class Looked(Bare):
        pass

    def fail(self) -> None:
        raise TypeError("not\nyet")

    setattr(Looked, method, fail)
    looked, bare = run_trials(make_stream("easy", D, U), {"looked": Looked, "bare": Bare}, 3)
    assert (looked.failed_at, looked.refused_at, looked.ended_at) == (1, None, 1)
    assert looked.reason == "TypeError: not yet"
    assert bare.points[-1].batches == 3


@pytest.mark.parametrize("error", [rk.BreakdownError("x"), FloatingPointError("x"), torch.linalg.LinAlgError("x")])
def test_a_refusal_is_no_error(error) -> None:
    class Says(Bare):
        def update(self, K, V, noise, forget) -> None:
            raise error

    (trial,) = run_trials(make_stream("easy", D, U), {"says": Says}, 3)
    assert (trial.refused_at, trial.failed_at) == (1, None)


def test_the_example_of_the_documentation_runs(capsys) -> None:
    text = (Path(__file__).resolve().parents[2] / "docs" / "stability.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    exec(code.replace("10_000", "20").replace("d=128", f"d={D}"), {"MyStep": filter_step("plain")})
    assert re.fullmatch(r"\d\.\d+e-0[5-9] None None\n", capsys.readouterr().out)
