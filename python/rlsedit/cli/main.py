"""Parses the command line, runs one command, and turns errors into one line and an exit status."""

from __future__ import annotations

import argparse
import importlib.util
import logging
import os
import re
import sys
from collections.abc import Sequence
from contextlib import suppress
from importlib import metadata
from typing import NoReturn

from rlsedit.cli import (
    ability,
    demo,
    edit,
    evaluate,
    export,
    facts,
    launch,
    log,
    methods,
    profile,
    remove,
    stability,
    stats,
)  # fmt: skip

__all__ = ["build_parser", "main"]

BAD_INPUT = 2
FAILED = 1
INTERRUPTED = 130

_COMMANDS = (demo, edit, log, remove, evaluate, ability, export, profile, stability, facts, stats, methods)
_EXAMPLES = "examples:"
_NO_MEMORY = ("can't allocate memory", "out of memory")
"""What torch says of the host in a RuntimeError, and of a GPU."""
_EXPECTED = (ValueError, TypeError, OSError, ImportError)


class _Parser(argparse.ArgumentParser):
    """An argument parser whose errors take one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(BAD_INPUT, f"{self.prog}: {message} (see {self.prog} --help)\n")


class _Formatter(argparse.HelpFormatter):
    """Keeps the lines of examples, which are to be copied."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        return text if text.startswith(_EXAMPLES) else super()._fill_text(text, width, indent)


def _shown(examples: Sequence[str]) -> str:
    return _EXAMPLES + "".join(f"\n  {line}" for line in examples)


def build_parser() -> argparse.ArgumentParser:
    """The parser of all commands."""
    parser = _Parser(
        prog="rlsedit", description="Write streams of facts into language models.", formatter_class=_Formatter,
        epilog=_shown((*demo.EXAMPLES, *edit.EXAMPLES[:1], "rlsedit COMMAND --help")),
    )  # fmt: skip
    parser.add_argument("--version", action=_Version, nargs=0, help="show the version and exit")
    common = _Parser(add_help=False)
    group = common.add_argument_group("for all commands")
    group.add_argument("--debug", action="store_true", help="show the traceback of an error")
    group.add_argument("-v", "--verbose", action="store_true", help="log what is being done to standard error")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True, parser_class=_Parser)
    for command in _COMMANDS:
        sub = commands.add_parser(
            command.NAME, parents=[common], help=command.HELP, description=command.DESCRIPTION,
            epilog=_shown(command.EXAMPLES), formatter_class=_Formatter,
        )  # fmt: skip
        command.add_arguments(sub)
        sub.set_defaults(run=command.run, parser=sub, command=command.NAME)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line.

    Args:
        argv: arguments without the program's name; those of the process by default.

    Returns:
        0 on success, 2 for wrong input (one line on standard error), 1 for anything unexpected, 130 after Ctrl-C.
    """
    launch.hush()
    for name in ("stdout", "stderr"):  # closed by who has started the process
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115 - as long as the process
    for word in sys.argv[1:] if argv is None else argv:
        if word != (shown := word.encode(errors="backslashreplace").decode()):
            message = f"arguments must be UTF-8, as names in files of tensors and reports are, got {shown}"
            return launch.linger(_complain(message, BAD_INPUT))
    try:
        args, left = build_parser().parse_known_args(argv)
        if left:
            args.parser.error(f"unrecognized arguments: {' '.join(left)}")
    except KeyboardInterrupt:  # options are checked against what torch is imported for
        return launch.linger(_complain("interrupted; nothing has begun", INTERRUPTED))
    except SystemExit as stop:
        return launch.linger(stop.code if isinstance(stop.code, int) else BAD_INPUT)
    except OSError as error:  # --version where nothing can be written
        return launch.linger(_complain(f"standard output: {_one_line(error)}", FAILED))
    _set_up(args.verbose)
    if launch.size() > 1 and args.command not in launch.COMMANDS:
        names = " and ".join(launch.COMMANDS)
        message = f"{args.command}: is for one process, got {launch.size()}; torchrun is for {names}"
        return launch.linger(_complain(message, BAD_INPUT))
    return launch.linger(_run(args))


def _run(args: argparse.Namespace) -> int:
    try:
        import numpy  # noqa: F401 - before torch, which imports it too and keeps a Ctrl-C of that moment to itself

        status: int = args.run(args)
        return status
    except KeyboardInterrupt:
        return _complain("interrupted; nothing half written is left", INTERRUPTED)
    except BrokenPipeError:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - the interpreter flushes it when it ends
        return FAILED
    except _EXPECTED as error:
        if args.debug:
            raise
        return _complain(_one_line(error), BAD_INPUT)
    except Exception as error:
        if args.debug:
            raise
        if type(error).__name__ == "BackendUnavailableError":  # the kernels are not imported for it
            return _complain(_one_line(error), BAD_INPUT)
        if isinstance(error, MemoryError) or any(words in str(error) for words in _NO_MEMORY):
            return _complain(f"not enough memory: {_one_line(error)}", FAILED)
        told = launch.status_of(error, _EXPECTED, BAD_INPUT, FAILED)
        if told is not None:
            return _complain(_one_line(error), told)
        return _complain(f"unexpected {type(error).__name__}: {_one_line(error)} (--debug shows where)", FAILED)


class _Version(argparse.Action):
    """Shows the version, importing the kernels only then."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        from rlsedit_kernels import __version__

        sys.stdout.write(f"rlsedit {__version__}\n")
        sys.stdout.flush()
        parser.exit(0)


def _set_up(verbose: bool) -> None:
    """Quiet libraries and no network; what a user has set in the environment stays."""
    for name, value in (("HF_HUB_OFFLINE", "1"), ("TQDM_DISABLE", "1"), ("TRANSFORMERS_VERBOSITY", "error")):
        os.environ.setdefault(name, value)
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("rlsedit: %(message)s"))
    for name in ("rlsedit", "rlsedit_kernels"):
        log = logging.getLogger(name)
        log.handlers[:] = [handler]
        log.setLevel(logging.INFO if verbose else logging.WARNING)
        log.propagate = False


def _complain(message: str, status: int) -> int:
    if sys.stderr.isatty():
        sys.stderr.write("\r\x1b[2K")
    sys.stderr.write(f"rlsedit: {message}\n")
    return status


def _one_line(error: BaseException) -> str:
    if isinstance(error, ModuleNotFoundError) and error.name is not None:
        package = error.name.partition(".")[0]
        if (extra := _extra_with(package)) and not _is_installed(package):
            return f"{package} is not installed: pip install 'rlsedit-kernels[{extra}]'"
    if isinstance(error, OSError) and error.strerror and error.filename:
        other = f" to {error.filename2}" if error.filename2 else ""  # of a copy or a renaming; either may be the cause
        return f"{error.filename}{other}: {error.strerror}"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror  # without its number
    return " ".join(str(error).split()) or type(error).__name__


def _extra_with(package: str) -> str | None:
    """The extra of this distribution that installs a package; None if there is none."""
    with suppress(metadata.PackageNotFoundError):
        for line in metadata.requires("rlsedit-kernels") or ():
            if re.split(r"[^\w-]", line)[0] == package and (extra := re.search(r"extra == [\"'](\w+)", line)):
                return extra[1]
    return None


def _is_installed(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is not None
    except (ImportError, ValueError):
        return False
