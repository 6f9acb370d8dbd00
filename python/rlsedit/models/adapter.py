"""Finding the parts of a Hugging Face causal LM, and checking that they are what the editor takes them for."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from torch import nn

from ..parallel import holders
from .detect import detect
from .families import FAMILIES, Family
from .parts import Parts, has_part, layout_of, part_of
from .probe import check_logits, check_replay, probe, same_factor, unlike
from .quantised import check_config

if TYPE_CHECKING:
    from rlsedit_kernels.distributed import Ranks


@dataclass(frozen=True)
class Adapter(Parts):
    """Parts of a causal LM that the editor reads or writes; build it with `Adapter.for_model`."""

    @classmethod
    def for_model(cls, model: nn.Module, *, edit: bool = True, ranks: Ranks | None = None, **overrides: Any) -> Adapter:
        """Find the parts of `model`.

        Args:
            model: a causal LM of transformers (tested with transformers 5.23), also one that lies on many processes by
                tensor parallelism or FSDP2: all of them then call this, and everything of the editor.
            edit: whether it is to be edited; False only measures.
            ranks: of processes that hold a copy of the model each and edit it together.
            **overrides: `layers`, `module`, `norm`, `head` (dotted paths, `module` relative to a layer) for an
                architecture that is neither in the table nor shows its parts in a run (`rlsedit.models.detect`), or to
                edit another module (which is for methods without a residual, such as UltraEdit, where the hidden state
                does not move one for one with it); `attention`, relative to a layer, where PMET shall be used with an
                architecture that is not in the table.

        Raises:
            ValueError: an architecture whose parts are not found, a path that does not exist, a family or module that
                cannot be edited, a quantised model, parts that do not give the model's logits, layers that cannot be
                run one by one, neither on a cache of keys and values nor on whole rows.
            TypeError: unknown override.
        """
        names = {"layers", "module", "norm", "head"}
        if unknown := set(overrides) - names - {"attention"}:
            allowed = sorted({*names, "attention"})
            raise TypeError(f"Adapter.for_model: overrides must be among {allowed}, got {sorted(unknown)}")
        kind = getattr(getattr(model, "config", None), "model_type", None)
        usual = FAMILIES.get(kind) if isinstance(kind, str) else None
        if edit:
            check_config(model.config)
        if usual is None and not names <= set(overrides):
            try:
                usual = detect(model)
            except ValueError as error:
                raise ValueError(
                    f"Adapter.for_model: architecture {kind!r} ({type(model).__name__}) is unknown, and a run of it "
                    f"does not show its parts: {error}. Pass layers= (e.g. 'model.layers'), module= (the MLP's output "
                    "projection inside a layer, e.g. 'mlp.down_proj'), norm= (e.g. 'model.norm') and head= (e.g. "
                    f"'lm_head'); missing: {sorted(names - set(overrides))}"
                ) from error
        family = replace(usual, **overrides) if usual is not None else Family(**{"attention": None, **overrides})
        layers = part_of(model, family.layers, "layers")
        if not isinstance(layers, nn.ModuleList):
            raise ValueError(
                f"Adapter.for_model: layers={family.layers!r} must be an nn.ModuleList, got {type(layers)}"
            )
        config = model.config.get_text_config()  # type: ignore[operator, union-attr]
        first = part_of(layers[0], family.module, "module")
        processes = holders(model, layers, first, ranks)
        adapter = cls(
            model=model,
            base=part_of(model, family.layers.rpartition(".")[0], "layers"),
            layers=layers,
            module=family.module,
            norm=part_of(model, family.norm, "norm"),
            head=part_of(model, family.head, "head"),
            layout=layout_of(first, family.module, processes),
            scale=_scale(config),
            softcap=getattr(config, "final_logit_softcapping", None) or getattr(config, "logits_soft_cap", None),
            post=family.post,
            attention_path=family.attention,
            processes=processes,
        )
        if family.attention is not None and not any(has_part(layer, family.attention) for layer in layers):
            part_of(layers[0], family.attention, "attention")
        tuples, factor = probe(adapter, edit)
        if adapter.behind(0) is not None and processes.many:  # the probe has no norm in one piece there
            factor = 1.0 if usual is not None and family.module == usual.module else None
        if factor not in (None, 1.0):
            factor = same_factor(adapter, [len(layers) // 2, len(layers) - 1], factor)
        if edit and factor is None and "module" not in overrides:
            raise ValueError(f"Adapter.for_model: {adapter.indirect}")
        adapter = replace(adapter, tuples=tuples, direct=factor is not None, factor=factor or 1.0)
        adapter = replace(adapter, unlike=unlike(adapter))
        if kind not in FAMILIES or set(overrides) - {"module", "attention"}:
            check_logits(adapter)
            adapter = replace(adapter, cached=check_replay(adapter))
        return adapter


def _scale(config: Any) -> float:
    """Factor of the logits, by the name that Cohere, Falcon-H1 or Granite has for it."""
    scale = getattr(config, "logit_scale", None) or getattr(config, "lm_head_multiplier", None)
    return float(scale or 1 / (getattr(config, "logits_scaling", None) or 1))
