"""Where tests find golden numbers and real data: `STOPGO_REFERENCE`, by default `../shared` beside the checkout."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
REFERENCE = Path(os.environ.get("STOPGO_REFERENCE", ROOT.parent / "shared"))


def reference(relative: str) -> Path:
    """The path of a reference file or folder; the test is skipped, with the reason, where it is absent."""
    path = REFERENCE / relative
    if not path.exists():
        pytest.skip(f"no reference data at {relative} (set STOPGO_REFERENCE)")
    return path
