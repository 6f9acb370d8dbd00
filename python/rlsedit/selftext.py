"""Second moments without a corpus: measured on text that the model writes itself."""

from __future__ import annotations

import logging
from typing import Any

from torch import Tensor

from .config import EditConfig
from .models.adapter import Adapter
from .moments import second_moments
from .prompts.contexts import OPENINGS, sample

logger = logging.getLogger(__name__)

LENGTH = 64
SEQUENCES = 32


def own_moments(adapter: Adapter, tokenizer: Any, config: EditConfig) -> dict[int, Tensor]:
    """E[k k'] of the edited layers on sampled text of about twice as many tokens as the module has inputs.

    A makeshift: real text covers more of what has to be left alone.
    """
    width = adapter.part(config.layers[0]).d
    length = min(LENGTH, max(1, (adapter.positions or 2 * LENGTH) // 2))  # an opening stands before it
    count = max(SEQUENCES, -(-2 * width // length))
    logger.warning(
        "Editor: no moments given; measuring E[k k'] on %d tokens the model writes itself. Pass "
        "moments=rlsedit.moments.second_moments(model, tokenizer, layers, texts) for a better anchor",
        count * length,
    )
    texts: list[str] = []
    for first in range(0, count, SEQUENCES):
        openings = [OPENINGS[i % len(OPENINGS)] for i in range(min(SEQUENCES, count - first))]
        texts += sample(adapter, tokenizer, openings, length, config.seed + 1 + first, top_k=50)
    return second_moments(adapter.model, tokenizer, config.layers, texts, adapter=adapter)
