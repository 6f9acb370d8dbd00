"""Methods whose batches go another way than MEMIT's: the editor equals the same thing written down plainly."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from support import plain_editing as plain
from support.language_models import CONFIG, FACTS, random_moments, tiny, tokenizer
from support.published import published
from torch import Tensor

from rlsedit.editor import Editor
from rlsedit.facts import Fact
from rlsedit.methods import get_method
from rlsedit.methods.prune import restrained
from rlsedit.methods.rect import largest_relative
from rlsedit.models import Adapter
from rlsedit.prompts import Context, make_contexts
from rlsedit.targets import Stopping, optimise_targets, plain_targets
from rlsedit.writing import steps

BATCHES = (FACTS[:2], FACTS[2:])
CLOSE = dict(rtol=1e-6, atol=1e-8)
# Prompts that end with their subject and answers of one token: what the variable can make likeliest in a random model.
SHORT = [
    Fact(name, "I think of {}", subject, target)
    for name, subject, target in (("e", "Lima", "Japan"), ("f", "Oslo", "Peru"), ("g", "Tokyo", "Norway"))
]
EAGER = dict(steps=25, lr=0.2, clamp=1.0, kl=0.0, decay=0.0, stop_loss=0.0)


def make(method: str, family: str = "llama", **changes: object) -> tuple[Editor, Adapter, list[Context]]:
    """An editor, an adapter of an equal model, and the contexts that both use."""
    model = tiny(family)
    config = replace(CONFIG, **changes)  # type: ignore[arg-type]
    editor = Editor(model, tokenizer(), method, config, moments=random_moments(model, config.layers))
    twin = Adapter.for_model(tiny(family))
    contexts = make_contexts(twin, tokenizer(), config.contexts, config.context_length, config.seed)
    return editor, twin, contexts


def assert_equal(editor: Editor, twin: Adapter, layers: Sequence[int]) -> None:
    for n in layers:
        torch.testing.assert_close(editor.adapter.rows(n), twin.rows(n), **CLOSE)
        assert (twin.rows(n) - editor._first[n]).norm() > 1e-4


@pytest.mark.parametrize("method", ["rome", "r_rome"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_rome(method: str, family: str) -> None:
    """One fact at a time; key means over all contexts alike; v* = W k_e + delta."""
    editor, twin, contexts = make(method, family, layers=(2,))
    editor.edit(FACTS[:3], batch_size=3)
    moment, even = random_moments(twin.model, (2,))[2], [1 / len(contexts)] * len(contexts)
    for fact in FACTS[:3]:
        targets = plain_targets(twin, tokenizer(), [fact], contexts, editor.config)
        keys, bare = plain.mean_keys(twin, 2, [fact], contexts, even)
        delta = targets.z - targets.start
        residual = delta if method == "rome" else delta + (bare - keys) @ twin.rows(2)
        twin.rows(2).add_(published(method, moment, editor.config, [(keys, residual, bare)])[0])
    assert_equal(editor, twin, (2,))


@pytest.mark.parametrize("family", ["llama", "gptj", "gpt2"])
def test_pmet(family: str) -> None:
    """Two variables, targets of the MLP, square roots; two batches."""
    editor, twin, contexts = make("pmet", family, kl=0.5)
    editor.edit(FACTS, batch_size=2)
    config, weights = editor.config, [context.weight for context in contexts]
    moments = random_moments(twin.model, config.layers)
    for batch in BATCHES:
        v = plain.joint_targets(twin, batch, contexts, config)
        for left, n in ((2, 1), (1, 2)):
            keys, _ = plain.mean_keys(twin, n, batch, contexts, weights)
            rows = plain.nll_rows(batch)
            m = torch.stack([plain.read(twin, twin.edited(2), row)[1][row.pivot] for row in rows])
            residual = (v - m) / left**0.5
            twin.rows(n).add_(published("pmet", moments[n], config, [(keys, residual, keys)])[0])
    for n in config.layers:
        loose = dict(rtol=1e-4, atol=1e-5) if family == "gptj" else CLOSE
        torch.testing.assert_close(editor.adapter.rows(n), twin.rows(n), **loose)
        assert (twin.rows(n) - editor._first[n]).norm() > 1e-3


@pytest.mark.parametrize("kl", [5e-3, 1.0])
def test_pmet_stops_where_the_answer_is_right_and_little_has_drifted(kl: float) -> None:
    """With a large weight of the KL term an answer that is right goes on for a while, its own term eased."""
    editor, twin, contexts = make("pmet", **{**EAGER, "kl": kl}, contexts=0)
    report = editor.edit(SHORT)
    assert report.batches[0].steps < 20
    v = plain.joint_targets(twin, SHORT, contexts, editor.config)
    keys, _ = plain.mean_keys(twin, 1, SHORT, contexts, [1.0])
    m = torch.stack([plain.read(twin, twin.edited(2), row)[1][row.pivot] for row in plain.nll_rows(SHORT)])
    moment = random_moments(twin.model, (1,))[1]
    change = published("pmet", moment, editor.config, [(keys, (v - m) / 2**0.5, keys)])[0]
    torch.testing.assert_close(editor.adapter.rows(1), twin.rows(1) + change, **CLOSE)


@pytest.mark.parametrize("patience", [1, 2, 4])
def test_encore_stops_where_the_answer_has_become_the_likeliest(patience: int) -> None:
    _, twin, contexts = make("encore")
    config = replace(CONFIG, **EAGER)  # type: ignore[arg-type]
    fast = optimise_targets(twin, tokenizer(), SHORT, contexts, config, stopping=Stopping(patience=patience))
    slow = plain_targets(twin, tokenizer(), SHORT, contexts, config, patience)
    assert fast.steps.tolist() == slow.steps.tolist()
    assert patience < fast.steps.max() < 20
    torch.testing.assert_close(fast.z, slow.z, **CLOSE)
    whole = optimise_targets(twin, tokenizer(), SHORT, contexts, config)
    assert (whole.steps == 25).all()


def test_encore_uses_its_patience() -> None:
    taken = {}
    for name, patience in (("encore", 1), ("encore", 3), ("memit_seq", 1)):
        editor, _, _ = make(name, patience=patience, **EAGER)
        taken[name, patience] = editor.edit(SHORT).batches[0].steps
    assert taken["encore", 1] < taken["encore", 3] < taken["memit_seq", 1] == 25


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_ultraedit(family: str) -> None:
    """Features of all layers from one pass, gradients by autograd through the whole model; statistics live on."""
    editor, twin, _ = make("ultraedit", family, ultraedit_rate=0.02)
    editor.edit(FACTS, batch_size=2)
    moments = random_moments(twin.model, editor.config.layers)
    past: dict[int, list[tuple[Tensor, Tensor, Tensor]]] = {1: [], 2: []}
    for batch in BATCHES:
        for n, (keys, gradients) in plain.token_features(twin, (1, 2), batch).items():
            past[n].append((keys, gradients, keys))
        for n in (1, 2):
            twin.rows(n).add_(published("ultraedit", moments[n], editor.config, past[n])[-1])
    assert_equal(editor, twin, (1, 2))


def test_simie() -> None:
    """MEMIT on the weights as they are, its change read and replaced by the ridge's."""
    editor, twin, contexts = make("simie", simie_ridge=0.5)
    editor.edit(FACTS, batch_size=2)
    moments = random_moments(twin.model, (1, 2))
    past: dict[int, list[tuple[Tensor, Tensor, Tensor]]] = {1: [], 2: []}
    for batch in BATCHES:
        memit = Editor(twin.model, tokenizer(), "memit", editor.config, moments=moments)
        memit._contexts = contexts  # of the unedited model, as in the editor
        features = plain.token_features(twin, (1, 2), batch)
        before = {n: twin.rows(n).clone() for n in (1, 2)}
        memit.edit(batch)
        for n in (1, 2):
            keys, change = features[n][0], twin.rows(n) - before[n]
            past[n].append((keys, keys @ change, keys))
            twin.rows(n).copy_(before[n] + published("simie", moments[n], editor.config, past[n])[-1])
    assert_equal(editor, twin, (1, 2))


@pytest.mark.parametrize(("bound", "decay"), [(0.0, 0.0), (5e-3, 0.0), (0.0, 0.3)])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_fine_tuning(family: str, bound: float, decay: float) -> None:
    """FT, FT-L and FT-W against Adam on the parameters themselves."""
    editor, twin, _ = make("ft", family, ft_steps=6, ft_rate=2e-3, ft_bound=bound, ft_decay=decay)
    report = editor.edit(FACTS, batch_size=2)
    parameters = [twin.edited(n).weight for n in (1, 2)]
    for batch, written in zip(BATCHES, report.batches, strict=True):
        first = [p.detach().clone() for p in parameters]
        adam = torch.optim.Adam(parameters, lr=2e-3, weight_decay=decay)
        for _ in range(6):
            adam.zero_grad()
            loss = sum(plain.answer_nll(twin, row).mean() for row in plain.nll_rows(batch)) / len(batch)
            loss.backward()
            adam.step()
            with torch.no_grad():
                for p, start in zip(parameters, first, strict=True):
                    p.copy_(p.clamp(start - bound, start + bound) if bound else p)
        assert written.target_loss == pytest.approx(float(loss.detach()), rel=1e-6)
    assert_equal(editor, twin, (1, 2))
    if bound:
        assert max(float((twin.rows(n) - editor._first[n]).abs().max()) for n in (1, 2)) > 0.9 * bound


def test_fine_tuning_ends_where_the_loss_is_small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(steps, "STOP", 3.0)  # a small random model gets no nearer than 1.5
    editor, _, _ = make("ft", ft_steps=300, ft_rate=1e-2)
    batch = editor.edit(SHORT[:1]).batches[0]
    assert batch.target_loss < 3.0
    assert 1 < batch.steps < 300
    weights = editor.adapter.rows(1).clone()
    assert editor.edit(SHORT[:1]).batches[0].steps == 1  # already known: nothing is changed
    assert torch.equal(editor.adapter.rows(1), weights)


def test_fine_tuning_refuses_a_loss_that_is_not_finite() -> None:
    broken, _, _ = make("ft", ft_rate=1e200)
    before = {name: value.clone() for name, value in broken.model.state_dict().items()}
    with pytest.raises(ValueError, match="finite"):
        broken.edit(FACTS[:2])
    assert all(torch.equal(before[name], value) for name, value in broken.model.state_dict().items())


def test_fine_tuning_a_half_precision_model_keeps_a_master() -> None:
    model = tiny("llama", torch.bfloat16)
    editor = Editor(model, tokenizer(), "ft", replace(CONFIG, ft_rate=1e-6), moments=random_moments(model, (1, 2)))
    master = editor._weights.wide(1).clone()
    editor.edit(FACTS[:2])
    moved = editor._weights.wide(1) - master
    assert 0 < moved.abs().max() < 1e-3
    assert torch.equal(editor.adapter.rows(1), editor._weights.wide(1).bfloat16())


def test_rect_changes_a_share_of_the_entries() -> None:
    editor, _, _ = make("rect", rect_share=0.3)
    other, _, _ = make("memit", rect_share=0.3)
    first = editor.adapter.rows(1).clone()
    editor.edit(FACTS[:2])
    other.edit(FACTS[:2])
    change = other.adapter.rows(1) - first
    torch.testing.assert_close(
        editor.adapter.rows(1) - first, largest_relative(change, first, editor.config), rtol=1e-9, atol=1e-12
    )
    share = float((editor.adapter.rows(1) != first).double().mean())
    assert share == pytest.approx(0.3, abs=0.01)


def test_prune_restrains_at_the_end_of_a_sequence_and_only_there() -> None:
    """Large changes, so that singular values are above those of the first weights."""
    settings = dict(mom2_weight=1e-3, clamp=40.0, lr=4.0, kl=0.0, decay=0.0)
    editor, _, _ = make("prune", **settings)
    other, _, _ = make("memit", **settings)
    first = {n: editor.adapter.rows(n).clone() for n in (1, 2)}
    for finish in (False, True):
        editor.edit(BATCHES[finish], finish=finish)
        other.edit(BATCHES[finish])
        for n in (1, 2):
            shift = other.adapter.rows(n) - first[n]
            wanted = restrained(shift, first[n], editor.config) if finish else shift
            torch.testing.assert_close(editor.adapter.rows(n), first[n] + wanted, rtol=1e-8, atol=1e-10)
    assert (restrained(shift, first[2], editor.config) - shift).norm() > 0.1
    shown = editor._layers[1].deviations.parameter  # type: ignore[index]
    assert shown == pytest.approx(float((editor.adapter.rows(1) - first[1]).square().sum()), rel=1e-9)


def test_prune_is_whole_or_not_at_all(monkeypatch: pytest.MonkeyPatch) -> None:
    editor, _, _ = make("prune", mom2_weight=1e-3, clamp=40.0, lr=4.0, kl=0.0)
    editor.edit(FACTS[:2], finish=False)
    before, states = {n: editor.adapter.rows(n).clone() for n in (1, 2)}, editor._layers
    add = editor._weights.add
    monkeypatch.setattr(editor._weights, "add", lambda n, u: add(n, u) if n == 1 else 1 / 0)
    with pytest.raises(ZeroDivisionError):
        editor.finish()
    assert all(torch.equal(editor.adapter.rows(n), before[n]) for n in (1, 2))
    assert editor._layers is states


def test_a_recipe_of_ones_own() -> None:
    """Half of each residual: half of MEMIT's change in a single layer."""
    own = replace(get_method("memit"), name="half", residual=lambda signals: 0.5 * (signals.z - signals.h))
    model, config = tiny("llama"), replace(CONFIG, layers=(2,))
    editor = Editor(model, tokenizer(), own, config, moments=random_moments(model, (2,)))
    whole, _, _ = make("memit", layers=(2,))
    report = editor.edit(FACTS)
    whole.edit(FACTS)
    assert report.method == "half"
    change, wanted = (e.adapter.rows(2) - e._first[2] for e in (editor, whole))
    torch.testing.assert_close(2 * change, wanted, rtol=1e-9, atol=1e-12)
    assert Editor(tiny("llama"), tokenizer(), own).config.layers


def test_one_layer_for_rome() -> None:
    with pytest.raises(ValueError, match=r"config\.layers must be one layer for 'rome', got \(1, 2\)"):
        make("rome")
