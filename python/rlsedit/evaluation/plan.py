"""A plan of an evaluation: which model, facts, methods and streams, what is measured and when."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..config import EditConfig
from ..methods import get_method

__all__ = ["METRICS", "Plan", "RunSpec", "load_plan", "plan_from"]

METRICS = ("counterfact", "writing")
"""`rlsedit.metrics.evaluate` and `evaluate_writing`."""


@dataclass(frozen=True)
class RunSpec:
    """One stream: a method with a seed on an order of the facts.

    Attributes:
        method: its name.
        seed: of the contexts.
        order: 0 for the order of the file, otherwise the seed of a shuffle.
    """

    method: str
    seed: int
    order: int

    @property
    def name(self) -> str:
        """As in the names of files: "rlsedit-seed0-order0"."""
        return f"{self.method}-seed{self.seed}-order{self.order}"


@dataclass(frozen=True)
class Plan:
    """What is run and measured.

    Attributes:
        model: folder of a causal LM, or "smollm2".
        facts: file of facts, in any of the formats of `rlsedit.load_facts`.
        limit: only the first so many; None for all.
        skip_bad: whether malformed records are left out with a warning; otherwise they are an error.
        methods: names of `list_methods()`, or "alphaedit_dense".
        batch: facts of one batch.
        checkpoints: numbers of facts written at which everything is measured; the end always is.
        first: facts at the beginning of a stream that are measured at every checkpoint (retention); 0 for none.
        sample: at most so many facts of a group are measured, the same ones at every checkpoint; 0 for all.
        seeds: of the contexts, one run each.
        orders: 0 for the order of the file, other numbers are seeds of shuffles; one run each.
        conflicts: how often each fact is written again with another answer behind the others; 0 for none.
        metrics: among `METRICS`.
        length: tokens of generated texts.
        text: file on which second moments are measured; None for the prose of Python's documentation.
        settings: by method, or "all": fields of `EditConfig` that differ from the preset.
        ability: task name -> file, measured before and behind each stream.
        ability_limit: records of each task; 0 for all.
        device, dtype: of the model.
    """

    model: str
    facts: Path
    limit: int | None = None
    skip_bad: bool = False
    methods: tuple[str, ...] = ("rlsedit",)
    batch: int = 100
    checkpoints: tuple[int, ...] = ()
    first: int = 100
    sample: int = 200
    seeds: tuple[int, ...] = (0,)
    orders: tuple[int, ...] = (0,)
    conflicts: int = 0
    metrics: tuple[str, ...] = ("counterfact",)
    length: int = 100
    text: Path | None = None
    settings: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    ability: Mapping[str, Path] = field(default_factory=dict)
    ability_limit: int = 0
    device: str = "auto"
    dtype: str = "auto"

    def __post_init__(self) -> None:
        for name in ("methods", "checkpoints", "seeds", "orders", "metrics"):
            value = tuple(getattr(self, name))
            if len(set(value)) != len(value):
                raise ValueError(f"plan: {name} must hold each entry once, got {list(value)}")
            object.__setattr__(self, name, value)
        for name in ("methods", "seeds", "orders", "metrics"):
            if not getattr(self, name):
                raise ValueError(f"plan: {name} must hold at least one entry, got none")
        for name in self.methods:
            get_method(name)
        if unknown := set(self.settings) - {"all", *self.methods}:
            raise ValueError(f"plan: settings are for methods of the plan or 'all', got {sorted(unknown)[0]!r}")
        if unknown := set(self.metrics) - set(METRICS):
            raise ValueError(f"plan: metrics must be among {', '.join(METRICS)}, got {sorted(unknown)[0]!r}")
        least = {"batch": 1, "first": 0, "sample": 0, "conflicts": 0, "length": 1, "ability_limit": 0}
        if self.limit is not None:
            least["limit"] = 1
        for name, bound in least.items():
            if getattr(self, name) < bound:
                raise ValueError(f"plan: {name} must be at least {bound}, got {getattr(self, name)}")
        for name, bound in (("checkpoints", 1), ("seeds", 0), ("orders", 0)):
            if wrong := [value for value in getattr(self, name) if value < bound]:
                raise ValueError(f"plan: {name} must be at least {bound}, got {wrong[0]}")
        object.__setattr__(self, "checkpoints", tuple(sorted(self.checkpoints)))
        for name in self.methods:
            self._check_settings(name)

    def _check_settings(self, method: str) -> None:
        """Refuse what no model could make right, before a stream is run; the rest is checked with the model."""
        own = {"seed": "seeds", "batch_size": "batch"}
        known = {f.name for f in dataclasses.fields(EditConfig)} - set(own)
        for table in ("all", method):
            if unknown := sorted(set(self.settings.get(table, {})) - known):
                name = unknown[0]
                hint = f"{own[name]} of the plan says it" if name in own else f"there are {', '.join(sorted(known))}"
                raise ValueError(f"plan: settings.{table} has no hyper-parameter {name!r}; {hint}")
        try:
            config = EditConfig(**self.config(method, self.seeds[0]))
        except (ValueError, TypeError) as error:
            raise ValueError(f"plan: settings of {method!r}: {error}") from None
        if get_method(method).single and len(config.layers) > 1:
            raise ValueError(
                f"plan: settings: layers must be one layer for {method!r}, got {list(config.layers)}; "
                f"settings.{method} can have its own"
            )

    @property
    def runs(self) -> tuple[RunSpec, ...]:
        """Every method on every order with every seed; methods next to each other share targets at the start."""
        return tuple(
            RunSpec(method, seed, order) for seed in self.seeds for order in self.orders for method in self.methods
        )

    def config(self, method: str, seed: int) -> dict[str, Any]:
        """What differs from the preset of the method."""
        return {**self.settings.get("all", {}), **self.settings.get(method, {}), "seed": seed}

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {f.name: _plain(getattr(self, f.name)) for f in dataclasses.fields(self)}


def load_plan(path: str | Path) -> Plan:
    """Read a plan from a TOML file; paths in it are relative to the file.

    Raises:
        OSError: it cannot be read.
        ValueError: it is no TOML, or a field is unknown, missing or of the wrong kind; the message names it.
    """
    path = Path(path)
    try:
        import tomllib
    except ModuleNotFoundError:  # Python 3.10
        import tomli as tomllib  # type: ignore[import-not-found, no-redef]
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not valid TOML: {error}") from None
    try:
        return plan_from(content, path.parent)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path}: {error}") from None


def plan_from(content: Mapping[str, Any], folder: Path | None = None) -> Plan:
    """A plan from plain values.

    Args:
        content: fields of `Plan`.
        folder: what relative paths are relative to; None leaves them.

    Raises:
        ValueError, TypeError: an unknown or missing field, or one of the wrong kind.
    """
    known = {f.name: f for f in dataclasses.fields(Plan)}
    if unknown := sorted(set(content) - set(known)):
        raise ValueError(f"plan: unknown field {unknown[0]!r}; there are {', '.join(known)}")
    for name in ("model", "facts"):
        if name not in content:
            raise ValueError(f"plan: {name} is missing")
    values = dict(content)
    for name, value in values.items():
        _check(name, value)
    for name in ("facts", "text"):
        if values.get(name) is not None:
            values[name] = _path(values[name], folder)
    if "ability" in values:
        values["ability"] = {task: _path(file, folder) for task, file in values["ability"].items()}
    if folder is not None and (folder / values["model"]).is_dir():
        values["model"] = str(folder / values["model"])
    return Plan(**values)


_KINDS: dict[str, type | tuple[type, ...]] = {
    **dict.fromkeys(("model", "device", "dtype"), str),
    **dict.fromkeys(("facts", "text"), (str, Path, type(None))),
    **dict.fromkeys(("batch", "first", "sample", "conflicts", "length", "ability_limit"), int),
    **dict.fromkeys(("methods", "checkpoints", "seeds", "orders", "metrics"), (list, tuple)),
    **dict.fromkeys(("settings", "ability"), Mapping),
    "limit": (int, type(None)),
    "skip_bad": bool,
}
_ENTRIES = {"methods": str, "metrics": str, "checkpoints": int, "seeds": int, "orders": int}


def _check(name: str, value: object) -> None:
    kind = _KINDS[name]
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        kinds = kind if isinstance(kind, tuple) else (kind,)
        wanted = " or ".join(k.__name__ for k in kinds if k is not type(None))
        raise TypeError(f"plan: {name} must be {wanted}, got {type(value).__name__}")
    if name in _ENTRIES:
        for entry in value:  # type: ignore[attr-defined]
            if not isinstance(entry, _ENTRIES[name]) or isinstance(entry, bool):
                raise TypeError(f"plan: {name} must hold {_ENTRIES[name].__name__} entries, got {entry!r}")
    if name == "settings":
        for method, fields in value.items():  # type: ignore[attr-defined]
            if not isinstance(fields, Mapping):
                raise TypeError(f"plan: settings.{method} must be a table, got {type(fields).__name__}")


def _path(value: object, folder: Path | None) -> Path:
    from ..facts.hub import cached_file

    path = cached_file(str(value))
    return path if folder is None or path.is_absolute() else folder / path


def _plain(value: Any) -> Any:
    if isinstance(value, Path):
        return value.name
    if isinstance(value, Mapping):
        return {key: _plain(entry) for key, entry in value.items()}
    return [_plain(entry) for entry in value] if isinstance(value, (list, tuple)) else value
