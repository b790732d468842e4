"""How far a comparison is, on stderr: a bar on a terminal, elsewhere a line for every start."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from bench.compare.measure import Progress as Told


@contextmanager
def progress_on_stderr(seconds: float) -> Iterator[Told]:
    """Yields what is to be told the share that is done, 0 to 1, of about so many seconds."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield _Lines(seconds)
        return
    with Progress(
        TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn(), console=console, transient=True
    ) as bar:
        task = bar.add_task("both sides start", total=1.0)
        yield lambda share, doing: bar.update(task, completed=share, description=doing)


class _Lines:
    def __init__(self, seconds: float) -> None:
        self._seconds, self._last = seconds, ""

    def __call__(self, share: float, doing: str) -> None:
        if doing != self._last:
            self._last = doing
            print(f"{doing}: about {max(0.0, (1 - share) * self._seconds):.0f} s left", file=sys.stderr, flush=True)
