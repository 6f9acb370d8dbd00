"""Random-prefix contexts: short texts the model writes itself, put before each prompt (Meng et al. 2022, ROME)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from ..models.adapter import Adapter
from .encode import encode
from .growing import Growing

OPENINGS = ("The", "Therefore", "Because", "I", "You")


@dataclass(frozen=True)
class Context:
    """A text before the prompt and its weight in the mean of the keys."""

    prefix: str
    weight: float


def make_contexts(adapter: Adapter, tokenizer: Any, count: int, length: int, seed: int) -> list[Context]:
    """The bare prompt, and `count` prefixes of `length` sampled tokens.

    As in the published code the keys give weight 1/2 to the bare prompt and 1/2 to all prefixes together.

    Args:
        adapter: the model that writes the prefixes.
        tokenizer: its tokenizer.
        count: number of prefixes, 0 for the bare prompt alone.
        length: tokens sampled after each opening word, at least 1, and no more than the model reads.
        seed: the same seed and weights give the same contexts.

    Raises:
        ValueError: count or length out of range.
    """
    if count < 0 or length < 1:
        raise ValueError(f"make_contexts: count must be >= 0 and length >= 1, got {count} and {length}")
    if count == 0:
        return [Context("", 1.0)]
    openings = [OPENINGS[i % len(OPENINGS)] for i in range(count)]
    texts = sample(adapter, tokenizer, openings, length, seed)
    prefixes = [" ".join(text.replace("{", " ").replace("}", " ").split()) + ". " for text in texts]
    return [Context("", 0.5)] + [Context(prefix, 0.5 / count) for prefix in prefixes]


@torch.no_grad()
def sample(adapter: Adapter, tokenizer: Any, openings: list[str], length: int, seed: int, top_k: int = 5) -> list[str]:
    """Continue each opening by `length` tokens drawn from the `top_k` likeliest, reproducibly."""
    rows = [list(encode(tokenizer, opening).ids) for opening in openings]
    longest = adapter.positions
    if longest is not None and (read := max(map(len, rows)) + length - 1) > longest:  # nothing reads the last one
        raise ValueError(
            f"make_contexts: context_length must be at most {length + longest - read} for a model that reads {longest} "
            f"tokens, got {length}"
        )
    generator = torch.Generator().manual_seed(seed)
    growing = Growing(adapter, rows)
    with adapter.frozen():
        for _ in range(length):
            logits = growing.logits()
            best, index = logits.float().cpu().topk(min(top_k, logits.shape[-1]), dim=-1)
            drawn = index.gather(1, torch.multinomial(best.softmax(-1), 1, generator=generator))
            (chosen,) = adapter.processes.same(drawn)
            tokens = chosen.flatten().tolist()
            for row, token in zip(rows, tokens, strict=True):
                row.append(token)
            growing.append(tokens)
    special = set(tokenizer.all_special_ids)
    return [tokenizer.decode([t for t in row if t not in special]) for row in rows]
