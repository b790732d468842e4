"""Progress of commands that go through images: on standard error, a bar on a terminal, elsewhere a line now and then."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

_PLAIN_SECONDS = 30.0

OnProgress = Callable[[float, int], None]
"""Called with the share that is done, 0 to 1, and the number of images."""


@contextmanager
def images_on_stderr() -> Iterator[OnProgress]:
    """Shows share, images and images/s of this process; a line every half minute where there is no terminal."""
    console = Console(stderr=True)
    speed = _Speed()
    if not console.is_terminal:
        last = time.monotonic()

        def plain(share: float, images: int) -> None:
            nonlocal last
            text = speed.text(images)
            if time.monotonic() - last >= _PLAIN_SECONDS:
                last = time.monotonic()
                print(f"{share:.0%}, {text}", file=sys.stderr, flush=True)

        yield plain
        return
    columns = (BarColumn(), TextColumn("{task.percentage:.0f} %"), TextColumn("{task.fields[images]}"))
    with Progress(*columns, TimeRemainingColumn(), console=console, transient=True) as progress:
        task = progress.add_task("", total=1.0, images="")
        yield lambda share, images: progress.update(task, completed=share, images=speed.text(images))


class _Speed:
    """Images/s since the first call, whose images an interrupted run may have done."""

    def __init__(self) -> None:
        self._start: tuple[float, int] | None = None

    def text(self, images: int) -> str:
        now = time.monotonic()
        self._start = self._start or (now, images)
        seconds, done = now - self._start[0], images - self._start[1]
        return f"{images} images" + (f", {done / seconds:.1f} images/s" if done and seconds else "")
