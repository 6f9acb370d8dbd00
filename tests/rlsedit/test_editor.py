"""The editor end to end on tiny models: what it writes, and that a batch is written whole or not at all."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from support.language_models import CONFIG, FACTS, FAMILIES, random_moments, tiny, tokenizer

from rlsedit.editor import Editor
from rlsedit.facts import Fact
from rlsedit.keys import KeyStream
from rlsedit.methods import get_method, list_methods
from rlsedit.models import Adapter
from rlsedit.prompts import Context, make_contexts
from rlsedit.reports import Progress
from rlsedit.targets import optimise_targets, plain_targets
from rlsedit.targets.rows import fact_rows


def make(
    family: str = "llama", method: str = "rlsedit", dtype: torch.dtype = torch.float64, **changes: object
) -> Editor:
    model = tiny(family, dtype)
    if get_method(method).single:
        changes.setdefault("layers", (2,))
    config = replace(CONFIG, **changes)  # type: ignore[arg-type]
    return Editor(model, tokenizer(), method, config, moments=random_moments(model, config.layers))


def weights(editor: Editor) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in editor.model.state_dict().items()}


def test_behind_a_norm_one_layer_is_edited_and_equal_to_the_plain_algorithm() -> None:
    """Gemma 3: z* is an output of the MLP, the residual z* - m of the one layer is exact; two batches, dense solves."""
    with pytest.raises(ValueError, match="must be one layer where a norm follows the MLP"):
        make("gemma3_text")
    editor = make("gemma3_text", layers=(2,))
    editor.edit(FACTS, batch_size=2)
    model = tiny("gemma3_text")
    adapter, config = Adapter.for_model(model), editor.config
    contexts = make_contexts(adapter, tokenizer(), config.contexts, config.context_length, config.seed)
    precision = config.mom2_weight * random_moments(model, config.layers)[2]
    for batch in (FACTS[:2], FACTS[2:]):
        targets = plain_targets(adapter, tokenizer(), batch, contexts, config)
        keys = torch.zeros(len(batch), 48, dtype=torch.float64)
        for row in [row for row in fact_rows(tokenizer(), batch, contexts) if row.kind == "nll"]:
            seen: list[torch.Tensor] = []
            handle = adapter.edited(2).register_forward_pre_hook(lambda _m, args, s=seen: s.append(args[0]))
            with torch.no_grad():
                model(torch.tensor([row.encoding.ids]))
            handle.remove()
            keys[row.fact] += contexts[row.context].weight * seen[0][0, row.pivot]
        precision = precision + keys.T @ keys
        adapter.rows(2).add_(torch.linalg.solve(precision, keys.T @ (targets.z - targets.start)))
    torch.testing.assert_close(editor.adapter.rows(2), adapter.rows(2), rtol=1e-6, atol=1e-8)
    assert (adapter.rows(2) - Adapter.for_model(tiny("gemma3_text")).rows(2)).norm() > 1e-2


@pytest.mark.parametrize("family", FAMILIES)
def test_equal_to_the_plain_algorithm(family: str) -> None:
    """Two batches against MEMIT's algorithm 1 written down plainly: full forwards, dense solves, (z - h) / (n - i)."""
    editor = make(family)
    editor.edit(FACTS, batch_size=2)
    model = tiny(family)
    adapter, config = Adapter.for_model(model), editor.config
    contexts = make_contexts(adapter, tokenizer(), config.contexts, config.context_length, config.seed)
    moments = random_moments(model, config.layers)
    precision = {n: config.mom2_weight * moments[n] for n in config.layers}
    for batch in (FACTS[:2], FACTS[2:]):
        z = plain_targets(adapter, tokenizer(), batch, contexts, config).z
        rows = [row for row in fact_rows(tokenizer(), batch, contexts) if row.kind == "nll"]
        for left, n in ((2, 1), (1, 2)):
            keys = torch.zeros(len(batch), 48, dtype=torch.float64)
            h = torch.zeros_like(z)
            for row in rows:
                seen: list[torch.Tensor] = []
                handle = adapter.edited(n).register_forward_pre_hook(lambda _m, args, s=seen: s.append(args[0]))
                with torch.no_grad():
                    out = model(torch.tensor([row.encoding.ids]), output_hidden_states=True)
                handle.remove()
                keys[row.fact] += contexts[row.context].weight * seen[0][0, row.pivot]
                if row.context == 0:
                    h[row.fact] = out.hidden_states[3][0, row.pivot]
            precision[n] = precision[n] + keys.T @ keys
            adapter.rows(n).add_(torch.linalg.solve(precision[n], keys.T @ ((z - h) / left)))
    for n in config.layers:
        tolerance = dict(rtol=1e-4, atol=1e-5) if family == "gptj" else dict(rtol=1e-6, atol=1e-8)
        torch.testing.assert_close(editor.adapter.rows(n), adapter.rows(n), **tolerance)
    assert (adapter.rows(2) - Adapter.for_model(tiny(family)).rows(2)).norm() > 1e-2


@pytest.mark.parametrize("method", list_methods())
def test_reports(method: str) -> None:
    events: list[Progress] = []
    editor = make(method=method, null_threshold=1.0)
    before, layers = weights(editor), editor.config.layers
    report = editor.edit(FACTS, batch_size=3, progress=events.append)
    batches = [("a",), ("b",), ("c",), ("d",)] if editor.method.single else [("a", "b", "c"), ("d",)]
    assert [batch.ids for batch in report.batches] == batches
    assert report.facts == 4
    assert report.method == method
    assert set(report.seconds) == {"targets", "keys", "solve", "report"}
    changed = {name for name, value in editor.model.state_dict().items() if not torch.equal(before[name], value)}
    assert changed == {f"model.layers.{n}.mlp.down_proj.weight" for n in layers}
    shift = sum(float((editor.adapter.rows(n) - before[f"model.layers.{n}.mlp.down_proj.weight"].T).square().sum())
                for n in layers)  # fmt: skip
    last = report.batches[-1]
    assert last.parameter_deviation == pytest.approx(shift, rel=1e-9)
    assert last.fit > 0 or method == "ft"
    assert last.anchor_deviation > 0
    assert (last.anchor_bound is not None) == (method in ("rlsedit", "memit_seq", "encore"))
    assert {event.stage for event in events} - {"keys"} == {"targets", "solve", "batch"}
    assert [event.batch for event in events if event.stage == "batch"] == list(range(len(batches)))
    assert all(0 <= event.done <= event.total and event.batches == len(batches) for event in events)
    assert set(editor.health()) == set(layers)


@pytest.mark.parametrize("method", list_methods())
@pytest.mark.parametrize(("family", "dtype"), [("gemma3_text", torch.float32), ("gptj", torch.bfloat16)])
def test_every_method_on_other_families_and_in_half_precision(family: str, dtype: torch.dtype, method: str) -> None:
    """A norm behind the MLP; attention and MLP side by side, weights of bfloat16. Finite, changed, and taken back."""
    settings = dict(layers=(2,), null_threshold=1.0, ultraedit_rate=1.0, ft_rate=1e-2, steps=4)
    editor = make(family, method, dtype, **settings)
    before = weights(editor)
    report = editor.edit(FACTS, batch_size=2)
    changed = [name for name, value in weights(editor).items() if not torch.equal(before[name], value)]
    assert len(changed) == 1
    assert all(bool(value.isfinite().all()) for value in weights(editor).values())
    assert report.batches[-1].parameter_deviation > 0
    editor.reset()
    assert all(torch.equal(before[name], value) for name, value in weights(editor).items())


def test_the_facts_come_through() -> None:
    """With a weak anchor the hidden state becomes z*."""
    editor = make(mom2_weight=1e-3, steps=25, lr=0.3, clamp=4.0, kl=0.0, contexts=0)
    bare = [Context("", 1.0)]
    wanted = optimise_targets(editor.adapter, tokenizer(), FACTS, bare, editor.config).z
    report = editor.edit(FACTS, batch_size=4)
    rows = [row for row in fact_rows(tokenizer(), FACTS, bare) if row.kind == "nll"]
    reached = KeyStream(editor.adapter, rows, bare, 100).hidden(2)
    assert (reached - wanted).norm() < 0.02 * wanted.norm()
    assert report.batches[0].fit < 0.05


def test_answers_become_likelier() -> None:
    editor = make(mom2_weight=10.0, steps=25, lr=0.3, clamp=4.0, kl=0.0, contexts=0)
    before = editor.evaluate(FACTS)
    editor.edit(FACTS, batch_size=4)
    pairs = zip(before.rows, editor.evaluate(FACTS).rows, strict=True)
    rises = [new["log_probability_new"] - old["log_probability_new"] for old, new in pairs]
    assert sum(rises) / len(rises) > 0.3


@pytest.mark.parametrize("method", [name for name in list_methods() if not get_method(name).single])
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_batch_is_whole_or_not_at_all(
    method: str, error: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    editor = make(method=method, layers=(0, 1, 2, 3, 4), null_threshold=1.0)
    editor.edit(FACTS[:2])
    before, states = weights(editor), editor._layers
    twin = make(method=method, layers=(0, 1, 2, 3, 4), null_threshold=1.0)
    twin.edit(FACTS[:2])
    add, calls = editor._weights.add, []

    def fail(layer: int, update: torch.Tensor) -> None:
        calls.append(layer)
        add(layer, update)
        if len(calls) == 3:
            raise error("layer 3 of 5")

    monkeypatch.setattr(editor._weights, "add", fail)
    with pytest.raises(error):
        editor.edit(FACTS[2:])
    assert calls == [0, 1, 2]
    assert all(torch.equal(before[name], value) for name, value in editor.model.state_dict().items())
    assert editor._layers is states
    monkeypatch.undo()
    editor.edit(FACTS[2:])  # goes on as if nothing had been
    twin.edit(FACTS[2:])
    assert all(torch.equal(a, b) for a, b in zip(weights(editor).values(), weights(twin).values(), strict=True))


def test_earlier_batches_stay_when_a_later_one_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    editor, twin = make(), make()
    twin.edit(FACTS[:2], batch_size=2)
    states = []

    def stop(event: Progress) -> None:
        states.append(event)
        if event.batch == 1 and event.stage == "solve":
            raise RuntimeError("stopped by the user")

    with pytest.raises(RuntimeError, match="stopped by the user"):
        editor.edit(FACTS, batch_size=2, progress=stop)
    assert all(torch.equal(a, b) for a, b in zip(weights(editor).values(), weights(twin).values(), strict=True))


def test_reset_is_exact_and_the_stream_repeats() -> None:
    editor = make()
    first = weights(editor)
    editor.edit(FACTS, batch_size=2)
    once = weights(editor)
    editor.reset()
    assert all(torch.equal(a, b) for a, b in zip(first.values(), weights(editor).values(), strict=True))
    assert editor.health() == {}
    editor.edit(FACTS, batch_size=2)
    assert all(torch.equal(a, b) for a, b in zip(once.values(), weights(editor).values(), strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_weights_follow_a_float32_master(dtype: torch.dtype) -> None:
    editor = make(dtype=dtype)
    view, master = editor.adapter.rows(1), editor._weights._masters[1]
    start = master.clone()
    assert torch.equal(start.to(dtype), view)
    tiny_step = 1e-5 * torch.ones_like(master)
    for _ in range(400):
        editor._weights.add(1, tiny_step)
        editor._weights.keep()
    master = editor._weights._masters[1]
    torch.testing.assert_close(
        master - start, torch.full_like(master, 4e-3), rtol=5e-3, atol=1e-5
    )  # 400 roundings in float32
    assert torch.equal(master.to(dtype), view)
    before = weights(editor)
    editor._weights.add(1, tiny_step * 1e3)
    editor._weights.undo()
    assert all(torch.equal(before[name], value) for name, value in editor.model.state_dict().items())
    assert torch.equal(editor._weights._masters[1], master)
    editor.edit(FACTS, batch_size=2)
    assert torch.equal(editor._weights._masters[2].to(dtype), editor.adapter.rows(2))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_ten_thousand_tiny_edits_do_not_vanish(dtype: torch.dtype) -> None:
    """Each is far below what the dtype can add to a weight; rounded one by one they would leave nothing."""
    editor = make(dtype=dtype)
    view, start = editor.adapter.rows(1), editor._weights.wide(1).clone()
    step = torch.full_like(start, 1e-6)
    lost = start.to(dtype)
    for _ in range(10_000):
        editor._weights.add(1, step)
        editor._weights.keep()
        lost += step.to(dtype)
    moved = editor._weights.wide(1) - start
    assert float((moved - 1e-2).abs().max()) < 2e-4  # 10,000 roundings in float32
    assert torch.equal(editor._weights.wide(1).to(dtype), view)  # rounded once, from the master
    large = start.abs() > 0.1
    assert float((lost.float() - start)[large].abs().max()) == 0.0


def test_moments_are_made_when_none_are_given(caplog: pytest.LogCaptureFixture) -> None:
    model = tiny("llama", torch.float32)
    editor = Editor(model, tokenizer(), config=CONFIG)
    editor.edit(FACTS[:1])
    assert "the model writes itself" in caplog.text


def test_a_subject_at_the_very_start_is_pointed_out(caplog: pytest.LogCaptureFixture) -> None:
    editor = make()
    editor.edit([replace(FACTS[1], id="start", subject="Oslo"), FACTS[0]])  # "Oslo" is one token
    assert "the subject of ['start'] is the first token the model reads" in caplog.text
    caplog.clear()
    editor.edit([replace(FACTS[1], id="later", prompt="The city {} is the capital of")])
    assert "attention sink" not in caplog.text


def test_wrong_input_is_named() -> None:
    editor = make()
    model = editor.model
    before = weights(editor)
    moments = random_moments(model, (1, 2))
    with pytest.raises(ValueError, match=r"method must be one of \[.*\], got 'magic'"):
        Editor(model, tokenizer(), "magic", CONFIG, moments=moments)
    with pytest.raises(ValueError, match=r"config.layers must be layers in \[0, 5\), at least one, got \(4, 5\)"):
        Editor(model, tokenizer(), "rlsedit", replace(CONFIG, layers=(4, 5)), moments=moments)
    with pytest.raises(ValueError, match=r"moments must have all edited layers \(1, 2\), missing \[2\]"):
        Editor(model, tokenizer(), "rlsedit", CONFIG, moments={1: moments[1]})
    with pytest.raises(ValueError, match=r"moments\[2\] must be a tensor of shape \(48, 48\), got \(32, 32\)"):
        Editor(model, tokenizer(), "rlsedit", CONFIG, moments={1: moments[1], 2: torch.eye(32)})
    with pytest.raises(ValueError, match="facts must hold at least one fact, got none"):
        editor.edit([])
    with pytest.raises(TypeError, match=r"facts must be rlsedit\.Fact objects, got str"):
        editor.edit(["Oslo"])  # type: ignore[list-item]
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        editor.edit(FACTS, batch_size=0)
    with pytest.raises(ValueError, match=r"facts must have distinct ids, got \['a'\] more than once"):
        editor.edit([FACTS[0], FACTS[0]])
    with pytest.raises(ValueError, match=r"prompt must contain \{\} exactly once"):
        Fact("e", "no subject here is", "Oslo", "Lima")
    blind = Fact("e", "{} is", "\u200b", "Lima")
    object.__setattr__(blind, "target_new", "  ")
    with pytest.raises(ValueError, match="target must be a non-empty text"):
        editor.edit([FACTS[0], blind])
    assert all(torch.equal(before[name], value) for name, value in editor.model.state_dict().items())
    with torch.no_grad():
        model.model.layers[2].mlp.down_proj.weight[3, 4] = torch.nan
    with pytest.raises(ValueError, match=r"finite weights, got NaN or Inf in mlp\.down_proj of layer 2"):
        Editor(model, tokenizer(), "rlsedit", CONFIG, moments=moments)
