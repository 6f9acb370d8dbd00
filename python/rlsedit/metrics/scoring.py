"""Log-probabilities of answers after prompts, batched: each prompt is read once, whatever the number of its answers.

The logits behind a prompt give the first token of all its answers; further tokens are read on top of the prompt's keys
and values. Where layers cannot be run on these, a prompt is read with each answer. Logits are formed for these
positions only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache

from ..models.adapter import Adapter
from ..models.replay import capture, frozen_cache
from ..prompts import Aligned, Encoding, align, encode

Query = tuple[str, str]


@dataclass(frozen=True)
class Answer:
    """Score of one answer.

    Attributes:
        log_probability: mean over its tokens.
        is_argmax: whether each of them is the likeliest at its place.
        share: of its tokens that are (the token accuracy of zsRE).
    """

    log_probability: float
    is_argmax: bool
    share: float


def score_answers(
    adapter: Adapter,
    tokenizer: Any,
    queries: Iterable[Query],
    *,
    max_tokens: int = 2048,
    progress: Callable[[int, int], None] | None = None,
    about: Callable[[Query], str] | None = None,
) -> dict[Query, Answer]:
    """Score (prompt, answer) pairs; equal pairs once.

    Args:
        adapter: the model.
        queries: prompts without a space at the end, answers without one in front.
        max_tokens: token budget of one forward pass; does not change results beyond rounding.
        progress: called with (prompts done, all prompts).
        about: what a message says a pair belongs to, such as a fact.

    Raises:
        ValueError: a pair that cannot be encoded, or that the model cannot read whole.
    """
    encodings = check_queries(adapter, tokenizer, queries, about)
    by_prompt: dict[tuple[int, ...], list[Query]] = {}
    for query, encoding in encodings.items():
        by_prompt.setdefault(encoding.ids[: encoding.prompt_len], []).append(query)
    prompts = sorted(by_prompt, key=len)
    found: dict[Query, Answer] = {}
    done = 0
    with adapter.frozen(), torch.no_grad():
        for group in _groups(prompts, max_tokens):
            wanted = [[(query, encodings[query]) for query in by_prompt[prompt]] for prompt in group]
            if adapter.cached:
                found |= _score_group(adapter, group, wanted)
            else:
                found |= _score_whole(adapter, [pair for part in wanted for pair in part], max_tokens)
            done += len(group)
            if progress is not None:
                progress(done, len(prompts))
    return found


def check_queries(
    adapter: Adapter, tokenizer: Any, queries: Iterable[Query], about: Callable[[Query], str] | None
) -> dict[Query, Encoding]:
    """The pairs encoded, each once; arguments and errors as for `score_answers`."""
    encodings = {query: encode(tokenizer, query[0], target=query[1]) for query in dict.fromkeys(queries)}
    longest = adapter.positions
    for query, encoding in encodings.items():
        read = len(encoding.ids) - 1  # nothing is asked behind the last token
        if longest is not None and read > longest:
            whose = "" if about is None else f"{about(query)}: "
            raise ValueError(
                f"{whose}too long for the model, which reads {longest} tokens: a prompt with its answer has {read} "
                f"({query[0][:60]!r})"
            )
    return encodings


def _score_group(
    adapter: Adapter, prompts: Sequence[tuple[int, ...]], wanted: Sequence[Sequence[tuple[Query, Encoding]]]
) -> dict[Query, Answer]:
    batch = align(prompts, [len(p) - 1 for p in prompts], adapter.device)
    longer = [(b, query, enc) for b, part in enumerate(wanted) for query, enc in part if len(enc.target) > 1]
    cache: Cache | None = DynamicCache() if longer else None
    calls = capture(adapter, batch.ids, batch.mask, batch.positions, cache)
    last = calls.run(adapter, calls.hidden, 0, adapter.num_layers)[:, -1]
    pairs = [(b, query, enc) for b, part in enumerate(wanted) for query, enc in part]
    total, right = _read(adapter, last, [b for b, _, _ in pairs], [enc.target[0] for _, _, enc in pairs])
    sums = {query: (t, int(r)) for (_, query, _), t, r in zip(pairs, total, right, strict=True)}
    if longer:
        assert cache is not None
        for query, t, r in _continue(adapter, batch, cache, longer):
            sums[query] = (sums[query][0] + t, sums[query][1] + r)
    return {query: _answer(*sums[query], len(enc.target)) for _, query, enc in pairs}


def _score_whole(adapter: Adapter, wanted: Sequence[tuple[Query, Encoding]], max_tokens: int) -> dict[Query, Answer]:
    """The same by reading prompts with their answers from the first token on; equal tokens once."""
    rows: dict[tuple[int, ...], list[tuple[Query, Encoding]]] = {}
    for query, enc in wanted:
        rows.setdefault(enc.ids[:-1], []).append((query, enc))
    found: dict[Query, Answer] = {}
    for group in _groups(sorted(rows, key=len), max_tokens):
        batch = align(group, [0] * len(group), adapter.device, front=False)
        calls = capture(adapter, batch.ids, batch.mask, batch.positions)
        hidden = calls.run(adapter, calls.hidden, 0, adapter.num_layers)
        owners = [(b, query, enc) for b, ids in enumerate(group) for query, enc in rows[ids]]
        places = [
            (b, at, enc.ids[at + 1]) for b, _, enc in owners for at in range(enc.prompt_len - 1, len(enc.ids) - 1)
        ]
        index = {place: i for i, place in enumerate(dict.fromkeys((b, at) for b, at, _ in places))}
        picked = hidden[[b for b, _ in index], [at for _, at in index]]
        logs, likeliest = _read(adapter, picked, [index[b, at] for b, at, _ in places], [token for *_, token in places])
        start = 0
        for _, query, enc in owners:
            n = len(enc.target)
            found[query] = _answer(sum(logs[start : start + n]), sum(likeliest[start : start + n]), n)
            start += n
    return found


def _answer(log_probability: float, right: int, tokens: int) -> Answer:
    return Answer(log_probability / tokens, right == tokens, right / tokens)


def _continue(
    adapter: Adapter, batch: Aligned, cache: Cache, longer: Sequence[tuple[int, Query, Encoding]]
) -> list[tuple[Query, float, int]]:
    """Log-probabilities of the second and later tokens of answers, and how many of them are likeliest."""
    rows = torch.tensor([b for b, _, _ in longer], device=adapter.device)
    tails = align([enc.target[:-1] for _, _, enc in longer], [0] * len(longer), adapter.device)
    mask = torch.cat([batch.mask[rows], tails.mask], 1)
    positions = tails.positions + batch.mask[rows].sum(1, keepdim=True)
    past = frozen_cache(cache, batch.mask.shape[1], adapter.num_layers, rows)
    calls = capture(adapter, tails.ids, mask, positions, past)
    hidden = calls.run(adapter, calls.hidden, 0, adapter.num_layers)
    places = [(i, t) for i, (_, _, enc) in enumerate(longer) for t in range(len(enc.target) - 1)]
    picked = hidden[[i for i, _ in places], [t for _, t in places]]
    tokens = [longer[i][2].target[t + 1] for i, t in places]
    logs, likeliest = _read(adapter, picked, list(range(len(places))), tokens)
    result = []
    at = 0
    for _, query, enc in longer:
        n = len(enc.target) - 1
        result.append((query, sum(logs[at : at + n]), sum(likeliest[at : at + n])))
        at += n
    return result


def _read(adapter: Adapter, hidden: Tensor, rows: list[int], tokens: list[int]) -> tuple[list[float], list[bool]]:
    """log p and argmax flags of `tokens`, token i read from hidden state `rows[i]`."""
    at = torch.tensor(rows, device=hidden.device)
    token = torch.tensor(tokens, device=hidden.device)
    found = torch.zeros(len(rows), dtype=torch.float64, device=hidden.device)
    right = torch.zeros(len(rows), dtype=torch.bool, device=hidden.device)
    for first in range(0, len(hidden), adapter.at_once):
        logits = adapter.logits(hidden[first : first + adapter.at_once]).to(hidden.device)
        logits = logits if logits.dtype == torch.float64 else logits.float()
        norm, best = torch.logsumexp(logits, -1), logits.argmax(-1)
        here = ((at >= first) & (at < first + len(logits))).nonzero().flatten()
        row, wanted = at[here] - first, token[here]
        found[here] = (logits[row, wanted] - norm[row]).double()
        right[here] = best[row] == wanted
    return found.tolist(), right.tolist()


def _groups(prompts: Sequence[tuple[int, ...]], max_tokens: int) -> list[list[tuple[int, ...]]]:
    groups: list[list[tuple[int, ...]]] = []
    for prompt in prompts:  # ascending length
        if groups and (len(groups[-1]) + 1) * len(prompt) <= max_tokens:
            groups[-1].append(prompt)
        else:
            groups.append([prompt])
    return groups
