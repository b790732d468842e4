"""Numbers that tests leave behind: `STOPGO_RECORD=bench/results/ranks.json make test-slow` writes what they measured there."""

from __future__ import annotations

import json
import os
from datetime import date
from pathlib import Path

from pipelines.files import write_atomic


def record(topic: str, name: str, numbers: object) -> None:
    """Put `numbers` under `topic` and `name` into the file that STOPGO_RECORD names; without it, nothing."""
    if "STOPGO_RECORD" not in os.environ:
        return
    path = Path(os.environ["STOPGO_RECORD"])
    found = json.loads(path.read_text()) if path.exists() else {}
    section = found.setdefault(topic, {})
    section[name] = {"date": date.today().isoformat(), "numbers": numbers}
    write_atomic(path, (json.dumps(found, indent=1, sort_keys=True) + "\n").encode())
