"""Measuring what an edit did: scores of CounterFact and zsRE, fluency and consistency of generated texts."""

from .counterfact import EvalReport, evaluate, paired_differences, summarise
from .estimate import Estimate
from .scoring import Answer, score_answers
from .writing import WritingReport, evaluate_writing

__all__ = [
    "Answer",
    "Estimate",
    "EvalReport",
    "WritingReport",
    "evaluate",
    "evaluate_writing",
    "paired_differences",
    "score_answers",
    "summarise",
]
