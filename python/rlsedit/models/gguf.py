"""GGUF files as folders of safetensors, which load in seconds and to the same bits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

__all__ = ["convert_gguf"]


def convert_gguf(gguf: Path, out: Path, name: str) -> None:
    """Dequantises a causal language model to float32 and writes config, safetensors and tokenizer into a folder.

    Args:
        gguf: the file.
        out: the folder.
        name: of the model, for its config.

    Raises:
        ImportError: `transformers`, `gguf` or `accelerate` is missing.
        ValueError, OSError: transformers cannot read the file.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    where, file = str(gguf.parent), gguf.name
    model = AutoModelForCausalLM.from_pretrained(where, gguf_file=file, dtype=torch.float32, local_files_only=True)
    _forget_quantisation(model)
    model.config._name_or_path = model.name_or_path = name
    tokenizer = AutoTokenizer.from_pretrained(where, gguf_file=file, local_files_only=True)
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)


def _forget_quantisation(model: Any) -> None:
    """Clears the traces of the GGUF load: the weights are plain, but `save_pretrained` raises on them."""
    model.hf_quantizer = None
    model.is_quantized = False
    if hasattr(model, "quantization_method"):
        del model.quantization_method
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
