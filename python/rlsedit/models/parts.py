"""One view of a Hugging Face causal LM for the editor: layers, edited module, norm and head."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..parallel import OneProcess, Part, plain_class
from .modes import evaluating
from .products import Tokens, linear_products
from .quantised import advice, is_subclass

LOGITS = 1 << 24
"""Logits that are formed at once: positions times vocabulary."""

_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@dataclass(frozen=True)
class Parts:
    """Parts of a causal LM that the editor reads or writes; `Adapter.for_model` finds and checks them.

    Attributes:
        model: the causal LM.
        base: the decoder inside it, called with `input_ids`, `attention_mask`, `position_ids`, `past_key_values`.
        layers: its decoder layers.
        module: path of the edited linear map inside a layer, such as "mlp.down_proj".
        norm: final norm.
        head: output embedding.
        layout: "out_in" for `nn.Linear` (weight (v, d)), "in_out" for `Conv1D` (weight (d, v)); from the class of the
            module, never from shapes.
        scale: factor of the logits (Cohere, Granite).
        softcap: bound of the logits (c tanh(x / c)) or None.
        post: path, inside a layer, of a norm behind the MLP, or None. Behind one targets are outputs of the MLP.
        tuples: whether a decoder layer returns a tuple rather than a tensor.
        direct: whether what targets replace moves with the output of the edited module by one factor, as a residual
            takes for granted.
        factor: that factor, 1 in most models (Granite's `residual_multiplier`).
        unlike: layers in which it does not move so, where others do.
        cached: whether layers can be run on a cache of keys and values. Where a layer keeps another state (a linear
            attention, a state space, a short convolution), rows are run whole, padded on the right.
        attention_path: path of the attention inside a layer, or None where it is not known (only PMET reads it).
        processes: those that hold the model (docs/distributed.md).
    """

    model: nn.Module
    base: nn.Module
    layers: nn.ModuleList
    module: str
    norm: nn.Module
    head: nn.Module
    layout: str
    scale: float = 1.0
    softcap: float | None = None
    post: str | None = None
    tuples: bool = False
    direct: bool = True
    factor: float = 1.0
    unlike: frozenset[int] = frozenset()
    cached: bool = True
    attention_path: str | None = None
    processes: OneProcess = field(default_factory=OneProcess)

    @property
    def indirect(self) -> str:
        """Why no residual can be handed to the edited module, where `direct` is False."""
        return (
            f"the output of a layer does not move one for one with {self.module!r}, nor by one factor in all layers (a "
            "norm or a gate behind it?), so a residual cannot be handed to that module"
        )

    @property
    def num_layers(self) -> int:
        """Number of decoder layers."""
        return len(self.layers)

    @property
    def positions(self) -> int | None:
        """Tokens that the model can read at once, None where its configuration does not tell."""
        config = self.model.config.get_text_config()  # type: ignore[operator, union-attr]
        length = getattr(config, "max_position_embeddings", None)
        return int(length) if isinstance(length, int) and length > 0 else None

    @property
    def at_once(self) -> int:
        """Positions whose logits are formed at once: some 16 million numbers, whatever the vocabulary."""
        config = self.model.config.get_text_config()  # type: ignore[operator, union-attr]
        return max(1, LOGITS // (getattr(config, "vocab_size", None) or 1 << 18))

    @property
    def device(self) -> torch.device:
        """Device of the first edited weight."""
        return self.edited(0).weight.device  # type: ignore[return-value]

    def part(self, layer: int) -> Part:
        """Which part of the edited weight of `layer` is here, with the shape (d, v) of the whole."""
        return self.processes.part(self.edited(layer), self.layout)

    def edited(self, layer: int) -> nn.Module:
        """The edited linear module of `layer`, checked to be a plain floating-point one."""
        if not 0 <= layer < self.num_layers:
            raise ValueError(f"Adapter.edited: layer must be in [0, {self.num_layers}), got {layer}")
        module = part_of(self.layers[layer], self.module, "module")
        layout = layout_of(module, f"{self.module} of layer {layer}", self.processes)
        if layout != self.layout:
            raise ValueError(f"Adapter.edited: layer {layer} has layout {layout!r}, layer 0 has {self.layout!r}")
        return module

    def rows(self, layer: int) -> Tensor:
        """Row form (d, v) of the edited weight, of the part of it that is here: a view of the parameter."""
        weight = self.processes.local(self.edited(layer))
        return weight if self.layout == "in_out" else weight.T

    def target(self, layer: int) -> nn.Module:
        """The module of `layer` whose output a target z* replaces: the layer, or the MLP where a norm follows it."""
        return self.layers[layer] if self.behind(layer) is None else self.edited(layer)

    def behind(self, layer: int) -> str | None:
        """Path, inside `layer`, of the norm behind its MLP, None where it has none."""
        return self.post if self.post is not None and has_part(self.layers[layer], self.post) else None

    def attention(self, layer: int) -> nn.Module:
        """The attention of `layer`.

        Raises:
            ValueError: its place in the layer is not known.
        """
        if self.attention_path is None:
            raise ValueError(
                f"Adapter: the attention of {type(self.model).__name__} is not known; PMET needs it: "
                "pass attention= to Adapter.for_model (e.g. 'self_attn')"
            )
        return part_of(self.layers[layer], self.attention_path, "attention")

    def shifted(self, layer: int, hidden: Tensor, inner: Tensor | None, delta: Tensor) -> Tensor:
        """Hidden states (..., d) behind `layer` when `delta` is added to the output of `target(layer)`.

        Args:
            hidden: those at delta = 0.
            inner: the MLP's output at delta = 0, where a norm follows it.
        """
        post = self.behind(layer)
        if post is None:
            return hidden + delta
        assert inner is not None
        norm = part_of(self.layers[layer], post, "post")
        moved: Tensor = norm(inner + delta) - norm(inner)
        return hidden + moved

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits of hidden states (..., d) behind the last layer: head(norm(hidden)), soft-capped if the model is."""
        return self.headed(self.normed(hidden))

    def normed(self, hidden: Tensor) -> Tensor:
        """Hidden states (..., d) behind the last layer as the head reads them: norm(hidden)."""
        self.processes.awake()
        normed: Tensor = self.norm(hidden)
        return normed

    def headed(self, normed: Tensor) -> Tensor:
        """Logits of what `normed` gives."""
        with self.products([self.head]):
            logits: Tensor = self.head(normed)
        logits = logits if self.scale == 1.0 else logits * self.scale
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)

    def products(self, modules: Iterable[nn.Module], tokens: Tokens | None = None) -> AbstractContextManager[None]:
        """`linear_products`, for a model that this process holds alone."""
        return nullcontext() if self.processes.many else linear_products(modules, tokens)

    @contextmanager
    def frozen(self) -> Iterator[None]:
        """Evaluation mode and no weight gradients inside; the former flags come back on exit.

        A module that keeps its last state as an attribute (RecurrentGemma) keeps no graph of it.
        """
        wanted = [p for p in self.model.parameters() if p.requires_grad]
        for p in wanted:
            p.requires_grad_(False)
        try:
            with evaluating(self.model):
                yield
        finally:
            for p in wanted:
                p.requires_grad_(True)
            for m in [] if self.cached else self.model.modules():
                kept = {name: value for name, value in vars(m).items() if isinstance(value, Tensor) and value.grad_fn}
                for name, value in kept.items():
                    setattr(m, name, value.detach())


def part_of(root: nn.Module, path: str, name: str) -> nn.Module:
    try:
        return root.get_submodule(path)
    except AttributeError as error:
        children = [n for n, _ in root.named_children()]
        raise ValueError(
            f"Adapter: {name}={path!r} is not in {type(root).__name__} ({error}); its children are {children}"
        ) from None


def has_part(layer: nn.Module, path: str) -> bool:
    try:
        return isinstance(layer.get_submodule(path), nn.Module)
    except AttributeError:
        return False


def layout_of(module: nn.Module, name: str, processes: OneProcess) -> str:
    weight: Any = getattr(module, "weight", None)
    layout = {nn.Linear: "out_in", Conv1D: "in_out"}.get(plain_class(module))
    wrong = advice(module, spread=processes.many)
    if layout is None or wrong is not None or weight.dtype not in _FLOATS:
        kind = f"{getattr(weight, 'dtype', type(weight).__name__)}"
        if is_subclass(weight):
            kind = f"{type(weight).__name__}, {kind}"
        raise ValueError(
            f"Adapter: {name} must be a plain nn.Linear or Conv1D with a floating-point weight, got "
            f"{type(module).__name__} with weight of {kind}" + (f"; {wrong}" if wrong else "")
        )
    if weight.is_meta:
        raise ValueError(f"Adapter: {name} is on the meta device (offloaded); load the edited layers onto a device")
    return layout
