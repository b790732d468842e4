"""A small run in a process of its own: `python -m tests.engine.small_train ARGUMENTS OF engine.train`.

The reader of the small data sets serves from memory, so the process makes them again, in a folder of its own.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from engine.train import main
from tests.engine.small_run import configure

if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        configure(Path(folder))
        sys.exit(main())
