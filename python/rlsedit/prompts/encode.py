"""Token ids of a prompt with the places of its subject and its target."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Encoding:
    """Token ids of prompt and target.

    Attributes:
        ids: all token ids, special tokens in front included.
        prompt_len: number of ids of the prompt; `ids[prompt_len:]` are the target's.
        pivot: index of the last token of the subject, or None when no subject was given.
    """

    ids: tuple[int, ...]
    prompt_len: int
    pivot: int | None = None

    @property
    def target(self) -> tuple[int, ...]:
        """Token ids of the target."""
        return self.ids[self.prompt_len :]


def encode(
    tokenizer: Any, prompt: str, *, subject: tuple[int, int] | None = None, target: str | None = None
) -> Encoding:
    """Tokenise `prompt` (and `prompt + " " + target`), keeping track of subject and target.

    Prompt and target are tokenised together, as they stand in running text. Where a token of that text crosses the
    boundary, or the prompt alone is tokenised differently, the target is tokenised by itself and appended.

    Args:
        tokenizer: a fast tokenizer of transformers (offsets are needed).
        prompt: text up to the target, without a space at its end.
        subject: characters [start, end) of the subject in `prompt`.
        target: answer without a leading space; None for none.

    Raises:
        TypeError: the tokenizer gives no offsets.
        ValueError: the prompt has no tokens, the subject has none, or the target has none.
    """
    ids, spans = _tokens(tokenizer, prompt)
    if not ids:
        raise ValueError(f"encode: prompt must have at least one token, got {prompt!r}")
    pivot = None if subject is None else _last_token(spans, subject, prompt)
    if target is None:
        return Encoding(tuple(ids), len(ids), pivot)
    if not target.strip():
        raise ValueError(f"encode: target must be a non-empty text, got {target!r} for prompt {prompt!r}")
    joint, _ = _tokens(tokenizer, f"{prompt} {target}")
    tail = joint[len(ids) :] if joint[: len(ids)] == ids else _alone(tokenizer, target)
    if not tail:
        raise ValueError(f"encode: target must have at least one token, got {target!r} for prompt {prompt!r}")
    return Encoding((*ids, *tail), len(ids), pivot)


def _tokens(tokenizer: Any, text: str) -> tuple[list[int], list[tuple[int, int]]]:
    if not getattr(tokenizer, "is_fast", False):
        raise TypeError(
            f"encode: tokenizer must be a fast one (for its offsets), got {type(tokenizer).__name__}; "
            "load it with AutoTokenizer.from_pretrained(..., use_fast=True)"
        )
    out = tokenizer(text, return_offsets_mapping=True, return_special_tokens_mask=True)
    ids, spans = list(out["input_ids"]), [tuple(span) for span in out["offset_mapping"]]
    special = out["special_tokens_mask"]
    while ids and special[len(ids) - 1] and spans[len(ids) - 1][0] == spans[len(ids) - 1][1]:
        ids.pop()  # an end-of-text token that the tokenizer appends has no place before a continuation
    return ids, spans[: len(ids)]


def _last_token(spans: list[tuple[int, int]], subject: tuple[int, int], prompt: str) -> int:
    start, end = subject
    hits = [i for i, (a, b) in enumerate(spans) if a < end and b > start and a < b]
    if not hits:
        raise ValueError(f"encode: subject must cover at least one token, got {prompt[start:end]!r} in {prompt!r}")
    return hits[-1]


def _alone(tokenizer: Any, target: str) -> list[int]:
    """Ids of " target" in running text: those that follow a neutral word."""
    head, _ = _tokens(tokenizer, "a")
    both, _ = _tokens(tokenizer, f"a {target}")
    if both[: len(head)] == head:
        return both[len(head) :]
    return list(tokenizer(f" {target}", add_special_tokens=False)["input_ids"])
