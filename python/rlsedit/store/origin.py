"""Where the edits of a folder come from: the model before them, the files of facts, the text of the second moments.

For people, the report and `rlsedit export`; nothing else depends on it. Folders of earlier versions have none.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from .errors import StoreError
from .files import DISK, put_plain
from .folder import store_of
from .session import Session

__all__ = ["Origin", "base_of", "origin_of"]

_NAME = "origin.json"
_REPORT = "rlsedit-report.json"


@dataclass(frozen=True)
class Origin:
    """What is known of where the edits come from.

    Attributes:
        base: the model before the edits: a folder, or smollm2; None where it is not known.
        facts: names of the files of facts, in the order in which they were first given.
        text: name of the file on which the second moments were measured; None for the installed prose.
    """

    base: str | None
    facts: tuple[str, ...] = ()
    text: str | None = None

    @property
    def model(self) -> str:
        """Name of the model before the edits."""
        return Path(self.base).name if self.base else ""

    def given(self, facts: str) -> Origin:
        """With one more file of facts."""
        return self if facts in self.facts else replace(self, facts=(*self.facts, facts))

    def write(self, path: Path) -> None:
        """Keep it in a folder that holds edits.

        Raises:
            OSError: it cannot be written.
        """
        text = json.dumps(asdict(self), indent=1, ensure_ascii=False) + "\n"
        put_plain(DISK, store_of(path) / _NAME, text.encode("utf-8"))


def base_of(model: str) -> str:
    """How a model given by name or folder is called from anywhere."""
    return model if model == "smollm2" else str(Path(model).resolve())


def origin_of(path: Path, model: str | None = None) -> Origin:
    """Of a folder that `rlsedit edit` has made; what is not known is empty.

    Args:
        path: the folder.
        model: the one at hand that its edits go into: the base where the folder does not tell, unless it lies there.
    """
    kept = _object(store_of(path) / _NAME)
    report = _object(path / _REPORT)
    if kept is None:  # of an earlier version, or only the model has been copied
        told = report.get("facts") if report else None
        told = told if isinstance(told, dict) else {}
        files = told.get("files") or [told.get("file")]
        kept = {"base": (report or {}).get("base"), "facts": files, "text": (report or {}).get("text")}
    base, text, facts = kept.get("base"), kept.get("text"), kept.get("facts")
    if not isinstance(base, str) or not base:
        base = _of_session(path)
    if base is None and model is not None and Path(model).resolve() != path.resolve():
        base = base_of(model)
    files = tuple(file for file in facts if isinstance(file, str) and file) if isinstance(facts, Sequence) else ()
    return Origin(base, files, text if isinstance(text, str) else None)


def _of_session(path: Path) -> str | None:
    """The folder that the model was loaded from when the edits began, if it is there.

    A relative path says nothing any more: it might meet another model where this process runs.
    """
    try:
        folder = Path(Session.read(store_of(path)).model)
    except StoreError:
        return None
    if not folder.is_absolute():
        return None
    there = (folder / "config.json").is_file() and folder.resolve() != path.resolve()
    return str(folder.resolve()) if there else None


def _object(file: Path) -> dict[str, object] | None:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None
