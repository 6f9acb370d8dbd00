"""The modules that the tensors of a checkpoint belong to, from the architecture and never from shapes."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

__all__ = ["Structure", "config_of", "layout_of"]

_SHARED = 3  # dotted parts that a tensor and a parameter must share at their ends to be taken for the same


def config_of(folder: Path) -> Any:
    """The configuration in `folder` as transformers reads it.

    Raises:
        ValueError: an architecture that the installed transformers does not know.
    """
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (ValueError, KeyError, OSError) as error:
        raise ValueError(f"model: {folder}/config.json is not understood: {str(error).splitlines()[0]}") from error


def layout_of(module: nn.Module) -> str | None:
    """ "out_in" for `nn.Linear`, "in_out" for `Conv1D`, None for anything else."""
    return {nn.Linear: "out_in", Conv1D: "in_out"}.get(type(module))


class Structure:
    """Names and kinds of the parameters of a causal LM.

    Args:
        model: the model; it may live on the meta device.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._prefix = str(getattr(model, "base_model_prefix", ""))
        self.names = {name for name, _ in model.named_parameters(remove_duplicate=False)}
        self._by_end: dict[tuple[str, ...], list[str]] = defaultdict(list)
        for name in self.names:
            self._by_end[tuple(name.split(".")[-_SHARED:])].append(name)

    @classmethod
    def of_folder(cls, folder: Path) -> Structure:
        """Of the causal LM that `config.json` describes, without its weights."""
        from transformers import AutoModelForCausalLM

        config = config_of(folder)
        try:
            with torch.device("meta"):
                return cls(AutoModelForCausalLM.from_config(config, trust_remote_code=False))
        except (ValueError, ImportError) as error:
            raise ValueError(f"model: {folder} is no causal language model: {str(error).splitlines()[0]}") from error

    def parameter(self, tensor: str) -> str:
        """The parameter of the model that a tensor on disk becomes; the tensor's own name where none is found.

        Checkpoints may leave the base model's prefix out ("h.0..." for "transformer.h.0...") or order wrappers
        differently ("language_model.model.layers..." for "model.language_model.layers...").
        """
        if tensor in self.names:
            return tensor
        for name in (f"{self._prefix}.{tensor}", tensor.removeprefix(f"{self._prefix}.")):
            if name in self.names:
                return name
        parts = tensor.split(".")
        near = [(_shared_end(parts, name.split(".")), name) for name in self._by_end.get(tuple(parts[-_SHARED:]), [])]
        best = max((count for count, _ in near), default=0)
        found = [name for count, name in near if count == best]
        return found[0] if len(found) == 1 else tensor

    def linear(self, parameter: str) -> tuple[str, str] | None:
        """Module and layout of the linear map whose weight `parameter` is, or None."""
        module, _, leaf = parameter.rpartition(".")
        if leaf != "weight" or parameter not in self.names:
            return None
        layout = layout_of(self._model.get_submodule(module))
        return None if layout is None else (module, layout)


def _shared_end(a: list[str], b: list[str]) -> int:
    count = 0
    for x, y in zip(reversed(a), reversed(b), strict=False):
        if x != y:
            break
        count += 1
    return count
