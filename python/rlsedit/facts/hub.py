"""Files of data sets that Hugging Face's cache holds already; nothing is downloaded."""

from __future__ import annotations

import os
import re
from pathlib import Path

__all__ = ["cached_file"]

_NAME = re.compile(r"hf:/{1,2}datasets/(?P<repo>[^/@]+/[^/@]+)(?:@(?P<revision>[^/]+))?/(?P<file>.+)")


def cached_file(path: str | os.PathLike[str]) -> Path:
    """The file itself, or the one in the cache that a name such as ``hf://datasets/OWNER/NAME/FILE`` stands for.

    Args:
        path: a path, or ``hf://datasets/OWNER/NAME[@REVISION]/FILE`` as `huggingface_hub` writes it; the revision is a
            branch, a tag or a commit, "main" by default. The cache lies where `HF_HUB_CACHE` or `HF_HOME` say.

    Raises:
        ValueError: a name that starts with ``hf:`` and is not of that form.
        FileNotFoundError: the cache does not hold the file; the message says what it holds and how to fetch it.
    """
    text = os.fspath(path)
    if not text.startswith("hf:"):
        return Path(path)
    found = _NAME.fullmatch(text)
    if found is None:
        raise ValueError(f"a data set's file must be named hf://datasets/OWNER/NAME[@REVISION]/FILE, got {text}")
    from huggingface_hub import try_to_load_from_cache

    repo, revision, file = found["repo"], found["revision"], found["file"]
    cached = try_to_load_from_cache(repo, file, revision=revision, repo_type="dataset")
    if isinstance(cached, str):
        return Path(cached)
    fetch = f"hf download --repo-type dataset {repo} {file}" + (f" --revision {revision}" if revision else "")
    held = _held(repo)
    has = f"; it holds {', '.join(held[:5])} of this data set" if held else ""
    raise FileNotFoundError(f"{text}: not in the cache of Hugging Face{has}; fetch it with: {fetch}")


def _held(repo: str) -> list[str]:
    from huggingface_hub.constants import HF_HUB_CACHE

    folder = Path(HF_HUB_CACHE) / f"datasets--{repo.replace('/', '--')}" / "snapshots"
    files = (file.relative_to(folder).parts[1:] for file in folder.rglob("*") if file.is_file())
    return sorted({"/".join(parts) for parts in files})
