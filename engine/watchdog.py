"""Ends a process whose run no longer moves, and says who is missing.

A rank that is lost leaves the others in a collective that never ends (or ends after the process group's timeout, with a
message about sockets). Every rank leaves a sign of life in the shared store; a thread of each compares them.
"""

from __future__ import annotations

import json
import os
import queue
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
ALL_ALIVE = "all ranks show signs of life: "

Signs = dict[int, str | None]
"""By rank its last sign of life; None: it has never given one."""


class Watchdog:
    """A thread beside the loop. `moved(where)` says that it goes on; `limit_s` without that ends the process.

    The store is spoken to by another thread, which may be held for ever: a machine that was cut off does not even refuse.
    """

    def __init__(self, ranks: Ranks, limit_s: float) -> None:
        self._ranks, self._limit = ranks, limit_s
        self._where, self._at, self._starting = "start", time.monotonic(), True
        self._done = threading.Event()
        self._threads = [
            threading.Thread(target=target, name=name, daemon=True)
            for target, name in ((self._watch, "watchdog"), (self._exchange_signs, "signs of life"))
        ]
        self._asking, self._asked, self._answers = (
            threading.Lock(),
            threading.Event(),
            queue.SimpleQueue[Signs | None](),
        )
        self._store = None
        if ranks.store is not None:
            self._store = ranks.store.clone()  # type: ignore[attr-defined]
            self._store.set_timeout(timedelta(seconds=SILENT_S))

    def moved(self, where: str, starting: bool = False) -> None:
        """The run goes on; `where` it is, for the message. `starting`: reading and imports take their time, and as long as all
        ranks show signs of life nobody is given up for them."""
        self._where, self._at, self._starting = where, time.monotonic(), starting

    def lost(self) -> str:
        """Who gives no sign of life, in words. Takes `SILENT_S` seconds, and at most three times as long."""
        with self._asking:
            before = self._signs()
            if before is not None:
                self._done.wait(SILENT_S)
            after = self._signs() if before is not None else None
        if before is None or after is None:
            return "rank 0, or its machine, does not answer"
        silent = [rank for rank, sign in after.items() if sign is None or before.get(rank) == sign]
        others = [
            f"rank {rank} is in {json.loads(sign)[1]}" for rank, sign in after.items() if sign and rank not in silent
        ]
        if not silent:
            return ALL_ALIVE + "; ".join(others)
        return "no sign of life from rank " + ", ".join(map(str, silent))

    def __enter__(self) -> Self:
        if self._ranks.world_size > 1:
            for thread in self._threads:
                thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._done.set()
        for thread in self._threads:
            if thread.is_alive():
                thread.join(SILENT_S)

    def _watch(self) -> None:
        while not self._done.wait(BEAT_S):
            idle = time.monotonic() - self._at
            if idle <= self._limit:
                continue
            at, lost = self._at, self.lost()
            if self._done.is_set() or self._at != at:  # it moved while others were asked
                continue
            if self._starting and lost.startswith(ALL_ALIVE):
                self._at = time.monotonic()
            else:
                self._give_up(idle, lost)

    def _give_up(self, idle: float, lost: str) -> None:
        where, rank = self._where, self._ranks.rank
        try:
            print(
                f"error: rank {rank}: no step for {idle:.0f} s in {where}: {lost}; giving up "
                "(ranks.timeout_s); continue from the last checkpoint with --resume",
                file=sys.stderr, flush=True,
            )  # fmt: skip
        finally:  # also where nobody listens any more
            os._exit(EXIT_LOST)  # the main thread waits in a collective that cannot be interrupted

    def _exchange_signs(self) -> None:
        """Leave one every second; read those of all when asked to."""
        beats = 0
        while not self._done.is_set():
            try:
                beats += 1
                if self._store is not None:
                    self._store.set(f"alive/{self._ranks.rank}", json.dumps([beats, self._where]))
                found = self._read() if self._asked.is_set() else None
            except (RuntimeError, ValueError):  # rank 0's machine is gone: whoever asks will say so
                found = None
            if self._asked.is_set():
                self._asked.clear()
                self._answers.put(found)
            self._done.wait(BEAT_S)

    def _signs(self) -> Signs | None:
        """By rank the last sign of life; None where the store does not answer."""
        self._asked.set()
        try:
            return self._answers.get(timeout=SILENT_S)
        except queue.Empty:
            return None

    def _read(self) -> Signs:
        assert self._store is not None
        keys = {rank: f"alive/{rank}" for rank in range(self._ranks.world_size)}
        return {rank: self._store.get(key).decode() if self._store.check([key]) else None for rank, key in keys.items()}
