"""Keys and hidden states of the layer-by-layer stream equal those of plain forwards of the model as it then is."""

from __future__ import annotations

import pytest
import torch
from support.language_models import FACTS, FAMILIES, tiny, tokenizer

from rlsedit.keys import KeyStream
from rlsedit.models import Adapter
from rlsedit.prompts import Context
from rlsedit.targets.rows import fact_rows

CONTEXTS = [Context("", 0.5), Context("The yen is. ", 0.3), Context("Because you and I think. ", 0.2)]


def plain(adapter: Adapter, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys of `layer` and hidden states behind layer 3, one full forward per row, right where the subject ends."""
    keys, hidden = torch.zeros(len(FACTS), 48, dtype=torch.float64), []
    for row in fact_rows(tokenizer(), FACTS, CONTEXTS):
        if row.kind != "nll":
            continue
        seen: list[torch.Tensor] = []
        handle = adapter.edited(layer).register_forward_pre_hook(lambda _m, args, s=seen: s.append(args[0]))
        with torch.no_grad():
            out = adapter.model(input_ids=torch.tensor([row.encoding.ids]), output_hidden_states=True)
        handle.remove()
        keys[row.fact] += CONTEXTS[row.context].weight * seen[0][0, row.pivot]
        if row.context == 0:
            hidden.append(out.hidden_states[4][0, row.pivot])
    return keys, torch.stack(hidden)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("max_tokens", [1, 1000])
def test_keys_while_layers_are_edited(family: str, max_tokens: int) -> None:
    adapter = Adapter.for_model(tiny(family))
    rows = [row for row in fact_rows(tokenizer(), FACTS, CONTEXTS) if row.kind == "nll"]
    stream = KeyStream(adapter, rows, CONTEXTS, max_tokens)
    tolerance = dict(rtol=1e-5, atol=1e-5) if family == "gptj" else dict(rtol=1e-9, atol=1e-9)
    for layer in (1, 3):
        keys, hidden = stream.keys(layer), stream.hidden(3)
        wanted_keys, wanted_hidden = plain(adapter, layer)
        torch.testing.assert_close(keys, wanted_keys, **tolerance)
        torch.testing.assert_close(hidden, wanted_hidden, **tolerance)
        adapter.rows(layer).add_(torch.randn(48, 32, dtype=torch.float64) * 0.2)
    with pytest.raises(ValueError, match="ascending order, got 2 after 3"):
        stream.keys(2)


def test_keys_of_half_precision_models_are_float32() -> None:
    adapter = Adapter.for_model(tiny("llama", torch.bfloat16))
    rows = [row for row in fact_rows(tokenizer(), FACTS, CONTEXTS) if row.kind == "nll"]
    stream = KeyStream(adapter, rows, CONTEXTS, 100)
    assert stream.keys(1).dtype == torch.float32
    assert stream.hidden(2).dtype == torch.float32
