"""What an evaluation keeps on disk: one file for the plan, one for each run, written whole after every batch."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ..paths import atomic_write_text
from ..report.scores import finite
from .plan import Plan, RunSpec

__all__ = ["SCHEMA", "Folder", "RunRecord"]

SCHEMA = "rlsedit-evaluation/1"


@dataclass
class RunRecord:
    """One stream.

    Attributes:
        spec: method, seed and order.
        config: `EditConfig` as it was used.
        batches: for each batch "facts" written so far, "seconds" by stage, "fit", "parameter", "anchor" (see
            `evaluation.objective`), "parameter_bound", "anchor_bound", "target_loss", "steps".
        checkpoints: for each checkpoint "facts", and "groups": group -> {"counterfact": summary, "writing": summary,
            "count"}; the first is at 0 facts.
        rows: group "all" at the last checkpoint that this run has measured, fact by fact.
        ability: "before" and "after": task -> summary.
        complete: whether the stream has come to its end.
        error: what ended it before, if anything did.
    """

    spec: RunSpec
    config: dict[str, Any] = field(default_factory=dict)
    batches: list[dict[str, Any]] = field(default_factory=list)
    checkpoints: list[dict[str, Any]] = field(default_factory=list)
    rows: list[dict[str, Any]] = field(default_factory=list)
    ability: dict[str, dict[str, Any]] = field(default_factory=dict)
    complete: bool = False
    error: str = ""

    def done(self, facts: int) -> bool:
        """Whether a checkpoint has been measured."""
        return any(entry["facts"] == facts for entry in self.checkpoints)

    @property
    def last(self) -> dict[str, Any] | None:
        """The last checkpoint, None before there is one behind an edit."""
        found = [entry for entry in self.checkpoints if entry["facts"] > 0]
        return found[-1] if found else None


class Folder:
    """The folder of an evaluation.

    Args:
        path: made if it is not there.

    Raises:
        ValueError: something else is there.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if self.path.exists() and not self.path.is_dir():
            raise ValueError(f"{self.path} is a file, needs a folder")
        if self.path.is_dir() and any(self.path.iterdir()) and not self._plan.is_file():
            raise ValueError(f"{self.path} is not empty and holds no evaluation; needs another folder")

    @property
    def _plan(self) -> Path:
        return self.path / "plan.json"

    @property
    def targets(self) -> Path:
        """Where z* are kept, by which a run that was stopped catches up."""
        return self.path / "targets"

    def begin(self, plan: Plan, environment: dict[str, Any]) -> None:
        """Write the plan, or check that it is the one that is there.

        Methods may have been added since, and the settings of those that have not begun may have changed.

        Raises:
            ValueError: the folder belongs to another plan; the message names the field.
        """
        content, known = self.check(plan)
        if known is None:
            self._write(self._plan, {"schema": SCHEMA, "plan": content, "environment": environment})
        elif content != known:
            self._write(self._plan, {**self.plan(), "plan": content})

    def check(self, plan: Plan) -> tuple[dict[str, Any], dict[str, Any] | None]:
        """Compare a plan with that of the folder, and write nothing.

        Returns:
            The plan as it is written, and the one that is there, None in a new folder.

        Raises:
            ValueError: as for `begin`.
        """
        content = {**plan.as_dict(), "facts_sha256": _digest(plan.facts)}
        others = {"text": plan.text, **plan.ability}  # named without their folder in the plan
        content["files_sha256"] = {name: _digest(file) for name, file in others.items() if file and file.is_file()}
        if not self._plan.is_file():
            return content, None
        known: dict[str, Any] = self.plan()["plan"]
        for name in sorted(set(content) | set(known)):
            mine: Any = content.get(name)
            theirs: Any = known.get(name)
            if name == "methods":
                same = set(theirs) <= set(mine)
            elif name == "files_sha256":
                same = theirs is None or mine == theirs  # folders of earlier versions have none
            elif name == "settings":
                begun = {record.spec.method for record in self.runs()}
                same = all(_settings(mine, method) == _settings(theirs, method) for method in begun)
            else:
                same = mine == theirs
            if not same:
                raise ValueError(
                    f"{self.path} holds an evaluation with {name} = {theirs!r}, this one has {mine!r}; give "
                    "another folder"
                )
        return content, known

    def plan(self) -> dict[str, Any]:
        """What `begin` wrote.

        Raises:
            ValueError: there is none, or it is of another schema.
        """
        if not self._plan.is_file():
            raise ValueError(f"{self.path}: no evaluation in this folder (plan.json is missing)")
        return self._read(self._plan)

    def run(self, spec: RunSpec) -> RunRecord:
        """The record of a run; an empty one before it has begun."""
        file = self._run_file(spec)
        if not file.is_file():
            return RunRecord(spec)
        content = self._read(file)
        return RunRecord(**{**content["run"], "spec": spec})

    def save(self, record: RunRecord) -> None:
        """Write the record of a run whole."""
        self._write(self._run_file(record.spec), {"schema": SCHEMA, "run": asdict(record)})

    def runs(self) -> list[RunRecord]:
        """All records, in the order of the plan."""
        plan = self.plan()["plan"]
        specs = [
            RunSpec(method, seed, order)
            for seed in plan["seeds"] for order in plan["orders"] for method in plan["methods"]
        ]  # fmt: skip
        return [self.run(spec) for spec in specs if self._run_file(spec).is_file()]

    def results(self) -> dict[str, Any]:
        """Everything in one object, as in results.json."""
        head = self.plan()
        return {**head, "runs": [finite(asdict(record)) for record in self.runs()]}

    def _run_file(self, spec: RunSpec) -> Path:
        return self.path / "runs" / f"{spec.name}.json"

    def _write(self, file: Path, content: dict[str, Any]) -> None:
        file.parent.mkdir(parents=True, exist_ok=True)
        atomic_write_text(file, json.dumps(finite(content), indent=1, ensure_ascii=False) + "\n")

    @staticmethod
    def _read(file: Path) -> dict[str, Any]:
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise ValueError(f"{file}: not valid JSON: {error}") from None
        if not isinstance(content, dict) or content.get("schema") != SCHEMA:
            raise ValueError(f"{file}: schema must be {SCHEMA!r}")
        return content


def _settings(settings: dict[str, dict[str, Any]], method: str) -> dict[str, Any]:
    return {**settings.get("all", {}), **settings.get(method, {})}


def _digest(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()
