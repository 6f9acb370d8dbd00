"""One fact to be written into a model."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

__all__ = ["Fact"]


@dataclass(frozen=True, slots=True)
class Fact:
    """A statement whose completion is to change, with the prompts that measure what else changed.

    The shape is CounterFact's (Meng et al. 2022, "Locating and Editing Factual Associations in GPT").

    Args:
        id: unique within a stream.
        prompt: the statement up to its completion, with ``{}`` once in the place of the subject.
        subject: what the statement is about.
        target_new: the completion to be written, without leading space (the tokenising code adds it).
        target_true: the completion that was right before, where known.
        paraphrases: full prompts that say the same in other words.
        neighbours: full prompts about other subjects, which the edit must leave alone.
        neighbour_answers: the right completion of each neighbour; empty when it is `target_true` for all of
            them.
        relation: a name for the kind of statement, for grouping.
        generation: prompts from which text is generated, for fluency and consistency.
        references: texts about subjects that the new completion is right for, for consistency.
        portability: (prompt, answers) of statements that follow from the edit; any of the answers is right.

    Raises:
        TypeError: if a field has the wrong type.
        ValueError: if a field is empty, carries outer blanks, or does not fit the others; the message names
            it.
    """

    id: str
    prompt: str
    subject: str
    target_new: str
    target_true: str | None = None
    paraphrases: tuple[str, ...] = ()
    neighbours: tuple[str, ...] = ()
    neighbour_answers: tuple[str, ...] = ()
    relation: str = ""
    generation: tuple[str, ...] = ()
    references: tuple[str, ...] = ()
    portability: tuple[tuple[str, tuple[str, ...]], ...] = ()

    def __post_init__(self) -> None:
        for name in ("id", "prompt", "subject", "target_new"):
            _check_text(name, getattr(self, name))
        if self.target_true is not None:
            _check_text("target_true", self.target_true)
        if not isinstance(self.relation, str):
            raise TypeError(f"relation must be a string, got {type(self.relation).__name__}")
        if self.relation:
            _check_text("relation", self.relation)
        if self.prompt.count("{}") != 1:
            raise ValueError(f"prompt must contain {{}} exactly once, in the place of the subject, got {self.prompt!r}")
        for name in ("paraphrases", "neighbours", "neighbour_answers", "generation", "references"):
            object.__setattr__(self, name, _texts(name, getattr(self, name)))
        object.__setattr__(self, "portability", _questions(self.portability))
        if self.neighbour_answers and len(self.neighbour_answers) != len(self.neighbours):
            raise ValueError(
                f"neighbour_answers must be empty or have one answer for each of the {len(self.neighbours)} "
                f"neighbours, got {len(self.neighbour_answers)}"
            )

    @property
    def text(self) -> str:
        """The prompt with the subject in its place."""
        return self.prompt.replace("{}", self.subject)

    def to_dict(self) -> dict[str, Any]:
        """The fields as a JSON-ready dictionary, empty ones left out."""
        fields = {key: _lists(value) for key, value in asdict(self).items()}
        return {key: value for key, value in fields.items() if value not in (None, [], "")}


def _check_text(name: str, value: object) -> None:
    if not isinstance(value, str):
        raise TypeError(f"{name} must be a string, got {type(value).__name__}")
    if any("\ud800" <= sign <= "\udfff" for sign in value):
        raise ValueError(f"{name} must be Unicode text, got a lone surrogate in {value!a}")
    if not value.strip():
        raise ValueError(f"{name} must not be empty, got {value!r}")
    if value != value.strip() and name in ("subject", "target_new", "target_true"):
        raise ValueError(f"{name} must have no blanks at its ends, got {value!r}")


def _texts(name: str, value: object) -> tuple[str, ...]:
    if isinstance(value, str) or not isinstance(value, (list, tuple)):
        raise TypeError(f"{name} must be a list of strings, got {type(value).__name__}")
    for index, item in enumerate(value):
        _check_text(f"{name}[{index}]", item)
    return tuple(value)


def _questions(value: object) -> tuple[tuple[str, tuple[str, ...]], ...]:
    if isinstance(value, str) or not isinstance(value, (list, tuple)):
        raise TypeError(f"portability must be a list of [prompt, answers], got {type(value).__name__}")
    found = []
    for index, entry in enumerate(value):
        where = f"portability[{index}]"
        if isinstance(entry, str) or not isinstance(entry, (list, tuple)) or len(entry) != 2:
            raise TypeError(f"{where} must be [prompt, answers], got {entry!r}")
        _check_text(f"{where}[0]", entry[0])
        answers = _texts(f"{where}[1]", entry[1])
        if not answers:
            raise ValueError(f"{where}[1] must hold an answer, got none")
        found.append((entry[0], answers))
    return tuple(found)


def _lists(value: Any) -> Any:
    return [_lists(item) for item in value] if isinstance(value, (list, tuple)) else value
