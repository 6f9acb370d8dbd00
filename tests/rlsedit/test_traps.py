"""Traps of existing editors, each shown to be absent here (docs/methods.md lists them)."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support import plain_editing as plain
from support.language_models import CONFIG, FACTS, random_moments, tiny, tokenizer
from support.method_streams import CONFIG as STREAM_CONFIG
from support.method_streams import moment, stream
from support.published import published

from rlsedit.editor import Editor
from rlsedit.methods import get_method, list_methods
from rlsedit.models import Adapter
from rlsedit.prompts import make_contexts
from rlsedit.targets import TargetCache, optimise_targets, plain_targets
from rlsedit.targets.cache import weights_hash

SOLVED = [name for name in list_methods() if name != "ft"]


def make(method: str = "rlsedit", **changes: Any) -> Editor:
    if get_method(method).single:
        changes.setdefault("layers", (2,))
    model, config = tiny("llama"), replace(CONFIG, null_threshold=1.0, **changes)
    return Editor(model, tokenizer(), method, config, moments=random_moments(model, config.layers))


def rows(editor: Editor) -> dict[int, torch.Tensor]:
    return {n: editor.adapter.rows(n).clone() for n in editor.config.layers}


def test_the_innovation_is_formed_once() -> None:
    """A residual is no target: subtracting K W from it again, as a published code does, gives other weights."""
    editor = make(layers=(2,))
    contexts = make_contexts(editor.adapter, tokenizer(), 2, 4, 0)
    targets = plain_targets(editor.adapter, tokenizer(), FACTS, contexts, editor.config)
    keys, _ = plain.mean_keys(editor.adapter, 2, FACTS, contexts, [c.weight for c in contexts])
    before, residual = editor.adapter.rows(2).clone(), targets.z - targets.start
    given = random_moments(editor.model, (2,))[2]
    once, twice = (
        published("memit", given, editor.config, [(keys, e, keys)])[0] for e in (residual, residual - keys @ before)
    )
    editor.edit(FACTS)
    torch.testing.assert_close(editor.adapter.rows(2), before + once, rtol=1e-6, atol=1e-8)
    assert (once - twice).norm() > 0.1 * once.norm()


@pytest.mark.parametrize("method", list_methods())
def test_the_state_lives_on_across_calls(method: str) -> None:
    """Two calls are one call in two batches; for most methods starting afresh would give something else."""
    editor, twin, forgetful = make(method), make(method), make(method)
    editor.edit(FACTS, batch_size=2)
    twin.edit(FACTS[:2], finish=False)
    twin.edit(FACTS[2:])
    assert all(torch.equal(a, b) for a, b in zip(rows(editor).values(), rows(twin).values(), strict=True))
    forgetful.edit(FACTS[:2], finish=False)
    forgetful._layers = None
    forgetful.edit(FACTS[2:])
    same = all(torch.equal(a, b) for a, b in zip(rows(editor).values(), rows(forgetful).values(), strict=True))
    static = {"memit", "emmet", "rome", "r_rome", "pmet", "rect", "prune", "ft"}
    assert same == (method in static)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_orientation_of_a_square_weight_is_never_guessed(family: str) -> None:
    """32 x 32 weights, stored as (v, d) by one family and as (d, v) by the other."""
    size = {"llama": {"intermediate_size": 32}, "gpt2": {"n_inner": 32}}[family]
    model, twin = tiny(family, **size), Adapter.for_model(tiny(family, **size))
    config = replace(CONFIG, layers=(2,))
    moments = random_moments(model, (2,), 32)
    editor = Editor(model, tokenizer(), "memit", config, moments=moments)
    editor.edit(FACTS)
    contexts = make_contexts(twin, tokenizer(), 2, 4, 0)
    targets = plain_targets(twin, tokenizer(), FACTS, contexts, config)
    keys, _ = plain.mean_keys(twin, 2, FACTS, contexts, [c.weight for c in contexts])
    change = published("memit", moments[2], config, [(keys, targets.z - targets.start, keys)])[0]
    stored = twin.edited(2).weight.detach()
    assert stored.shape == (32, 32)
    wanted = stored + (change if family == "gpt2" else change.T)
    torch.testing.assert_close(editor.adapter.edited(2).weight.detach(), wanted, rtol=1e-6, atol=1e-8)
    assert (change - change.T).norm() > 0.1 * change.norm()


@pytest.mark.parametrize("name", ["rlsedit", "memit", "emmet", "rome", "lyaplock"])
def test_the_prior_is_built_in_float64(name: str) -> None:
    """A second moment of condition 1e8, which float32 cannot invert: a float32 editor still meets the dense solve."""
    given = moment(largest=1e3, smallest=1e-5)
    config = replace(STREAM_CONFIG, lam=0.0)
    solver = get_method(name).start(given, config, torch.float32)
    batches = stream(name)
    error, lost = 0.0, 0.0
    for batch, exact in zip(batches[:3], published(name, given, config, batches[:3]), strict=True):
        proposal, solver = solver.propose(*(part.float() for part in batch))
        error = max(error, float((proposal.update.double() - exact).norm() / exact.norm()))
    inverse = torch.linalg.inv(given.float()).double()
    lost = float((inverse - torch.linalg.inv(given)).norm() / torch.linalg.inv(given).norm())
    assert error < 1e-3 < lost


@pytest.fixture
def moves(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, tuple[int, ...]]]:
    """Every call that could take a tensor off its device, with the shape of the tensor."""
    seen: list[tuple[str, tuple[int, ...]]] = []
    for name in ("cpu", "cuda", "numpy", "tolist", "to"):
        original = getattr(torch.Tensor, name)

        def spy(self: torch.Tensor, *args: Any, name: str = name, original: Any = original, **kwargs: Any) -> Any:
            moved = name != "to" or any(isinstance(a, (str, torch.device)) for a in (*args, *kwargs.values()))
            if moved:
                seen.append((name, tuple(self.shape)))
            return original(self, *args, **kwargs)

        monkeypatch.setattr(torch.Tensor, name, spy)
    return seen


@pytest.mark.parametrize("name", sorted(set(SOLVED) - {"langedit", "lyaplock"}))
def test_no_square_matrix_leaves_its_device(name: str, moves: list[tuple[str, tuple[int, ...]]]) -> None:
    """From the second batch on; LangEdit and LyapLock rebuild their state now and then, on its device."""
    d, solver = len(moment()), get_method(name).start(moment(), STREAM_CONFIG, torch.float32)
    for t, batch in enumerate(stream(name)[:4]):
        if t == 1:
            moves.clear()
        _, solver = solver.propose(*(part.float() for part in batch))
    assert not [entry for entry in moves if entry[1].count(d) > 1 or max(entry[1], default=0) > d * d // 2]
    torch.ones(d, d).cpu()
    assert ("cpu", (d, d)) in moves  # the spy sees what it is there for


@pytest.mark.parametrize("method", list_methods())
def test_weights_and_state_stay_in_step_after_an_error(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    editor, twin = make(method), make(method)
    for each in (editor, twin):
        each.edit(FACTS[:2], finish=False)
    before, states = rows(editor), editor._layers
    last = editor.config.layers[-1]
    add = editor._weights.add

    def fail(layer: int, update: torch.Tensor) -> None:
        add(layer, update)
        if layer == last:
            raise RuntimeError("after the last layer was written, before the state was")

    monkeypatch.setattr(editor._weights, "add", fail)
    with pytest.raises(RuntimeError, match="after the last layer"):
        editor.edit(FACTS[2:])
    monkeypatch.undo()
    assert all(torch.equal(before[n], value) for n, value in rows(editor).items())
    assert editor._layers is states
    editor.edit(FACTS[2:])
    twin.edit(FACTS[2:])
    assert all(torch.equal(a, b) for a, b in zip(rows(editor).values(), rows(twin).values(), strict=True))


def test_a_cached_target_is_found_for_the_same_model_only(tmp_path: Path) -> None:
    adapter, config = Adapter.for_model(tiny("llama")), CONFIG
    contexts = make_contexts(adapter, tokenizer(), 2, 4, 0)
    cache = TargetCache(tmp_path)
    first = cache(adapter, tokenizer(), FACTS[:3], contexts, config)
    exact = optimise_targets(adapter, tokenizer(), FACTS[:3], contexts, config)
    assert torch.equal(first.z, exact.z)
    assert (cache.hits, cache.misses) == (0, 3)
    fresh = TargetCache(tmp_path)  # from disk, in another order, one of them new
    again = fresh(adapter, tokenizer(), [FACTS[3], FACTS[1], FACTS[0]], contexts, config)
    assert (fresh.hits, fresh.misses) == (2, 1)
    assert torch.equal(again.z[1:], first.z[[1, 0]])
    assert torch.equal(again.steps[1:], first.steps[[1, 0]])
    weight = adapter.model.lm_head.weight
    with torch.no_grad():
        weight[7, 5] += 1e-9  # one number of one parameter that no edit touches
    fresh(adapter, tokenizer(), FACTS[:1], contexts, config)
    assert fresh.misses == 2
    with torch.no_grad():
        weight[7, 5] -= 1e-9
    fresh(adapter, tokenizer(), FACTS[:1], contexts, replace(config, kl=0.1))
    fresh(adapter, tokenizer(), FACTS[:1], contexts[:1], config)
    fresh(adapter, tokenizer(), [replace(FACTS[0], target_new="Peru")], contexts, config)
    assert fresh.misses == 5
    fresh(adapter, tokenizer(True), FACTS[:1], contexts, config)  # the same vocabulary, a token more in front
    assert fresh.misses == 6


def test_an_editor_with_a_cache_does_not_reuse_targets_of_the_weights_before() -> None:
    """The same facts twice: the second time the weights differ, and so must z*."""
    cache = TargetCache()
    editor, twin = make(), make()
    editor._find_targets = cache
    for each in (editor, twin):
        each.edit(FACTS[:2])
        each.edit([replace(fact, id=f"{fact.id} again") for fact in FACTS[:2]])
    assert (cache.hits, cache.misses) == (0, 4)
    for n in (1, 2):
        torch.testing.assert_close(editor.adapter.rows(n), twin.adapter.rows(n), rtol=1e-12, atol=1e-12)
    editor.reset()
    editor.edit(FACTS[:2])
    assert (cache.hits, cache.misses) == (2, 4)


def test_the_hash_sees_every_bit() -> None:
    model = tiny("gpt2")
    first = weights_hash(model)
    assert first == weights_hash(tiny("gpt2"))
    for parameter in model.parameters():
        with torch.no_grad():
            kept = parameter.view(-1)[-1].clone()
            parameter.view(-1)[-1] = torch.nextafter(kept, torch.tensor(9.0, dtype=kept.dtype))
        assert weights_hash(model) != first
        with torch.no_grad():
            parameter.view(-1)[-1] = kept
    assert weights_hash(model) == first
