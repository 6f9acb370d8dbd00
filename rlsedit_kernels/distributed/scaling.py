"""What a batch costs on many GPUs: memory, bytes and time by model, form and number of GPUs, from stated rates.

A model of cost, not a measurement. Bytes are those of `volume.py`, which a test compares with what is counted; passes
over memory and flops are those of the code as it is; rates and latencies are the fields of `Rates`, every one of which
can be changed. Where the kernels have been timed, `Rates.measured` takes their efficiency from the result.

One batch of u keys of one layer, state and weight (row-parallel, W (d, v)), float32:

| | passes over d^2 numbers (bytes each, flops each / u) | redundant on every rank |
|---|---|---|
| one GPU, plain | products (4, 2), downdate of a triangle (6, 1) | |
| one GPU, whitened | K T (4, 2), products (4, 2), T g (4, 2), downdate (6, 1) | |
| one GPU, inverse root | A'K' (4, 2), A F (4, 2), change of A (8, 2) | |
| rows on P GPUs | the same / P; the downdate in both halves (8, 2) / P, in tiles | 4 d u^2 flops, 16 d u bytes |
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from rlsedit_kernels.distributed import rows, volume
from rlsedit_kernels.distributed.placement import place

__all__ = [
    "FORMS",
    "GPUS",
    "MODELS",
    "Cost",
    "Model",
    "Rates",
    "bank",
    "pays_from",
    "sharded",
    "single",
    "table",
    "traffic",
]

FORMS = ("plain", "whitened", "inverse_root")
GPUS = (1, 2, 4, 8, 16, 32, 64)
ITEM = 4


@dataclass(frozen=True)
class Model:
    """Shapes of the edited projections of a model, from its published configuration.

    Attributes:
        name: of the model, as published.
        d: inputs of `down_proj` (of one expert's).
        v: outputs.
        layers: how many are edited.
        experts, chosen: of a mixture of experts, all of a layer and those that a token is sent to; else 1, 1.
    """

    name: str
    d: int
    v: int
    layers: int
    experts: int = 1
    chosen: int = 1


MODELS = (
    Model("Llama-3-8B", 14336, 4096, 5),
    Model("Llama-3-70B", 28672, 8192, 5),
    Model("Llama-3.1-405B", 53248, 16384, 5),
    Model("Qwen3-235B-A22B", 1536, 4096, 5, experts=128, chosen=8),
)


@dataclass(frozen=True)
class Rates:
    """Everything that is assumed; seconds, bytes, flops and their quotients.

    Attributes:
        memory: bytes a second that a GPU moves to and from its memory (H200, achievable).
        kernel_flops: flops a second of this package's kernels at float32 accuracy (3xTF32 by `mma.sync`).
        torch_flops: of torch's IEEE float32 products, which sharded states and the inverse root use.
        efficiency: fraction of these that kernels reach.
        chain: Gram, Cholesky and solve of a batch, what does not shrink with d or P.
        launch: of one kernel from Python, where launches are what is waited for.
        bookkeeping: Python, checks and probes of one state in a bank.
        nvlink: bytes a second into a GPU from others of its node.
        infiniband: bytes a second into a GPU from other nodes (400 Gb/s each).
        link_efficiency: fraction of these that collectives reach.
        near, far: seconds of a collective of few bytes within a node, and over several.
        node: GPUs of a node.
        room: bytes of memory of a GPU.
        cache: bytes of its second-level cache; a temporary that fits it costs no memory traffic.
    """

    memory: float = 4.3e12
    kernel_flops: float = 100e12
    torch_flops: float = 67e12
    efficiency: float = 0.75
    chain: float = 45e-6
    launch: float = 5e-6
    bookkeeping: float = 3e-4
    nvlink: float = 450e9
    infiniband: float = 50e9
    link_efficiency: float = 0.8
    near: float = 20e-6
    far: float = 60e-6
    node: int = 8
    room: float = 141e9
    cache: float = 50e6

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if not (isinstance(value, (int, float)) and math.isfinite(value) and value > 0):
                raise ValueError(f"Rates: {field.name} must be positive, got {value!r}")
        for name in ("efficiency", "link_efficiency"):
            if getattr(self, name) > 1.0:
                raise ValueError(f"Rates: {name} must be at most 1, got {getattr(self, name)}")

    def measured(self, result: Mapping[str, Any]) -> Rates:
        """The same with the efficiency of the CUDA kernels as bench/gpu.py found it: floor over median, together.

        Raises:
            ValueError: the result has no products and downdate by the CUDA kernels on a GPU.
        """
        least = taken = 0.0
        for row in result.get("rows", ()):
            passes = {"gain_products": (4.0, 2.0), "downdate_": (6.0, 1.0)}
            if row.get("name") == "cuda" and row.get("what") in passes and row.get("median_ms") and row.get("u", 0) > 1:
                least += self._floor(row["d"], row["d"], row["u"], *passes[row["what"]], self.kernel_flops)
                taken += row["median_ms"] * 1e-3
        if taken == 0.0 or result.get("settings", {}).get("gpu") in (None, "none"):
            raise ValueError("Rates.measured: the result must be that of bench/gpu.py on a GPU, with the CUDA kernels")
        return replace(self, efficiency=min(1.0, least / taken))

    def _floor(self, n: float, m: float, u: int, bytes_each: float, flops_each: float, flops: float) -> float:
        return max(bytes_each * n * m / self.memory, flops_each * n * m * u / flops)

    def own(self, n: float, m: float, u: int, bytes_each: float, flops_each: float) -> float:
        """Seconds of a pass over n x m numbers by a kernel of this package."""
        return self._floor(n, m, u, bytes_each, flops_each, self.kernel_flops) / self.efficiency

    def torch(self, n: float, m: float, u: int, bytes_each: float, flops_each: float) -> float:
        """Seconds of the same by torch."""
        return self._floor(n, m, u, bytes_each, flops_each, self.torch_flops) / self.efficiency


@dataclass(frozen=True)
class Cost:
    """Of one batch of one layer.

    Attributes:
        gpus: that share it.
        memory: bytes of state on a GPU, the largest.
        received: bytes that a GPU takes from others.
        collectives: how many there are.
        compute, communication: seconds.
    """

    gpus: int
    memory: float
    received: int
    collectives: int
    compute: float
    communication: float

    @property
    def time(self) -> float:
        """Seconds; nothing is taken to overlap."""
        return self.compute + self.communication


def traffic(form: str, d: int, u: int, v: int, gpus: int, *, weight: bool = True) -> list[tuple[str, int]]:
    """What a GPU receives in one batch of a sharded state with its weight, collective by collective.

    Keys come sharded over d, as a row-parallel layer leaves them; the prior has a root, and an inverse root is kept in
    the coordinates of the keys.

    Returns:
        ("gather" or "exchange", bytes) each; without the weight they add up to `volume.batch_bytes`.
    """

    def gathered(n: int, width: int, item: int = ITEM) -> list[tuple[str, int]]:
        return [("gather", (gpus - 1) * -(-n // gpus) * width * item)]

    def summed(n: int, item: int = ITEM) -> list[tuple[str, int]]:
        half = (gpus - 1) * -(-n // gpus) * item
        return [("exchange", half), ("gather", half)]

    if gpus == 1:
        return []
    found = [("gather", volume.confirm_bytes(gpus))] * 2 + summed(u * (1 + min(volume.PROBES, d)), 8)
    if form == "plain":
        found += gathered(d, u) + gathered(d, u)
    elif form == "whitened":
        found += summed(u * d) + gathered(d, u)
    elif form == "inverse_root":
        found += summed(u * d)
    else:
        raise ValueError(f"traffic: form must be one of {', '.join(map(repr, FORMS))}, got {form!r}")
    return found + (summed(u * v) if weight else [])


def single(model: Model, form: str, u: int, rates: Rates) -> Cost:
    """One layer on one GPU: `CovarianceState` and its weight."""
    d, v = model.d, model.v
    passes = {
        "plain": rates.own(d, d, u, 4, 2) + rates.own(d, d, u, 6, 1),
        "whitened": 2 * rates.torch(d, d, u, 4, 2) + rates.own(d, d, u, 4, 2) + rates.own(d, d, u, 6, 1),
        "inverse_root": 2 * rates.torch(d, d, u, 4, 2) + rates.torch(d, d, u, 8, 2),
    }[form]
    compute = passes + _weight(d, v, u, rates) + _redundant(d, u, rates) + rates.chain
    return Cost(1, _kept(form, d, d), 0, 0, compute, 0.0)


def sharded(model: Model, form: str, u: int, gpus: int, rates: Rates, *, fused: bool = False) -> Cost:
    """One layer over `gpus` GPUs by rows: `ShardedCovarianceState` and a row-parallel weight.

    Args:
        fused: as if the rows were downdated by one kernel at the rate of this package's own, not in tiles.
    """
    if gpus == 1:
        return single(model, form, u, rates)
    d, v = model.d, model.v
    n = -(-d // gpus)
    downdate = rates.own(n, d, u, 8, 2) if fused else _tiles(n, d, u, rates)
    passes = {
        "plain": rates.torch(n, d, u, 4, 2) + downdate,
        "whitened": 3 * rates.torch(n, d, u, 4, 2) + downdate,
        "inverse_root": 2 * rates.torch(n, d, u, 4, 2) + rates.torch(n, d, u, 8, 2),
    }[form]
    compute = passes + _weight(n, v, u, rates) + _redundant(d, u, rates) + rates.chain
    pieces = traffic(form, d, u, v, gpus)
    communication = sum(_link(kind, bytes_, gpus, rates) for kind, bytes_ in pieces)
    return Cost(gpus, _kept(form, n, d), sum(b for _, b in pieces), len(pieces), compute, communication)


def bank(model: Model, form: str, u: int, gpus: int, rates: Rates) -> Cost:
    """One layer of experts, each whole on one GPU: `StateBank`, with the gains where the weights are.

    u rows are each sent to `chosen` of `experts`, evenly at random; an expert that none is sent to is not touched. All
    experts of a layer share a prior. The fullest GPU decides.
    """
    d, v = model.d, model.v
    own = max(place([1.0] * model.experts, gpus, groups=[0] * model.experts).loads)
    touched = own * (1.0 - (1.0 - model.chosen / model.experts) ** u)
    filled = 16 * -(-round(u * model.chosen / model.experts) // 16)
    passes = rates.own(d, d, filled, 4, 2) + rates.own(d, d, filled, 6, 1)
    if form == "whitened":
        passes += 2 * rates.torch(d, d, filled, 4, 2)
    elif form == "inverse_root":
        passes = 2 * rates.torch(d, d, filled, 4, 2) + rates.torch(d, d, filled, 8, 2)
    each = passes + _weight(d, v, filled, rates) + _redundant(d, filled, rates) + rates.bookkeeping
    named = round(model.experts * (1.0 - (1.0 - model.chosen / model.experts) ** u))
    pieces = [] if gpus == 1 else [volume.confirm_bytes(gpus), (gpus - 1) * 16 * named]
    communication = sum(_link("gather", bytes_, gpus, rates) for bytes_ in pieces)
    memory = own * d * d * ITEM + (d * d * ITEM if form == "whitened" else 0)
    return Cost(gpus, memory, sum(pieces), len(pieces), touched * each + rates.chain, communication)


def table(
    rates: Rates,
    *,
    u: int = 100,
    models: Sequence[Model] = MODELS,
    gpus: Sequence[int] = GPUS,
    forms: Sequence[str] = FORMS,
) -> list[dict[str, Any]]:
    """A row for each model, form and number of GPUs, in plain units for print and JSON."""
    found = []
    for model in models:
        many = model.experts > 1
        for form in ("plain",) if many else forms:
            alone = bank(model, form, u, 1, rates) if many else single(model, form, u, rates)
            for count in gpus:
                cost = bank(model, form, u, count, rates) if many else sharded(model, form, u, count, rates)
                row = _row(model, form, cost, alone, rates)
                if not many:
                    row["fused_layer_ms"] = 1e3 * sharded(model, form, u, count, rates, fused=True).time
                found.append(row)
    return found


def pays_from(form: str, u: int, gpus: int, rates: Rates) -> int | None:
    """The smallest d, in steps of 256, from which on so many GPUs are faster than one; None: not up to 65,536.

    For a weight of v = d / 3.5 outputs, as the Llama models have them.
    """
    least = None
    for d in range(65536, 0, -256):
        model = Model("", d, round(d / 3.5), 1)
        if sharded(model, form, u, gpus, rates).time >= single(model, form, u, rates).time:
            return least
        least = d
    return least


def _row(model: Model, form: str, cost: Cost, alone: Cost, rates: Rates) -> dict[str, Any]:
    return {
        "model": model.name,
        "form": form,
        "d": model.d,
        "gpus": cost.gpus,
        "memory_GB": cost.memory / 1e9,
        "memory_all_GB": cost.memory * model.layers / 1e9,
        "fits": cost.memory * model.layers <= rates.room,
        "received_MB": cost.received / 1e6,
        "collectives": cost.collectives,
        "compute_ms": cost.compute * 1e3,
        "communication_ms": cost.communication * 1e3,
        "layer_ms": cost.time * 1e3,
        "all_layers_ms": cost.time * model.layers * 1e3,
        "speedup": alone.time / cost.time,
        "efficiency": alone.time / cost.time / cost.gpus,
    }


def _kept(form: str, n: float, d: int) -> float:
    """Bytes of n rows of a state; the whitened form keeps the prior's root beside its matrix."""
    return n * d * ITEM * (2 if form == "whitened" else 1)


def _weight(n: float, v: int, u: int, rates: Rates) -> float:
    """K W, and W + g E."""
    return rates.torch(n, v, u, 4, 2) + rates.torch(n, v, u, 8, 2)


def _redundant(d: int, u: int, rates: Rates) -> float:
    """The Gram matrix and the two solves, on every rank."""
    return rates.own(d, u, u, 16, 4)


def _tiles(n: float, d: int, u: int, rates: Rates) -> float:
    """The downdate of n rows by torch, tile by tile (`rows.downdate_rows_`): product, sum, copy."""
    side = rows._TILE
    tiles = math.ceil(n / side) * math.ceil(d / side)
    spilled = side * side * ITEM > 0.5 * rates.cache
    return max(3 * tiles * rates.launch, rates.torch(n, d, u, 24 if spilled else 8, 2))


def _link(kind: str, bytes_: float, gpus: int, rates: Rates) -> float:
    """Seconds of one collective in which a GPU receives so many bytes.

    Within a node over NVLink. Over nodes every GPU has a link of its own: an all-gather brings each byte into a node
    once and spreads it there; of an exchange all that comes from other nodes takes the GPU's own link.
    """
    if gpus <= rates.node:
        return rates.near + bytes_ / (rates.nvlink * rates.link_efficiency)
    outside = bytes_ * (gpus - rates.node) / (gpus - 1)
    if kind == "gather":
        outside /= rates.node
    slowest = max(outside / rates.infiniband, bytes_ / rates.nvlink)
    return rates.far + slowest / rates.link_efficiency
