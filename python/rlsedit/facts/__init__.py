"""Facts to be written into a model: the record, files of them, and real ones from small PyPI packages."""

from rlsedit.facts.fact import Fact
from rlsedit.facts.io import load_facts, save_facts

__all__ = ["Fact", "load_facts", "save_facts"]
