"""The same measures by EleutherAI's lm-eval, where the package and the data of its tasks are at hand."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from ..metrics.estimate import Estimate
from .task import TaskReport

__all__ = ["NAMES", "lm_eval_available", "run_lm_eval"]

NAMES = {
    "perplexity": "wikitext", "sst": "sst2", "mrpc": "mrpc", "cola": "cola", "rte": "rte", "mmlu": "mmlu",
    "gsm8k": "gsm8k",
}  # fmt: skip
"""Our name of a task -> lm-eval's. Not HumanEval and MBPP: lm-eval runs their code without a sandbox."""

_HINT = "pip install lm-eval; its data sets come from the Hugging Face hub or its cache"


def lm_eval_available() -> bool:
    """Whether lm-eval can be imported."""
    try:
        _package()
    except ImportError:
        return False
    return True


def run_lm_eval(
    tasks: Sequence[str | Mapping[str, Any]],
    model: nn.Module,
    tokenizer: Any,
    *,
    limit: int | None = None,
    shots: int | None = None,
    batch_size: int = 8,
) -> dict[str, TaskReport]:
    """Runs lm-eval's tasks on a model in memory, edited or not, by its `HFLM` wrapper and `simple_evaluate`.

    Prompts, splits and scores are lm-eval's and differ from those of `run_task`.

    Args:
        tasks: names of ours (see `NAMES`) or of lm-eval's, or its task configurations as mappings.
        model, tokenizer: a causal LM and its tokenizer.
        limit: records of each task at most.
        shots: solved examples, None for lm-eval's own number.
        batch_size: prompts of one forward pass.

    Returns:
        Task (lm-eval's name) -> report; the names of the scores are lm-eval's, such as "acc,none". A group of tasks, as
        mmlu, has an entry of its own.

    Raises:
        ImportError: lm-eval is not installed.
        ValueError: lm-eval does not know a task or does not get its data.
    """
    lm_eval, wrapper = _package()
    if not tasks:
        raise ValueError("run_lm_eval: tasks must name at least one task, got none")
    wanted = [NAMES.get(task, task) if isinstance(task, str) else dict(task) for task in tasks]
    training = model.training
    try:
        handed = wrapper(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
        results = lm_eval.simple_evaluate(
            model=handed, tasks=wanted, num_fewshot=shots, limit=limit, log_samples=True, bootstrap_iters=1000
        )
    except Exception as error:  # anything of its data sets, configurations and network
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"lm-eval could not run {', '.join(map(_name, wanted))}: {reason} ({_HINT})") from error
    finally:
        model.train(training)
    if results is None:
        raise ValueError("run_lm_eval: lm-eval gave no results; only its first process has them")
    return {name: _report(name, results) for name in results["results"]}


def _package() -> tuple[Any, Any]:
    try:
        import lm_eval
        from lm_eval.models.huggingface import HFLM
    except ImportError as error:
        raise ImportError(f"lm-eval is not here ({error}): {_HINT}. `run_task` needs local files only") from error
    return lm_eval, HFLM


def _name(task: Any) -> str:
    return task if isinstance(task, str) else str(task.get("task", "a task of one's own"))


def _report(name: str, results: Mapping[str, Any]) -> TaskReport:
    scores = results["results"][name]
    count = results.get("n-samples", {}).get(name, {}).get("effective", 0)
    summary = {}
    for key, value in scores.items():
        metric, _, kept = key.partition(",")
        if isinstance(value, (int, float)) and kept and not metric.endswith("_stderr"):
            stderr = scores.get(f"{metric}_stderr,{kept}")
            known = isinstance(stderr, (int, float)) and not isinstance(stderr, bool)
            summary[key] = Estimate(float(value), float(stderr) if known else math.nan, count)
    samples = results.get("samples", {}).get(name, [])
    rows = [
        {"id": s.get("doc_id"), "target": s.get("target"), **{m: s[m] for m in s.get("metrics", ()) if m in s}}
        for s in samples
    ]
    settings = {"by": "lm-eval", "shots": results.get("n-shot", {}).get(name)}
    return TaskReport(rows, summary, settings)
