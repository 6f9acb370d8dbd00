"""Facts to be written into a model: the record, files of them, and real ones from small PyPI packages."""

from rlsedit.facts.fact import Fact
from rlsedit.facts.io import load_facts, save_facts
from rlsedit.facts.neighbours import without_edited_neighbours

__all__ = ["Fact", "load_facts", "save_facts", "without_edited_neighbours"]
