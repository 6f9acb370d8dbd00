"""Token rows that grow at their ends, such as texts that a model writes, and the logits behind them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache

from ..models.adapter import Adapter
from ..models.replay import capture
from .align import Aligned, align


class Growing:
    """Rows whose next tokens are asked for again and again.

    A row gives what it gives alone. Where layers can be run on a cache of keys and values, only new tokens are read;
    else all of them, each time.

    Args:
        adapter: the model.
        rows: token ids of each row, at least one.
    """

    def __init__(self, adapter: Adapter, rows: Sequence[Sequence[int]]) -> None:
        self._adapter = adapter
        self._rows = [list(row) for row in rows]
        self._cache = DynamicCache() if adapter.cached else None
        self._batch = self._padded()

    @torch.no_grad()
    def logits(self) -> Tensor:
        """Logits (B, vocabulary) behind the last token of each row; to be asked for once between two tokens."""
        adapter, batch = self._adapter, self._batch
        calls = capture(adapter, batch.ids, batch.mask, batch.positions, self._cache)
        hidden = calls.run(adapter, calls.hidden, 0, adapter.num_layers)
        return adapter.logits(batch.chosen(hidden))

    def append(self, tokens: Sequence[int]) -> None:
        """Put a token behind each row; what is behind the last one that the model can read means nothing."""
        longest, old = self._adapter.positions, self._batch
        if self._cache is None:
            for row, token in zip(self._rows, tokens, strict=True):
                if longest is None or len(row) < longest:
                    row.append(token)
            self._batch = self._padded()
            return
        ids = torch.tensor(tokens, device=self._adapter.device, dtype=torch.long)[:, None]
        positions = old.positions[:, -1:] + 1
        positions = positions if longest is None else positions.clamp_max(longest - 1)
        mask = torch.cat([old.mask, torch.ones_like(ids)], 1)
        self._batch = Aligned(ids, mask, positions, torch.zeros_like(old.at), 0)

    def keep(self, kept: Sequence[int]) -> None:
        """Go on with these rows alone, at least one, in this order."""
        self._rows = [self._rows[i] for i in kept]
        index = torch.tensor(kept, device=self._adapter.device, dtype=torch.long)
        old = self._batch
        self._batch = Aligned(old.ids[index], old.mask[index], old.positions[index], old.at[index], old.column)
        if self._cache is not None:
            self._cache.batch_select_indices(index)

    def _padded(self) -> Aligned:
        ends = [len(row) - 1 for row in self._rows]
        return align(self._rows, ends, self._adapter.device, front=self._adapter.cached)
