"""Saves an edited model as a folder that appears whole or not at all."""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path
from typing import Any

from rlsedit.paths import atomic_directory

__all__ = ["REPORT", "check_out", "save_model"]

REPORT = "rlsedit-report.json"
_BESIDES = ("LICENSE*", "NOTICE*", "*.model", "vocab.json", "merges.txt", "vocab.txt", "chat_template.*")


def check_out(out: Path, force: bool, model: str) -> None:
    """Refuses an --out that holds something, or that is the model itself, before any work is done.

    Raises:
        ValueError: saying what is in the way.
    """
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out: {out} is a file, needs a folder that is not there yet")
    if out.exists() and out.resolve() == Path(model).resolve():
        raise ValueError(f"--out: {out} is the model itself; needs another folder")
    if out.is_dir() and any(out.iterdir()) and not force:
        raise ValueError(f"--out: {out} is not empty; needs another folder, or --force to replace it")


def save_model(model: Any, tokenizer: Any, args: argparse.Namespace, report: str) -> None:
    """Writes weights, tokenizer, what else the tokenizer had on disk, and the report, then renames the folder.

    Raises:
        OSError: if it cannot be written; what was at --out is then still there.
    """
    with atomic_directory(args.out, replace=args.force) as work:
        model.save_pretrained(work)
        tokenizer.save_pretrained(work)
        source = Path(args.model)
        if source.is_dir():
            for pattern in _BESIDES:
                for file in source.glob(pattern):
                    if file.is_file() and not (work / file.name).exists():
                        shutil.copyfile(file, work / file.name)
        for file in work.iterdir():
            file.chmod(0o666 & ~_umask_of(work))
        (work / REPORT).write_text(report, encoding="utf-8")


def _umask_of(folder: Path) -> int:
    return 0o777 & ~folder.stat().st_mode
