"""The demonstration: real facts into a real model on the CPU, beside the published solve."""

from rlsedit.demo.result import DemoOptions
from rlsedit.demo.run import run_demo

__all__ = ["DemoOptions", "run_demo"]
