"""Presets, derived values and refused hyper-parameters."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from support.language_models import FAMILIES, tiny, tokenizer
from transformers import GPT2Config, GPTJConfig, LlamaConfig, Qwen2Config

from rlsedit.config import EditConfig
from rlsedit.editor import Editor
from rlsedit.methods import list_methods


def test_presets_of_the_papers() -> None:
    llama = LlamaConfig(num_hidden_layers=32, hidden_size=4096)
    config = EditConfig.for_model(llama)
    assert config.layers == (4, 5, 6, 7, 8)
    assert (config.mom2_weight, config.lam, config.mu, config.l2, config.null_threshold) == (15000, 0, 1, 10, 2e-2)
    assert (config.steps, config.lr, config.clamp, config.kl, config.decay) == (25, 0.1, 0.75, 0.0625, 0.5)
    assert EditConfig.for_model(Qwen2Config(num_hidden_layers=28, hidden_size=3584)).layers == (7, 8, 9, 10, 11)
    assert EditConfig.for_model(llama, layers=[3, 4], steps=7).layers == (3, 4)


@pytest.mark.parametrize(
    ("config", "layers", "steps", "rate", "weight"),
    [
        (LlamaConfig(num_hidden_layers=32, hidden_size=4096), (4, 8), 25, 0.1, 15000),
        (LlamaConfig(num_hidden_layers=28, hidden_size=3072), (2, 6), 25, 0.1, 15000),
        (Qwen2Config(num_hidden_layers=28, hidden_size=3584), (7, 11), 25, 0.1, 15000),
        (GPT2Config(n_layer=48, n_embd=1600), (13, 17), 20, 0.5, 20000),
        (GPTJConfig(n_layer=28, n_embd=4096), (3, 8), 25, 0.5, 15000),
    ],
)
def test_presets_by_model(config: object, layers: tuple[int, int], steps: int, rate: float, weight: float) -> None:
    for method in list_methods():
        found = EditConfig.for_model(config, method)
        if method in ("rome", "r_rome", "ft", "emmet"):
            assert len(found.layers) == 1 or method in ("ft", "emmet")
        else:
            assert (found.layers[0], found.layers[-1], len(found.layers)) == (*layers, layers[1] - layers[0] + 1)
        if method in ("rlsedit", "memit", "memit_seq", "alphaedit"):
            assert (found.steps, found.lr) == (steps, rate)
            assert (found.mom2_weight, found.lam, found.mu, found.l2, found.null_threshold) == (weight, 0, 1, 10, 2e-2)


def test_presets_by_method() -> None:
    gpt2, gptj = GPT2Config(n_layer=48, n_embd=1600), GPTJConfig(n_layer=28, n_embd=4096)
    assert EditConfig.for_model(gpt2, "rome").layers == (17,)
    assert EditConfig.for_model(gptj, "r_rome").layers == (5,)
    rome = EditConfig.for_model(LlamaConfig(num_hidden_layers=32, hidden_size=4096), "rome")
    assert (rome.layers, rome.lr, rome.decay, rome.clamp, rome.contexts) == ((5,), 0.5, 1e-3, 4, 20)
    encore, emmet = EditConfig.for_model(gpt2, "encore"), EditConfig.for_model(gpt2, "emmet")
    assert (encore.norm_weight, encore.patience, encore.steps, encore.mom2_weight) == (10, 4, 20, 20000)
    assert (emmet.layers, emmet.gamma, emmet.clamp) == ((17,), 100, 0.75)
    assert EditConfig.for_model(gptj, "emmet").gamma == 1000
    assert EditConfig.for_model(gptj, "lyaplock").mom2_weight == 1000
    assert (EditConfig.for_model(gpt2, "evoedit").l2, EditConfig.for_model(gpt2, "alphaedit").l2) == (1, 10)
    assert (EditConfig.for_model(gptj, "pmet").mom2_weight, EditConfig.for_model(gptj, "pmet").kl) == (6000, 1)
    assert EditConfig.for_model(tiny("llama"), "rome").layers == EditConfig.for_model(tiny("llama")).layers[-1:]
    assert EditConfig.for_model(gpt2, "rome", layers=(3,), steps=4).layers == (3,)
    for name in ("rome", "r_rome"):  # every release of ROME has these, so a model that none knows gets them too
        unknown = EditConfig.for_model(tiny("llama"), name)
        assert (unknown.relative_to, unknown.clamp, unknown.contexts) == ("module", 4, 20)
        smollm2 = EditConfig.for_model(LlamaConfig(num_hidden_layers=30, hidden_size=576), name)
        assert (smollm2.relative_to, smollm2.clamp, smollm2.contexts) == ("hidden", 0.6, 2)  # by trial on the model
        assert EditConfig.for_model(tiny("llama"), name, contexts=0).contexts == 0
    with pytest.raises(ValueError, match="method must be one of"):
        EditConfig.for_model(gpt2, "romeo")


ANCHORED = ["memit", "memit_seq", "pmet", "prune", "rect", "lyaplock", "simie"]


@pytest.mark.parametrize("method", [*ANCHORED, "rlsedit"])
def test_a_preset_with_a_zero_prior_is_refused(method: str) -> None:
    """By the preset and by the editor, before anything is measured; for rlsedit lam alone is a prior."""
    model = tiny("llama")
    with pytest.raises(ValueError, match=r"mu must be positive .* the prior would be zero"):
        EditConfig.for_model(model, method, mu=0.0)
    with pytest.raises(ValueError, match=r"mu must be positive .* the prior would be zero"):
        Editor(model, tokenizer(), method, EditConfig(layers=(1,), mu=0.0))
    if method == "rlsedit":
        assert EditConfig.for_model(model, method, mu=0.0, lam=0.1).mu == 0.0
    else:
        with pytest.raises(ValueError, match="the prior would be zero"):
            EditConfig.for_model(model, method, mu=0.0, lam=0.1)


@pytest.mark.parametrize("method", ["langedit", "lyaplock"])
def test_hard_writes_are_refused_where_keys_are_kept_by_their_noise(method: str) -> None:
    """The first batch ended in a failed factorisation or in keys that are not finite."""
    with pytest.raises(ValueError, match=f"noise must be positive for '{method}', .* got 0"):
        EditConfig.for_model(tiny("llama"), method, noise=0.0)
    with pytest.raises(ValueError, match=f"noise must be positive for '{method}'"):
        Editor(tiny("llama"), tokenizer(), method, EditConfig(layers=(1,), noise=0.0))
    assert EditConfig.for_model(tiny("llama"), "alphaedit", noise=0.0).noise == 0.0


@pytest.mark.parametrize("family", FAMILIES)
def test_derived_layers_exist(family: str) -> None:
    config = EditConfig.for_model(tiny(family))
    assert config.layers
    assert config.layers[-1] < 5


@pytest.mark.parametrize("layers", [1, 2, 7, 80])
def test_derived_layers_of_any_depth(layers: int) -> None:
    found = EditConfig.for_model(LlamaConfig(num_hidden_layers=layers, hidden_size=64)).layers
    assert 1 <= len(found) <= 5
    assert 0 <= found[0] <= found[-1] < layers


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layers": (3, 2)}, r"layers must be ascending and distinct, got \(3, 2\)"),
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"lr": 0.0}, "lr must be positive, got 0.0"),
        ({"noise": -1.0}, "noise must not be negative, got -1.0"),
        ({"clamp": float("nan")}, "clamp must be positive, got nan"),
        ({"rect_share": 1.5}, "rect_share must be at most 1, got 1.5"),
        ({"prune_base": 1.0}, "prune_base must be above 1, got 1.0"),
        ({"lyap_alpha": 0.0}, "lyap_alpha must be positive, got 0.0"),
        ({"patience": 0}, "patience must be at least 1, got 0"),
        ({"contexts": 10**8}, "contexts must be at most 10000, got 100000000"),
        ({"context_length": 10**6}, "context_length must be at most 100000, got 1000000"),
        ({"steps": 10**12}, "steps must be at most 1000000, got 1000000000000"),
        ({"ft_steps": 10**12}, "ft_steps must be at most 1000000, got 1000000000000"),
        ({"seed": -1}, "seed must be at least 0 and below 2"),
        ({"seed": 2**63}, "seed must be at least 0 and below 2"),
        ({"relative_to": "mlp"}, r"relative_to must be one of \('hidden', 'module'\), got 'mlp'"),
    ],
)
def test_refused_values(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EditConfig(**changes)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"unknown fields \['speed'\]"):
        EditConfig.for_model(tiny("llama"), speed=9)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layers": 5}, "layers must be a list of whole numbers, got 5"),
        ({"layers": "45"}, "layers must be a list of whole numbers, got '45'"),
        ({"layers": (4.0, 5.0)}, r"layers must be a list of whole numbers, got \(4.0, 5.0\)"),
        ({"steps": 2.5}, "steps must be a whole number, got 2.5"),
        ({"contexts": True}, "contexts must be a whole number, got True"),
        ({"lr": "0.1"}, "lr must be a number, got '0.1'"),
    ],
)
def test_values_of_another_type(changes: dict[str, object], message: str) -> None:
    """Told at once: a step count of 2.5 failed in the middle of the first batch, behind the second moments."""
    with pytest.raises(TypeError, match=message):
        EditConfig(**changes)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=message):
        EditConfig.for_model(tiny("llama"), **changes)


def test_hyper_parameters_alone_load_no_library_of_models() -> None:
    """They did by the names of the presets, which know methods and models."""
    code = "import sys, rlsedit; rlsedit.EditConfig(); print(*({'torch', 'transformers'} & set(sys.modules)))"
    path = os.pathsep.join(entry for entry in sys.path if entry)
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env={**os.environ, "PYTHONPATH": path}
    )
    assert run.stdout.split() == []
