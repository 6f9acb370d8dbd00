"""The paper's evaluation: streams of edits by several methods, measured at checkpoints, written as a folder."""

from .plan import Plan, RunSpec, load_plan, plan_from
from .records import SCHEMA, Folder, RunRecord
from .running import run_plan

__all__ = ["SCHEMA", "Folder", "Plan", "RunRecord", "RunSpec", "load_plan", "plan_from", "run_plan"]
