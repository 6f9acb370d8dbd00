"""What a folder of edits is about: method, hyper-parameters, contexts and the model it belongs to."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from ..config import EditConfig
from ..models.adapter import Adapter
from ..prompts import Context
from .errors import StoreError
from .files import Disk, put_plain

__all__ = ["NAME", "Session", "rest_of"]

FORMAT = 1
NAME = "session.json"


@dataclass(frozen=True)
class Session:
    """Fixed when the folder is made.

    Attributes:
        method: name of the recipe.
        config: hyper-parameters.
        contexts: prefixes with their weights, the bare prompt first.
        module, layout, dtype: of the edited weights.
        rest: fingerprint of all weights that are not edited.
        model: where the model came from, for people.
        base: file of first weight and second moment of each layer.
    """

    method: str
    config: EditConfig
    contexts: tuple[Context, ...]
    module: str
    layout: str
    dtype: str
    rest: str
    model: str
    base: dict[int, str]

    def write(self, disk: Disk, folder: Path) -> None:
        """Write session.json, durable when this returns."""
        base = {str(n): name for n, name in self.base.items()}
        content = {**asdict(self), "base": base, "format": FORMAT}
        text = json.dumps(content, sort_keys=True)
        put_plain(disk, folder / NAME, json.dumps({"digest": _digest(text), "content": content}, indent=1).encode())

    @classmethod
    def read(cls, folder: Path) -> Session:
        """Read session.json.

        Raises:
            StoreError: it is not there, damaged or of another format.
        """
        path = folder / NAME
        try:
            found = json.loads(path.read_bytes())
            content: dict[str, Any] = found["content"]
            whole = found["digest"] == _digest(json.dumps(content, sort_keys=True))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise StoreError(f"{path}: cannot be read: {_short(error)}") from None
        if not whole:
            raise StoreError(f"{path}: content and hash differ; put a copy of the file in its place")
        if content.pop("format") != FORMAT:
            raise StoreError(f"{path}: was written by another version of rlsedit")
        known = {field.name for field in fields(EditConfig)}
        settings = {key: value for key, value in content["config"].items() if key in known}
        content["config"] = EditConfig(**settings)
        content["contexts"] = tuple(Context(**context) for context in content["contexts"])
        content["base"] = {int(n): name for n, name in content["base"].items()}
        return cls(**content)

    def check(self, adapter: Adapter) -> None:
        """Refuse a model that is not the one the folder was made with; edited weights are not looked at.

        Raises:
            StoreError: naming what differs.
        """
        if self.config.layers[-1] >= adapter.num_layers:
            raise StoreError(
                f"resume: the folder edits layers {self.config.layers}, the model has {adapter.num_layers}"
            )
        dtype = str(adapter.rows(self.config.layers[0]).dtype)
        for name, mine, theirs in (
            ("module", self.module, adapter.module),
            ("layout", self.layout, adapter.layout),
            ("dtype", self.dtype, dtype),
        ):
            if mine != theirs:
                raise StoreError(f"resume: the folder was made with {name} {mine}, the model has {theirs}")
        if self.rest != rest_of(adapter, self.config.layers):
            raise StoreError(
                f"resume: the model is another than the one the folder was made with ({self.model}): weights that "
                "are not edited differ"
            )


def rest_of(adapter: Adapter, layers: Sequence[int]) -> str:
    """Hash of the weights that are not edited: name, shape, dtype and up to 1,024 evenly spaced values of each."""
    digest = hashlib.blake2b(digest_size=16)
    modules = {id(adapter.edited(n)) for n in layers}
    edited = {f"{name}.weight" for name, module in adapter.model.named_modules() if id(module) in modules}
    named = [(name, value) for name, value in adapter.model.named_parameters() if name not in edited]
    samples = adapter.processes.samples([value for _, value in named], 1024)
    for (name, parameter), sample in zip(named, samples, strict=True):
        digest.update(f"{name}{tuple(parameter.shape)}{parameter.dtype}".encode())
        digest.update(sample.numpy().tobytes())
    return digest.hexdigest()


def _digest(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def _short(error: BaseException) -> str:
    return getattr(error, "strerror", None) or str(error) or type(error).__name__
