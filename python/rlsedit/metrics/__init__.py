"""Measuring what an edit did: scores of the CounterFact benchmark."""

from .counterfact import EvalReport, evaluate, summarise
from .estimate import Estimate
from .scoring import Answer, score_answers

__all__ = ["Answer", "Estimate", "EvalReport", "evaluate", "score_answers", "summarise"]
