"""Perplexity of held-out text, in windows that overlap."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from ..metrics.estimate import Estimate, bootstrap
from ..models.adapter import Adapter
from ..models.replay import capture
from ..prompts import align
from ..texts import read_text
from .choices import context_length
from .task import Progress, Task, TaskOptions, TaskReport

__all__ = ["TASK", "perplexity"]


@dataclass(frozen=True)
class _Window:
    """Tokens read at once; those from `first` on are scored here."""

    ids: list[int]
    first: int


def perplexity(
    adapter: Adapter,
    tokenizer: Any,
    texts: Sequence[str],
    *,
    window: int = 512,
    stride: int = 256,
    max_tokens: int = 2048,
    progress: Progress | None = None,
) -> TaskReport:
    """Perplexity of texts, exp of the mean negative log-likelihood of their tokens.

    The texts are joined with blank lines and tokenised as one, x_1 .. x_N. Special tokens that the tokenizer puts in
    front (<bos>) stand in front of every window and are never scored. A window reads up to `window` tokens, these
    included, and starts `stride` tokens after the one before; it scores the tokens that no earlier window has read:

        NLL = -1/n sum_t log p(x_t | what its window holds before it),   perplexity = exp(NLL)

    Every token is scored once, but for x_1 where no special token stands before it; all behind the first window have at
    least window - stride tokens before them. The usual stride is half a window; 1 gives each the longest context.

    The standard error of NLL takes a window for one observation, because neighbouring tokens err together; the one of
    the perplexity is perplexity times that of NLL; intervals are bootstrapped over windows. Bits per byte, NLL in bits
    of a byte of UTF-8, compares models with different tokenizers.

    Args:
        adapter, tokenizer: the model.
        texts: at least two tokens in all.
        window, stride: in tokens, 1 <= stride < window; the window is cut to what the model reads, and a stride that
            this leaves no room for to half of that.
        max_tokens: token budget of one forward pass; does not change results beyond rounding.
        progress: called with (windows done, all windows).

    Returns:
        "perplexity", "nll" (nats a token) and "bits_per_byte"; one row for each window: "start" (index of its first
        scored token), "tokens", "nll" (their sum).

    Raises:
        ValueError: window or stride out of range, or too little text.
    """
    front, ids, spans = _tokens(tokenizer, text := "\n\n".join(texts))
    if window > (longest := context_length(adapter) or window):
        window = longest
        stride = stride if stride < window - len(front) else max(1, (window - len(front)) // 2)
    if not len(front) + 1 < window or not 1 <= stride < window - len(front):
        raise ValueError(
            f"perplexity: window must be above {len(front) + 1} and stride in [1, window - {len(front)}), got "
            f"{window} and {stride}"
        )
    if len(ids) < 2:
        raise ValueError(f"perplexity: the text must have at least two tokens, got {len(ids)}")
    windows = _windows(front, ids, window, stride)
    sums = _score(adapter, windows, max_tokens, progress)
    counts = [len(w.ids) - w.first for w in windows]
    starts = np.cumsum([0 if front else 1, *counts]).tolist()
    rows = [
        {"start": start, "tokens": count, "nll": total}
        for start, count, total in zip(starts, counts, sums, strict=False)
    ]
    data = text[spans[0 if front else 1][0] :].encode("utf-8")
    settings = {"window": window, "stride": stride, "tokens": sum(counts), "bytes": len(data), "special": len(front)}
    return TaskReport(rows, _summary(np.array([sums, counts], dtype=np.float64).T, len(data)), settings)


def _tokens(tokenizer: Any, text: str) -> tuple[list[int], list[int], list[tuple[int, int]]]:
    """Special tokens in front, tokens of the text, and their places in it."""
    out = tokenizer(text, return_offsets_mapping=True, add_special_tokens=False, verbose=False)
    with_special = tokenizer("a", return_special_tokens_mask=True)
    front = []
    for token, special in zip(with_special["input_ids"], with_special["special_tokens_mask"], strict=True):
        if not special:
            break
        front.append(token)
    return front, list(out["input_ids"]), [tuple(span) for span in out["offset_mapping"]]


def _windows(front: list[int], ids: list[int], window: int, stride: int) -> list[_Window]:
    room = window - len(front)
    found, scored = [], 0 if front else 1
    for start in range(0, len(ids), stride):
        end = min(start + room, len(ids))
        found.append(_Window(front + ids[start:end], len(front) + scored - start))
        scored = end
        if end == len(ids):
            break
    return found


def _score(adapter: Adapter, windows: Sequence[_Window], max_tokens: int, progress: Progress | None) -> list[float]:
    """Sum of -log p over the scored tokens of each window."""
    per_pass = max(1, max_tokens // max(len(w.ids) for w in windows))
    sums: list[float] = []
    with adapter.frozen(), torch.no_grad():
        for start in range(0, len(windows), per_pass):
            part = windows[start : start + per_pass]
            batch = align([w.ids for w in part], [0] * len(part), adapter.device)
            calls = capture(adapter, batch.ids, batch.mask, batch.positions)
            hidden = calls.run(adapter, calls.hidden, 0, adapter.num_layers)
            sums += [_nll(adapter, row[: len(w.ids)], w) for row, w in zip(hidden, part, strict=True)]
            if progress is not None:
                progress(len(sums), len(windows))
    return sums


def _nll(adapter: Adapter, hidden: Tensor, window: _Window) -> float:
    """-sum log p of the scored tokens, given hidden states (T, d) of the window; logits in pieces."""
    wanted = torch.tensor(window.ids[window.first :], device=hidden.device)
    before = hidden[window.first - 1 : -1]
    piece = adapter.at_once
    total = 0.0
    for states, tokens in zip(before.split(piece), wanted.split(piece), strict=True):
        logits = adapter.logits(states)
        logits = logits if logits.dtype == torch.float64 else logits.float()
        total += float(torch.nn.functional.cross_entropy(logits, tokens, reduction="none").double().sum())
    return total


def _summary(values: np.ndarray, size: int) -> dict[str, Estimate]:
    """From (windows, 2) sums and counts of tokens, and the bytes of the text."""
    sums, counts = values.T
    n, tokens = len(values), int(counts.sum())
    nll = float(sums.sum() / tokens)
    stderr, low, high = math.nan, math.nan, math.nan
    if n > 1:  # of a ratio of sums over windows
        stderr = math.sqrt(n / (n - 1) * float(((sums - nll * counts) ** 2).sum())) / tokens
        low, high = bootstrap(values, lambda means: means[..., 0] / means[..., 1])
    bits = tokens / size / math.log(2)
    return {
        "perplexity": Estimate(_exp(nll), _exp(nll) * stderr, tokens, _exp(low), _exp(high)),
        "nll": Estimate(nll, stderr, tokens, low, high),
        "bits_per_byte": Estimate(nll * bits, stderr * bits, tokens, low * bits, high * bits),
    }


def _exp(value: float) -> float:
    return math.inf if value > 700 else math.exp(value)  # NaN stays what it is


def _load(path: Path, on_error: Literal["raise", "skip"]) -> list[str]:
    return read_text(path)


def _run(
    adapter: Adapter, tokenizer: Any, records: Sequence[str], options: TaskOptions, progress: Progress | None
) -> TaskReport:
    return perplexity(
        adapter,
        tokenizer,
        records[: options.limit],
        window=options.window,
        stride=options.stride,
        max_tokens=options.max_tokens,
        progress=progress,
    )


TASK = Task("perplexity", "perplexity of held-out text (a text file; --limit counts paragraphs)", _load, _run)
