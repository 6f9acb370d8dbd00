"""Options that several commands share, and the values they take."""

from __future__ import annotations

import argparse
import ast
import math
import os
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from rlsedit.config import EditConfig
    from rlsedit.facts import Fact
    from rlsedit.methods import Method
    from rlsedit.models import Adapter
    from rlsedit.report import Console

__all__ = [
    "add_device",
    "add_facts",
    "add_layers",
    "add_model",
    "add_settings",
    "amount",
    "blamed",
    "check_layers",
    "check_outputs",
    "config_for",
    "device_of",
    "layer_list",
    "load_any",
    "measurable",
    "method_name",
    "natural",
    "place",
    "positive",
    "quiet_transformers",
    "read_facts",
    "refuse_unused",
    "setting",
    "whole",
]

_DTYPES = ("auto", "float32", "float64", "bfloat16", "float16")


LARGEST = 2**63 - 1
"""What torch takes for a seed, SQLite for a number of rows, and more than anybody counts to."""
_DEEPEST = 9_999
"""More layers than any model has; a span of billions would fill the memory before a model could tell."""


def whole(least: int) -> Callable[[str], int]:
    """The parser of a whole number of at least `least`."""

    def parsed(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"needs a whole number of at least {least}, got {text[:40]!r}") from None
        if not least <= value <= LARGEST:
            bound = f"at least {least}" if value < least else f"at most {LARGEST}"
            raise argparse.ArgumentTypeError(f"needs a whole number of {bound}, got {text[:40]}")
        return value

    return parsed


positive, natural = whole(1), whole(0)


def amount(text: str) -> float:
    """A number above 0, of seconds or gigabytes."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not value > 0:
        raise argparse.ArgumentTypeError(f"needs a number above 0, got {text[:40]!r}")
    return value


def place(text: str) -> Path:
    """A path to write to; an empty one, as of a variable that is not set, would be the folder one is in."""
    if not text:
        raise argparse.ArgumentTypeError("needs a path, got ''")
    return Path(text)


def layer_list(text: str) -> tuple[int, ...]:
    """Layers as in "4-8" or "4,5,8", ascending."""
    found: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d+)\s*(?:-\s*(\d+)\s*)?", part)
        if match is None:
            raise argparse.ArgumentTypeError(f'needs layers such as "4-8" or "4,5,8", got {text!r}')
        first, last = int(match[1]), int(match[2] or match[1])
        if last > _DEEPEST:
            raise argparse.ArgumentTypeError(f"needs layers of at most {_DEEPEST}, got {text[:40]!r}")
        found += range(first, last + 1)
    if not found or found != sorted(set(found)):
        raise argparse.ArgumentTypeError(f"needs layers in ascending order, each once, got {text!r}")
    return tuple(found)


def method_name(text: str) -> str:
    """The name of a method."""
    from rlsedit.methods import get_method, list_methods

    try:
        return get_method(text).name
    except ValueError:
        raise argparse.ArgumentTypeError(f"needs a method among {', '.join(list_methods())}, got {text!r}") from None


_WORDS = ("relative_to",)
"""Hyper-parameters whose values are words."""


def setting(text: str) -> tuple[str, Any]:
    """NAME=VALUE with a number for a value, or a word for those that have words."""
    from dataclasses import fields

    from rlsedit.config import EditConfig

    name, sign, value = text.partition("=")
    known = sorted(field.name for field in fields(EditConfig) if field.name != "layers")
    if sign and name.strip() not in known:
        raise argparse.ArgumentTypeError(f"no hyper-parameter {name.strip()!r}; there are {', '.join(known)}")
    try:
        parsed = ast.literal_eval(value.strip())
    except (ValueError, SyntaxError):
        parsed = None
    word = name.strip() in _WORDS
    if not sign or (not word and (isinstance(parsed, bool) or not isinstance(parsed, (int, float)))):
        raise argparse.ArgumentTypeError(f"needs NAME=NUMBER such as steps=10, got {text!r}")
    given: Any = value.strip() if word else parsed
    try:
        EditConfig((), **{name.strip(): given})  # each is checked by itself: before a model is loaded for it
    except (TypeError, ValueError) as error:
        raise argparse.ArgumentTypeError(str(error).removeprefix("EditConfig: ")) from None
    return name.strip(), given


def add_device(
    parser: argparse._ActionsContainer, dtype: str | None = "of the weights; auto keeps that of the files"
) -> None:
    """--device, and --dtype with the help `dtype` unless that is None."""
    parser.add_argument(
        "--device", default="auto", metavar="NAME",
        help="cpu, cuda, cuda:1, ...; auto takes a GPU if there is one (default auto)",
    )  # fmt: skip
    if dtype is not None:
        parser.add_argument("--dtype", default="auto", choices=_DTYPES, help=f"{dtype} (default auto)")


def add_model(parser: argparse.ArgumentParser, *, required: bool = True) -> None:
    """MODEL, --device and --dtype."""
    parser.add_argument(
        "model", metavar="MODEL", nargs=None if required else "?",
        help="folder of a Hugging Face causal LM, or smollm2 for the one of the demo",
    )  # fmt: skip
    add_device(parser)


def _file(text: str) -> Path:
    """A path, or that of a cached file of a data set."""
    from rlsedit.facts.hub import cached_file

    try:
        return cached_file(text)
    except (ValueError, FileNotFoundError) as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def add_facts(parser: argparse._ActionsContainer, *, required: bool = True) -> None:
    """--facts, --limit and --skip-bad."""
    parser.add_argument(
        "--facts",
        required=required,
        type=_file,
        metavar="FILE",
        help="one JSON fact a line, ours or CounterFact's; .gz too; or hf://datasets/OWNER/NAME/FILE from the cache",
    )
    parser.add_argument("--limit", type=positive, metavar="N", help="only the first N facts (default: all)")
    parser.add_argument("--skip-bad", action="store_true", help="leave bad records out, with a warning for each")


def add_layers(parser: argparse._ActionsContainer) -> None:
    """--layers."""
    parser.add_argument(
        "--layers", type=layer_list, metavar="LIST",
        help='edited layers, "4-8" or "4,5,8" (default: those of the preset)',
    )  # fmt: skip


def add_settings(parser: argparse._ActionsContainer) -> None:
    """--layers, --seed and --set, which change the preset of the model."""
    add_layers(parser)
    parser.add_argument("--seed", type=natural, metavar="N", help="of the random prefixes (default 0)")
    parser.add_argument(
        "--set",
        dest="settings",
        action="append",
        default=[],
        type=setting,
        metavar="NAME=VALUE",
        help="any other hyper-parameter of EditConfig, such as steps=10; may be repeated",
    )


def config_for(model: Any, args: argparse.Namespace) -> EditConfig:
    """The preset of the model with what the command line changes.

    Raises:
        ValueError: for a value that `EditConfig` refuses.
    """
    from rlsedit.config import EditConfig

    changes: dict[str, Any] = dict(args.settings)
    if args.layers is not None:
        changes["layers"] = args.layers
    if args.seed is not None:
        changes["seed"] = args.seed
    config = EditConfig.for_model(model, getattr(args, "method", "rlsedit"), **changes)
    return config


def device_of(name: str) -> torch.device:
    """The device called `name`, checked to be there.

    Raises:
        ValueError: if there is no such device.
    """
    import torch

    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        reason = "needs cpu, cuda, cuda:1, ..." if reason.startswith("Expected one of") else reason
        raise ValueError(f"--device: {name!r} is not there: {reason}") from None
    if device.type == "meta":
        raise ValueError("--device: 'meta' holds no weights; needs cpu or cuda")
    return device


def quiet_transformers() -> None:
    """Keeps the bars and notes of transformers out of ours; `TQDM_DISABLE` alone comes late in a running process."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()


def load_any(args: argparse.Namespace, option: str = "MODEL") -> tuple[Any, Any]:
    """Model and tokenizer that MODEL, or what else `option` says, --device and --dtype name."""
    import torch

    from rlsedit.models import smollm2

    quiet_transformers()
    device = device_of(args.device)
    dtype = "auto" if args.dtype == "auto" else getattr(torch, args.dtype)
    with blamed(option, "model: "):
        folder = smollm2.cached_copy() if args.model == "smollm2" else Path(args.model)
        return smollm2.load_model(folder, dtype=dtype, device=device)


@contextmanager
def blamed(option: str, instead: str = "") -> Iterator[None]:
    """What is wrong with a value names the option, or the argument, that it was given by.

    Args:
        option: as the user writes it.
        instead: the beginning of messages in whose place it stands.

    Raises:
        OSError, ValueError: of the same kind, with the option in front.
    """
    try:
        yield
    except OSError as error:
        told = f"{error.filename}: {error.strerror}" if error.strerror and error.filename else str(error)
        kind = type(error) if type(error).__module__ == "builtins" else OSError
        raise kind(f"{option}: {told.removeprefix(instead)}") from error
    except ValueError as error:
        raise ValueError(f"{option}: {str(error).removeprefix(instead)}") from error


def read_facts(args: argparse.Namespace, option: str = "--facts") -> list[Fact]:
    """The facts that --facts, --limit and --skip-bad name; in a message their file is that of `option`."""
    from rlsedit.facts import load_facts

    with blamed(option):
        facts = load_facts(args.facts, on_error="skip" if args.skip_bad else "raise")
    return facts[: args.limit]


def measurable(facts: Sequence[Fact], console: Console) -> list[Fact]:
    """The facts as they are scored: without neighbours that the facts themselves edit, which a line then says."""
    from rlsedit.facts import without_edited_neighbours

    found = without_edited_neighbours(facts)
    every, kept = (sum(len(fact.neighbours) for fact in part) for part in (facts, found))
    if kept < every:
        console.line(f"{every - kept} of {every} neighbours are edited by these facts themselves and are not measured")
    return found


def check_outputs(
    args: argparse.Namespace,
    *names: str,
    beside: bool = False,
    file: bool = False,
    spare: Iterable[str | os.PathLike[str] | None] = (),
) -> None:
    """Refuse, before any work is done, options that name a place where nothing can be written, or nothing should.

    Args:
        args: of the command.
        names: of the options, without dashes; those that are not given are passed over.
        beside: whether what is there is replaced by another file or folder of its name.
        file: whether a file is written.
        spare: what the command reads, which an output must not replace.

    Raises:
        OSError, ValueError: naming the option.
    """
    from rlsedit.paths import check_spared, check_writable

    for name in names:
        if getattr(args, name) is not None:
            check_spared(f"--{name}", getattr(args, name), spare)
            check_writable(f"--{name}", getattr(args, name), beside=beside, file=file)


def refuse_unused(args: argparse.Namespace, used: Collection[str], where: str) -> None:
    """Refuse options that were given and that a command which does several things would pass over this time.

    Args:
        args: of the command, with its `parser`.
        used: destinations of the options that count this time.
        where: end of "has no effect ...".

    Raises:
        ValueError: naming the option.
    """
    for action in args.parser._actions:
        spared = action.dest in ("help", "debug", "verbose") or action.dest in used
        if not spared and getattr(args, action.dest) != action.default:
            name = action.option_strings[-1] if action.option_strings else str(action.metavar)
            raise ValueError(f"{name}: has no effect {where}; leave it out")


def check_layers(
    adapter: Adapter, config: EditConfig, method: Method | None = None, states: str = "auto", name: str = "--layers"
) -> None:
    """Refuses layers that the model does not have, and what an editor would: before second moments are measured.

    Raises:
        ValueError: naming the layers there are, or as `Editor`.
    """
    if not config.layers or config.layers[-1] >= adapter.num_layers:
        raise ValueError(f"{name}: must be within 0 to {adapter.num_layers - 1}, got {list(config.layers)}")
    if method is not None:
        from rlsedit import checking

        checking.check_layers(adapter, method, config, states)
