"""Imported first, lets a benchmark find the checkout that it is in, installed or not, and the helpers of its tests."""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[1:1] = [str(ROOT / folder) for folder in (".", "python", "tests/helpers")]
