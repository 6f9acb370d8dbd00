"""Diagnostics: streams that are hard in one way each, their exact solution, and how far any step is from it.

from rlsedit_kernels.diagnostics import filter_step, make_stream, run_trials

steps = {"plain": filter_step("plain"), "mine": MyEditor}        # MyEditor(stream): see `steps`
for trial in run_trials(make_stream("weak-0.1", d=128, u=8), steps, 2000):
    trial.points[-1].error_W, trial.broke_at, trial.refused_at, trial.flagged_at
"""

from rlsedit_kernels.diagnostics.steps import FORMS, PUBLISHED, FilterStep, Step, filter_step, make_steps
from rlsedit_kernels.diagnostics.streams import STREAMS, Batch, Stream, make_stream
from rlsedit_kernels.diagnostics.trial import BROKEN, HEALTHY, Point, Trial, least_bytes, load, run_trials, save
from rlsedit_kernels.diagnostics.truth import Exact, Truth, checkpoints, in_digits

__all__ = [
    "BROKEN",
    "FORMS",
    "HEALTHY",
    "PUBLISHED",
    "STREAMS",
    "Batch",
    "Exact",
    "FilterStep",
    "Point",
    "Step",
    "Stream",
    "Trial",
    "Truth",
    "checkpoints",
    "filter_step",
    "in_digits",
    "least_bytes",
    "load",
    "make_steps",
    "make_stream",
    "run_trials",
    "save",
]
