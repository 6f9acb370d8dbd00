"""What the model writes after a prompt, before and after."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from rlsedit.facts import Fact

__all__ = ["complete", "showcase"]


@torch.no_grad()
def complete(model: Any, tokenizer: Any, prompts: Sequence[str], length: int = 10) -> list[str]:
    """Continues each prompt greedily by at most `length` tokens and returns the continuations on one line each."""
    if not prompts:
        return []
    rows = [tokenizer(prompt)["input_ids"] for prompt in prompts]
    width = max(map(len, rows))
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    pad = 0 if pad is None else pad
    ids = torch.tensor([[pad] * (width - len(row)) + row for row in rows], device=model.device)
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=model.device)
    written = model.generate(
        input_ids=ids, attention_mask=mask, max_new_tokens=length, do_sample=False, pad_token_id=pad
    )
    texts = tokenizer.batch_decode(written[:, width:], skip_special_tokens=True)
    return [" ".join(text.split()) for text in texts]


def showcase(facts: Sequence[Fact], count: int = 4) -> list[tuple[str, str]]:
    """Prompts worth showing: of the first fact of each of `count` relations the prompt, a paraphrase and a neighbour.

    Returns:
        (kind, prompt) with kind one of "edited", "paraphrase" and "neighbour".
    """
    shown: list[tuple[str, str]] = []
    seen: set[str] = set()
    for fact in facts:
        if fact.relation in seen:
            continue
        seen.add(fact.relation)
        shown.append(("edited", fact.text))
        shown += [("paraphrase", prompt) for prompt in fact.paraphrases[:1]]
        shown += [("neighbour", prompt) for prompt in fact.neighbours[:1]]
        if len(seen) == count:
            break
    return shown
