"""Ends a process whose run no longer moves, and says who is missing.

A rank that is lost leaves the others in a collective that never ends (or ends after the process group's timeout, with a
message about sockets). Every rank leaves a sign of life in the shared store; a thread of each compares them.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from datetime import timedelta
from types import TracebackType
from typing import Self

from engine.ranks import Ranks

BEAT_S = 1.0
"""Between two signs of life."""
SILENT_S = 5.0
"""Without a new sign of life for so long a rank counts as lost."""
EXIT_LOST = 1


class Watchdog:
    """A thread beside the loop. `moved(where)` says that it goes on; `limit_s` without that ends the process."""

    def __init__(self, ranks: Ranks, limit_s: float) -> None:
        self._ranks, self._limit = ranks, limit_s
        self._where, self._at = "start", time.monotonic()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._store = None
        if ranks.store is not None:
            self._store = ranks.store.clone()  # type: ignore[attr-defined]
            self._store.set_timeout(timedelta(seconds=SILENT_S))

    def moved(self, where: str) -> None:
        """The run goes on; `where` it is, for the message."""
        self._where, self._at = where, time.monotonic()

    def lost(self) -> str:
        """Who gives no sign of life, in words. Takes `SILENT_S` seconds."""
        before = self._signs()
        self._done.wait(SILENT_S)
        after = self._signs()
        if after is None:
            return "the machine of rank 0 does not answer"
        silent = [rank for rank, sign in after.items() if sign is None or (before or {}).get(rank) == sign]
        others = [
            f"rank {rank} is in {json.loads(sign)[1]}" for rank, sign in after.items() if sign and rank not in silent
        ]
        if not silent:
            return "all ranks show signs of life: " + "; ".join(others)
        return "no sign of life from rank " + ", ".join(map(str, silent))

    def __enter__(self) -> Self:
        if self._ranks.world_size > 1:
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._done.set()
        if self._thread.is_alive():
            self._thread.join()

    def _watch(self) -> None:
        beats = 0
        while not self._done.wait(BEAT_S):
            beats += 1
            self._leave_sign(beats)
            idle = time.monotonic() - self._at
            if idle > self._limit:
                where, rank = self._where, self._ranks.rank
                print(
                    f"error: rank {rank}: no step for {idle:.0f} s in {where}: {self.lost()}; giving up "
                    "(ranks.timeout_s); continue from the last checkpoint with --resume",
                    file=sys.stderr, flush=True,
                )  # fmt: skip
                os._exit(EXIT_LOST)  # the main thread waits in a collective that cannot be interrupted

    def _leave_sign(self, beats: int) -> None:
        if self._store is None:
            return
        try:
            self._store.set(f"alive/{self._ranks.rank}", json.dumps([beats, self._where]))
        except (RuntimeError, ValueError):  # rank 0's machine is gone: `_watch` will say so
            return

    def _signs(self) -> dict[int, str | None] | None:
        """By rank the last sign of life; None where the store does not answer."""
        assert self._store is not None
        found: dict[int, str | None] = {}
        try:
            for rank in range(self._ranks.world_size):
                key = f"alive/{rank}"
                found[rank] = self._store.get(key).decode() if self._store.check([key]) else None
        except (RuntimeError, ValueError):
            return None
        return found
