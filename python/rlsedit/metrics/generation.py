"""Text that a model writes, sampled so that a prompt's text does not depend on what it is batched with."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..models.adapter import Adapter
from ..prompts import Growing, encode

__all__ = ["end_tokens", "generate"]


@torch.no_grad()
def generate(
    adapter: Adapter,
    tokenizer: Any,
    prompts: Sequence[str],
    *,
    length: int = 100,
    top_k: int = 5,
    seed: int = 0,
    rows: int = 16,
    progress: Callable[[int, int], None] | None = None,
) -> list[str]:
    """Continue each prompt by sampling among the likeliest tokens, to `length` tokens in all (CounterFact's setting).

    A prompt has random numbers of its own, made from `seed` and its text: its continuation is the same alone and in a
    batch, but for ties within rounding.

    Args:
        adapter, tokenizer: the model.
        prompts: not empty, each at least one token.
        length: tokens of prompt and continuation together, at most as many as the model reads; a longer prompt gets one
            token.
        top_k: tokens that are drawn from; 1 is greedy.
        seed: of the random numbers.
        rows: prompts of one batch.
        progress: called with (prompts done, all prompts).

    Returns:
        Prompt and continuation, without special tokens; it ends where the model ends it.

    Raises:
        ValueError: length, top_k or rows below 1, a negative seed, a prompt without tokens, or one that is longer than
            the model reads.
    """
    for name, value, least in (("length", length, 1), ("top_k", top_k, 1), ("rows", rows, 1), ("seed", seed, 0)):
        if value < least:
            raise ValueError(f"generate: {name} must be at least {least}, got {value}")
    encoded = [list(encode(tokenizer, prompt).ids) for prompt in prompts]
    if empty := [prompt for prompt, ids in zip(prompts, encoded, strict=True) if not ids]:
        raise ValueError(f"generate: prompts must have at least one token, got {empty[0]!r}")
    longest = adapter.positions
    if longest is not None:
        length = min(length, longest)
        if long := [prompt for prompt, ids in zip(prompts, encoded, strict=True) if len(ids) > longest]:
            raise ValueError(
                f"generate: a prompt is too long for the model, which reads {longest} tokens: {long[0][:60]!r}"
            )
    order = sorted(range(len(prompts)), key=lambda i: len(encoded[i]))
    texts = [""] * len(prompts)
    special = set(tokenizer.all_special_ids)
    with adapter.frozen():
        for start in range(0, len(order), rows):
            part = order[start : start + rows]
            numbers = [_numbers(prompts[i], length, seed) for i in part]
            for i, ids in zip(part, _continue(adapter, tokenizer, [encoded[i] for i in part], numbers, length, top_k),
                              strict=True):  # fmt: skip
                texts[i] = tokenizer.decode([token for token in ids if token not in special])
            if progress is not None:
                progress(min(start + rows, len(order)), len(order))
    return texts


def end_tokens(adapter: Adapter, tokenizer: Any) -> frozenset[int]:
    """Tokens at which the model ends a text: the tokenizer's, and those that its generation configuration adds.

    An instructed model may have one for a turn and one for a text. Of the configuration only added tokens are taken,
    since its default may be a word of the vocabulary.
    """
    listed = getattr(getattr(adapter.model, "generation_config", None), "eos_token_id", None)
    several = listed if isinstance(listed, (list, tuple)) else [listed]
    found = {token for token in several if token in tokenizer.added_tokens_decoder}
    found.add(tokenizer.eos_token_id)
    return frozenset(int(token) for token in found if token is not None)


def _numbers(prompt: str, length: int, seed: int) -> Tensor:
    return torch.from_numpy(np.random.default_rng([seed, zlib.crc32(prompt.encode("utf-8"))]).random(length))


def _continue(
    adapter: Adapter, tokenizer: Any, rows: list[list[int]], numbers: Sequence[Tensor], length: int, top_k: int
) -> list[list[int]]:
    rows = [list(row) for row in rows]
    steps = [max(1, length - len(row)) for row in rows]
    growing, ends, ended = Growing(adapter, rows), end_tokens(adapter, tokenizer), [False] * len(rows)
    for step in range(max(steps)):
        logits = growing.logits()
        best, index = logits.double().cpu().topk(min(top_k, logits.shape[-1]), dim=-1)
        bounds = best.softmax(-1).cumsum(-1)
        drawn = torch.stack([number[min(step, len(number) - 1)] for number in numbers])[:, None]
        place = (bounds < drawn).sum(1, keepdim=True).clamp_max(index.shape[1] - 1)
        (chosen,) = adapter.processes.same(index.gather(1, place))
        tokens = chosen.flatten().tolist()
        for i, token in enumerate(tokens):
            ended[i] = ended[i] or step >= steps[i] or token in ends
            if not ended[i]:
                rows[i].append(token)
        if all(ended):
            break
        growing.append(tokens)
    return rows
