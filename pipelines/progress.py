"""Progress on stderr: a bar with rate and time left on a terminal, elsewhere a plain line every half minute."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text

Show = Callable[[str, int, int], None]
"""What is being done, how much of it is, and how much there is."""

OnProgress = Callable[[float, int], None]
"""The share that is done, 0 to 1, and the number of images."""

_PLAIN_SECONDS = 30.0
_SPEED_SECONDS = 300.0  # a block of work may take several


class _Rate(ProgressColumn):
    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text("" if speed is None else f"{speed:,.0f}/s")


@contextmanager
def progress_on_stderr() -> Iterator[Show]:
    """Yields what is to be called with every step of the work. What was done before the first call counts for no rate."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield _plain()
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), _Rate(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, speed_estimate_period=_SPEED_SECONDS) as progress:
        tasks = {}

        def show(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = progress.add_task(what, total=total, completed=done)
            progress.update(tasks[what], completed=done, total=total)

        yield show


def _plain() -> Show:
    last = time.monotonic()
    begun: dict[str, tuple[float, int]] = {}

    def show(what: str, done: int, total: int) -> None:
        nonlocal last
        now = time.monotonic()
        start, before = begun.setdefault(what, (now, done))
        if now - last >= _PLAIN_SECONDS and done > before:
            last = now
            left = (now - start) / (done - before) * (total - done)
            print(f"{what}: {done:,} of {total:,}, {left:.0f} s left", file=sys.stderr, flush=True)

    return show


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
