"""What an editor refuses before it does anything."""

from __future__ import annotations

import hashlib
import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from .config import EditConfig
from .facts import Fact
from .methods import Method
from .models.adapter import Adapter
from .prompts import Context, encode
from .store import conflicts
from .targets.rows import fact_rows

__all__ = ["TooLongError", "check_facts", "check_layers", "check_lengths", "checked_moments", "number_of"]

_SLACK = 16  # tokens by which a text may grow behind a prefix beside those of the prefix

logger = logging.getLogger(__name__)


def check_layers(adapter: Adapter, method: Method, config: EditConfig, states: str) -> None:
    """Refuse hyper-parameters, layers or a method that do not fit the model and the processes that hold it.

    Raises:
        ValueError: see `Editor`.
    """
    method.check(config)
    layers = config.layers
    if not layers or layers[-1] >= adapter.num_layers or layers[0] < 0:
        raise ValueError(
            f"Editor: config.layers must be layers in [0, {adapter.num_layers}), at least one, got {layers}"
        )
    if method.single and len(layers) > 1:
        raise ValueError(f"Editor: config.layers must be one layer for {method.name!r}, got {layers}")
    if method.signal == "components":
        adapter.attention(layers[-1])
        if adapter.factor != 1.0:
            raise ValueError(
                f"Editor: adapter does not fit {method.name!r}: what the MLP adds is scaled by {adapter.factor:.3g}, "
                "and targets of the MLP beside a free attention are not written for that"
            )
    if not adapter.direct and method.residuals:
        raise ValueError(
            f"Editor: adapter does not fit {method.name!r}: {adapter.indirect}; 'ultraedit' and 'ft' have none"
        )
    if method.residuals and (unlike := sorted(adapter.unlike.intersection(layers))):
        raise ValueError(
            f"Editor: config.layers must not have {unlike}, got {layers}: the output of these layers does not move "
            f"with {adapter.module!r} as that of others does (a norm or a gate behind it?), so it takes no residual"
        )
    if len(layers) > 1 and method.residuals and any(adapter.behind(n) for n in layers):
        raise ValueError(
            f"Editor: config.layers must be one layer where a norm follows the MLP ({adapter.post}): a change "
            f"of a lower layer does not reach the target linearly; got {layers}"
        )
    if adapter.processes.many:
        from .parallel.solver import PLACEMENTS, check_method

        if states not in PLACEMENTS:
            raise ValueError(f"Editor: states must be one of {', '.join(map(repr, PLACEMENTS))}, got {states!r}")
        check_method(method)
    elif states != "auto":
        raise ValueError(f"Editor: states must be 'auto' for a model that one process holds, got {states!r}")


def checked_moments(adapter: Adapter, layers: Sequence[int], moments: Mapping[int, Tensor]) -> dict[int, Tensor]:
    """Second moments (d, d) float64 of all edited layers.

    Raises:
        ValueError: one is missing or of another shape.
    """
    if missing := [n for n in layers if n not in moments]:
        raise ValueError(f"Editor: moments must have all edited layers {tuple(layers)}, missing {missing}")
    for n in layers:
        d = adapter.part(n).d
        if not isinstance(moments[n], Tensor) or tuple(moments[n].shape) != (d, d):
            got = tuple(moments[n].shape) if isinstance(moments[n], Tensor) else type(moments[n]).__name__
            raise ValueError(f"Editor: moments[{n}] must be a tensor of shape ({d}, {d}), got {got}")
    return {n: moments[n].double() for n in layers}


def check_facts(tokenizer: Any, facts: Sequence[Fact], size: int, on_conflict: str) -> None:
    """Refuse facts that could not all be written, before any is.

    Raises:
        ValueError, TypeError: see `Editor.edit`.
    """
    if not facts:
        raise ValueError("Editor.edit: facts must hold at least one fact, got none")
    if wrong := [type(fact).__name__ for fact in facts if not isinstance(fact, Fact)]:
        raise TypeError(f"Editor.edit: facts must be rlsedit.Fact objects, got {wrong[0]}")
    if size < 1:
        raise ValueError(f"Editor.edit: batch_size must be at least 1, got {size}")
    if on_conflict not in conflicts.POLICIES:
        raise ValueError(f"Editor.edit: on_conflict must be one of {conflicts.POLICIES}, got {on_conflict!r}")
    if twice := [name for name, n in Counter(fact.id for fact in facts).items() if n > 1]:
        raise ValueError(f"Editor.edit: facts must have distinct ids, got {twice[:5]} more than once")
    rows = fact_rows(tokenizer, facts, [Context("", 1.0)])
    if sinks := [facts[row.fact].id for row in rows if row.kind == "nll" and row.pivot == 0]:
        logger.warning(
            "Editor.edit: the subject of %s is the first token the model reads; its hidden state is that of an "
            "attention sink in many models and takes an edit badly. Put words before the subject",
            sinks,
        )


class TooLongError(ValueError):
    """A fact that the model cannot read whole; the message names it."""


def check_lengths(
    adapter: Adapter, tokenizer: Any, facts: Sequence[Fact], method: Method, contexts: Sequence[Context]
) -> None:
    """Refuse facts that the model cannot read, by themselves or behind the prefixes that the method puts before them.

    Args:
        adapter, tokenizer: the model.
        facts: any number.
        method: says whether there are prefixes.
        contexts: the prefixes; empty where they are not known yet.

    Raises:
        TooLongError: naming the first of them.
    """
    longest = adapter.positions
    if longest is None:
        return
    bare = [Context("", 1.0)]
    contexts = bare if method.signal in ("steps", "gradients") else contexts
    prefixes = max((len(encode(tokenizer, c.prefix.rstrip()).ids) for c in contexts if c.prefix.strip()), default=0)
    sizes = [0] * len(facts)
    for row in fact_rows(tokenizer, facts, bare):
        sizes[row.fact] = max(sizes[row.fact], len(row.inputs))
    contexts = contexts or bare
    for fact, size in zip(facts, sizes, strict=True):
        whole = size
        if size + 2 * prefixes + _SLACK > longest:  # few are: all others are not encoded behind every prefix
            whole = max(len(row.inputs) for row in fact_rows(tokenizer, [fact], contexts))
        if whole > longest:
            behind = f", {whole} behind the prefixes" if whole > size else ""
            raise TooLongError(
                f"fact {fact.id!r}: too long for the model, which reads {longest} tokens: prompt, subject and answer "
                f"have {size}{behind} ({fact.text[:60]!r})"
            )


def number_of(*about: object) -> float:
    """A number of 48 bits that stands for arguments with a readable form, to compare them between processes."""
    return float(int.from_bytes(hashlib.blake2b(repr(about).encode(), digest_size=6).digest(), "big"))
