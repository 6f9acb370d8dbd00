"""What one batch of edits costs, side by side: any editor's step, this package's, and the published ones.

    import rlsedit_kernels as rk

    class Mine:                       # writes keys (u, d) to targets (u, v)
        def __init__(self, problem):
            self.weight = problem.weight.clone()
        def __call__(self, K, V):
            with rk.profile.stage("solve"):
                ...

    problem = rk.profile.Problem(d=1536, v=576, u=100)
    mine = rk.profile.Contender("mine", Mine, truth="anchor")
    result = rk.profile.measure([*rk.profile.catalogue(), mine], problem)
    result.save("profile.json")

Times, flops, bytes, memory and the error against float64 stand in one row; contenders take turns, so that a drifting
machine favours none; the ceilings of the machine are taken in the same run.
"""

from rlsedit_kernels.profile.comparison import Comparison, compare
from rlsedit_kernels.profile.contenders import BASELINE, Contender, Step, catalogue, named
from rlsedit_kernels.profile.growth import AXES, extrapolated, sweep
from rlsedit_kernels.profile.machine import Ceilings, ceilings, machine
from rlsedit_kernels.profile.measuring import Settings, measure, require_room
from rlsedit_kernels.profile.problem import Problem
from rlsedit_kernels.profile.result import SCHEMA, Profile, Row, StageRow, Times, load
from rlsedit_kernels.profile.shapes import SHAPES, Shape
from rlsedit_kernels.profile.stages import stage

__all__ = [
    "AXES",
    "BASELINE",
    "SCHEMA",
    "SHAPES",
    "Ceilings",
    "Comparison",
    "Contender",
    "Problem",
    "Profile",
    "Row",
    "Settings",
    "Shape",
    "StageRow",
    "Step",
    "Times",
    "catalogue",
    "ceilings",
    "compare",
    "extrapolated",
    "load",
    "machine",
    "measure",
    "named",
    "require_room",
    "stage",
    "sweep",
]
