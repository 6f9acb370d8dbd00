"""Continuations of prompts with stop texts, greedy or sampled, that do not depend on what they are batched with."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..metrics.generation import end_tokens
from ..models.adapter import Adapter
from ..prompts import Growing, encode
from .choices import context_length
from .task import Progress

__all__ = ["complete"]


@dataclass
class _Row:
    """One text that is being written."""

    place: tuple[int, int]
    prompt: list[int]
    steps: int
    numbers: np.ndarray | None
    written: list[int] = field(default_factory=list)


@torch.no_grad()
def complete(
    adapter: Adapter,
    tokenizer: Any,
    prompts: Sequence[str],
    *,
    new_tokens: int,
    stop: Sequence[str] = (),
    samples: int = 1,
    temperature: float = 0.8,
    top_p: float = 0.95,
    seed: int = 0,
    rows: int = 8,
    progress: Progress | None = None,
) -> list[list[str]]:
    """Continue each prompt: greedily for one sample, else by nucleus sampling (Holtzman et al. 2020).

    Each sample of a prompt has random numbers of its own, made from `seed`, the prompt and the number of the sample: it
    is the same alone and in a batch, but for ties within rounding. What has ended leaves the batch.

    Args:
        adapter, tokenizer: the model.
        prompts: each at least one token.
        new_tokens: tokens that are written at most, less where the model cannot read so many.
        stop: texts before the first of which a continuation ends.
        samples: continuations of each prompt.
        temperature, top_p: of the sampling.
        rows: continuations that are written side by side.
        progress: called with (continuations done, all).

    Returns:
        `samples` continuations for each prompt, without the prompt and special tokens.

    Raises:
        ValueError: a prompt that leaves the model no room to write.
    """
    longest = context_length(adapter)
    waiting = []
    for i, prompt in enumerate(prompts):
        ids = list(encode(tokenizer, prompt).ids)
        steps = new_tokens if longest is None else min(new_tokens, longest - len(ids))
        if steps < 1:
            raise ValueError(f"complete: a prompt of {len(ids)} tokens leaves no room in the {longest} the model reads")
        for j in range(samples):
            waiting.append(_Row((i, j), ids, steps, _numbers(prompt, seed, j, steps) if samples > 1 else None))
    waiting.sort(key=lambda row: len(row.prompt))
    texts = [[""] * samples for _ in prompts]
    done = 0
    with adapter.frozen():
        for start in range(0, len(waiting), rows):
            for (i, j), text in _write(adapter, tokenizer, waiting[start : start + rows], stop, temperature, top_p):
                texts[i][j] = text
                done += 1
                if progress is not None:
                    progress(done, len(waiting))
    return texts


def _numbers(prompt: str, seed: int, sample: int, steps: int) -> np.ndarray:
    return np.random.default_rng([seed, zlib.crc32(prompt.encode("utf-8")), sample]).random(steps)


def _write(adapter: Adapter, tokenizer: Any, batch: list[_Row], stop: Sequence[str], temperature: float, top_p: float):  # type: ignore[no-untyped-def]  # a generator of (place, text)
    growing = Growing(adapter, [row.prompt for row in batch])
    ends = end_tokens(adapter, tokenizer)
    while batch:
        chosen = _choose(growing.logits(), batch, temperature, top_p)
        kept = []
        for i, (row, token) in enumerate(zip(batch, chosen, strict=True)):
            ended = token in ends
            if not ended:
                row.written.append(token)
            text = _text(tokenizer, row)
            cut = min((at for at in (text.find(mark) for mark in stop) if at >= 0), default=-1)
            if ended or cut >= 0 or len(row.written) >= row.steps:
                yield row.place, text if cut < 0 else text[:cut]
            else:
                kept.append(i)
        if len(kept) < len(batch):
            batch = [batch[i] for i in kept]
            if batch:
                growing.keep(kept)
        if batch:
            growing.append([row.written[-1] for row in batch])


def _choose(logits: Tensor, batch: Sequence[_Row], temperature: float, top_p: float) -> list[int]:
    """The likeliest token, or one drawn from the fewest likeliest that hold `top_p` of the probability."""
    if batch[0].numbers is None:
        likeliest: list[int] = logits.argmax(-1).tolist()
        return likeliest
    best, order = (logits.double().cpu() / temperature).softmax(-1).sort(-1, descending=True)
    bounds = best.cumsum(-1)
    inside = bounds - best < top_p  # the token that crosses the bound belongs to them
    whole = (best * inside).sum(-1, keepdim=True)
    drawn = torch.tensor([[row.numbers[len(row.written)]] for row in batch if row.numbers is not None], device="cpu")
    place = (bounds <= drawn * whole).sum(-1, keepdim=True)
    place = torch.minimum(place, inside.sum(-1, keepdim=True) - 1)
    return [int(token) for token in order.gather(1, place).flatten()]


def _text(tokenizer: Any, row: _Row) -> str:
    """What is written, with the blank in front that some tokenizers drop at the start of a text."""
    options = {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}
    before: str = tokenizer.decode(row.prompt[-1:], **options)
    both: str = tokenizer.decode([*row.prompt[-1:], *row.written], **options)
    return both[len(before) :]
