"""Fingerprints: which base model an edit belongs to."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

__all__ = ["CONFIG", "config_fields", "digest", "fingerprint"]

CONFIG = (
    "model_type", "hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size", "tie_word_embeddings",
)  # fmt: skip
"""Fields of a configuration that tell architectures apart and that every family has."""


def config_fields(config: Any) -> dict[str, Any]:
    """The fields of `CONFIG` of a transformers configuration (of its text part where it has several)."""
    text = config.get_text_config()
    return {name: getattr(text, name, None) for name in CONFIG}


def digest(value: Tensor) -> str:
    """SHA-256, in hexadecimal, of the bytes of a tensor in row-major order."""
    data = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return hashlib.sha256(data.numpy().data).hexdigest()


def fingerprint(config: Mapping[str, Any], tensors: Iterable[tuple[str, str, tuple[int, ...], str]]) -> str:
    """SHA-256 of an architecture and of the weights under an edit.

    Args:
        config: what `config_fields` gives.
        tensors: (name, dtype, shape, digest of the base weight) of each edited weight, in any order.
    """
    rows = sorted([name, dtype, list(shape), value] for name, dtype, shape, value in tensors)
    return hashlib.sha256(json.dumps([dict(sorted(config.items())), rows]).encode()).hexdigest()
