"""Layers whose weight is not a plain floating-point matrix, and what to do about each kind."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

__all__ = ["advice", "check_config", "is_subclass"]

_UNQUANTISED = "edit the unquantised model (dtype=torch.bfloat16) and quantise the result"
_PLAIN = "load a quantised model unquantised (dtype=torch.bfloat16); merge adapters such as LoRA first"
_LOADED = {"gguf"}
"""Kinds that transformers turns into plain weights when it loads them."""
_TYPES: tuple[type, ...] = (Tensor, nn.Parameter)
"""Types of plain weights."""


def is_subclass(weight: Any) -> bool:
    """Whether a weight is a tensor of another library's making: sharded, quantised, wrapped."""
    return isinstance(weight, Tensor) and type(weight) not in _TYPES


def check_config(config: Any) -> None:
    """Refuses a model that was loaded quantised, by its configuration.

    What an edit adds is far below the step of a quantised weight, and keys would be those of other weights than those
    that are edited.

    Raises:
        ValueError: saying which kind it is and what to load instead.
    """
    quantised = getattr(config, "quantization_config", None)
    if not quantised:
        return
    kind = quantised.get("quant_method") if isinstance(quantised, dict) else getattr(quantised, "quant_method", None)
    name = str(getattr(kind, "value", kind) or "of unknown kind")
    if name in _LOADED:
        return
    raise ValueError(
        f"Adapter.for_model: model must not be quantised, got a quantization_config ({name}); "
        f"{_LOAD.get(name, _UNQUANTISED)}"
    )


def advice(module: nn.Module, spread: bool = False) -> str | None:
    """What to do about a module that cannot be edited because of what its weight is; None for a plain weight.

    Args:
        module: the module.
        spread: whether its weight may lie on several processes.
    """
    origin, name = type(module).__module__, type(module).__name__
    weight = getattr(module, "weight", None)
    if origin.startswith("bitsandbytes") or name in ("Linear8bitLt", "Linear4bit"):
        return _LOAD["bitsandbytes"]
    if hasattr(module, "qweight"):
        return _LOAD["gptq"]
    if origin.startswith("peft") or hasattr(module, "base_layer"):
        return "merge the adapter first (merge_and_unload)"
    if is_subclass(weight):
        home = type(weight).__module__
        if home.startswith("torch.distributed"):
            if spread:
                return None
            return "gather sharded weights (FSDP, tensor parallel) onto a device before editing"
        return _LOAD["torchao"] if home.startswith("torchao") else _PLAIN
    if not isinstance(weight, Tensor) or not weight.dtype.is_floating_point or weight.element_size() == 1:
        return _PLAIN
    return None


_LOAD = {
    "bitsandbytes": f"load it without BitsAndBytesConfig; {_UNQUANTISED}",
    "gptq": f"GPTQ and AWQ cannot be undone: {_UNQUANTISED}",
    "awq": f"GPTQ and AWQ cannot be undone: {_UNQUANTISED}",
    "torchao": f"load it without TorchAoConfig, and call quantize_ only after editing; {_UNQUANTISED}",
    "fp8": f"load it with FineGrainedFP8Config(dequantize=True); or {_UNQUANTISED}",
    "mxfp4": f"load it with Mxfp4Config(dequantize=True); or {_UNQUANTISED}",
}
