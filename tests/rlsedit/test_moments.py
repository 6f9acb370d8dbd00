"""Second moments equal a plain sum over tokens; the cache is keyed by weights, texts, layer and module."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support.language_models import tiny, tokenizer

from rlsedit.models import Adapter
from rlsedit.moments import fingerprint, second_moments

TEXTS = ["Oslo is a city in Norway", "", "Lima", "The capital of Peru and the currency of Japan is the yen"]


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_equal_to_a_plain_sum(family: str) -> None:
    model = tiny(family)
    found = second_moments(model, tokenizer(), [3, 1], TEXTS, max_length=8, max_tokens=20)
    adapter = Adapter.for_model(model)
    for layer in (1, 3):
        seen: list[torch.Tensor] = []
        handle = adapter.edited(layer).register_forward_pre_hook(lambda _m, args, s=seen: s.append(args[0][0]))
        with torch.no_grad():
            for text in TEXTS:
                ids = tokenizer()(text)["input_ids"]
                for i in range(0, len(ids), 8):
                    model(input_ids=torch.tensor([ids[i : i + 8]]))
        handle.remove()
        keys = torch.cat(seen)
        torch.testing.assert_close(found[layer], keys.T @ keys / len(keys), rtol=1e-9, atol=1e-12)
        assert found[layer].dtype == torch.float64
        assert torch.equal(found[layer], found[layer].T)


def test_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny("llama")
    first = second_moments(model, tokenizer(), [1], TEXTS, tmp_path)
    monkeypatch.setattr("rlsedit.moments._measure", lambda *_: pytest.fail("must come from the cache"))
    again = second_moments(model, tokenizer(), [1], iter(TEXTS), tmp_path)
    assert torch.equal(first[1], again[1])
    assert not list(tmp_path.glob("*.tmp"))
    monkeypatch.undo()
    second_moments(model, tokenizer(), [1, 2], TEXTS, tmp_path)
    assert len(list(tmp_path.iterdir())) == 2  # layer 1 again from the cache
    second_moments(model, tokenizer(), [1], TEXTS[:1], tmp_path)
    assert len(list(tmp_path.iterdir())) == 3
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight.add_(1e-6)
    second_moments(model, tokenizer(), [1], TEXTS, tmp_path)
    assert len(list(tmp_path.iterdir())) == 4


def test_a_failed_write_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("rlsedit.moments.os.replace", fail)
    with pytest.raises(OSError, match="disk full"):
        second_moments(tiny("llama"), tokenizer(), [1], TEXTS, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_fingerprint_sees_a_low_rank_edit() -> None:
    model = tiny("llama")
    before = fingerprint(model)
    assert fingerprint(tiny("llama")) == before
    with torch.no_grad():
        model.model.layers[2].mlp.down_proj.weight.add_(1e-9 * torch.ones(32, 1) @ torch.ones(1, 48))
    assert fingerprint(model) != before


def test_another_tokenizer_does_not_find_the_cache_of_the_first(tmp_path: Path) -> None:
    """With the same vocabulary and a token more in front the moments differ by much."""
    first = second_moments(tiny("llama"), tokenizer(), [1], TEXTS, tmp_path)[1]
    with_bos = second_moments(tiny("llama"), tokenizer(True), [1], TEXTS, tmp_path)[1]
    assert torch.equal(with_bos, second_moments(tiny("llama"), tokenizer(True), [1], TEXTS)[1])
    assert (with_bos - first).norm() > 1e-2 * first.norm()


def test_wrong_input_is_named() -> None:
    model = tiny("llama")
    with pytest.raises(ValueError, match=r"layer must be in \[0, 5\), got 9"):
        second_moments(model, tokenizer(), [1, 9], TEXTS)
    assert not model.model.layers[1].mlp.down_proj._forward_pre_hooks, "a hook that stayed broke every later pass"
    with pytest.raises(TypeError, match="texts must be texts, got one string"):
        second_moments(model, tokenizer(), [1], TEXTS[0])
    with pytest.raises(ValueError, match="max_length must be at least 1, got 0"):
        second_moments(model, tokenizer(), [1], TEXTS, max_length=0)
    with pytest.raises(ValueError, match="layers must name at least one layer"):
        second_moments(model, tokenizer(), [], TEXTS)
    with pytest.raises(ValueError, match="texts must hold at least one token, got 2 texts"):
        second_moments(model, tokenizer(), [1], ["", " "])
    with pytest.raises(ValueError, match=r"layer must be in \[0, 5\), got 9"):
        second_moments(model, tokenizer(), [9], TEXTS)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] = torch.nan
    with pytest.raises(ValueError, match="activations must be finite, got NaN or Inf in layer 1"):
        second_moments(model, tokenizer(), [1], TEXTS)
