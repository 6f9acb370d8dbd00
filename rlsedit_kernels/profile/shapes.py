"""Shapes of the layer that editors write to, by model."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["SHAPES", "Shape"]


@dataclass(frozen=True)
class Shape:
    """The edited projection of one model.

    Attributes:
        name: as given to `rlsedit profile --shape`.
        d: inputs of the projection, the dimension of a key (the width of the MLP).
        v: its outputs, the dimension of a value (the width of the model).
        layers: layers that the published presets edit.
    """

    name: str
    d: int
    v: int
    layers: int


SHAPES: dict[str, Shape] = {
    shape.name: shape
    for shape in (
        Shape("smollm2-135m", 1536, 576, 5),
        Shape("gpt2-xl", 6400, 1600, 5),
        Shape("gpt-j-6b", 16384, 4096, 6),
        Shape("llama3.2-3b", 8192, 3072, 5),
        Shape("llama3-8b", 14336, 4096, 5),
        Shape("llama3-70b", 28672, 8192, 5),
        Shape("mistral-7b", 14336, 4096, 5),
        Shape("qwen2.5-7b", 18944, 3584, 5),
        Shape("qwen3-8b", 12288, 4096, 5),
    )
}
"""`down_proj` (`c_proj`, `fc_out`) as in the models' published configurations."""
