"""A provider in a process of its own. It runs when it is asked to, and only then: the rest of the time it waits at its pipe,
so that the others have the machine to themselves."""

from __future__ import annotations

import multiprocessing
import signal
import traceback
from importlib import import_module
from multiprocessing.connection import Connection
from types import TracebackType
from typing import Any, Self

import torch

from bench.provider import Setting

PROVIDERS = {
    "ours": "bench.ours:Ours",
    "authors": "bench.peers.authors:build",
    "stock": "bench.peers.stock:build",
    "stock_graphs": "bench.peers.stock_graphs:build",
}
"""Name -> module:function of (setting) -> provider."""


class WorkerFailed(RuntimeError):
    """A provider ended or raised; the text says which, at what, and how."""


class Worker:
    """The parent's end. Use as a context manager: the process ends with it."""

    def __init__(self, name: str, setting: Setting) -> None:
        self.name = name
        context = multiprocessing.get_context("spawn")  # a fork would share torch's thread pool and the parent's memory
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, name, setting), name=f"bench {name}", daemon=True)
        self._process.start()
        theirs.close()

    def ask(self, what: str, *arguments: Any) -> Any:
        """The provider's method `what`, run to its end. WorkerFailed where it raised or the process died."""
        try:
            self._pipe.send((what, arguments))
            answered, answer = self._pipe.recv()
        except (EOFError, OSError):
            self._process.join()
            raise WorkerFailed(f"{self.name}: ended at `{what}` ({_death(self._process.exitcode)})") from None
        if not answered:
            raise WorkerFailed(f"{self.name}: `{what}` failed\n{answer}")
        return answer

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pipe.close()
        self._process.join(timeout=5)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()


def _death(code: int | None) -> str:
    if code == -signal.SIGKILL:
        return "killed: out of memory? take a smaller batch, or fewer providers at a time"
    return f"exit code {code}"


def _serve(pipe: Connection, name: str, setting: Setting) -> None:
    """The child: build at the first call, then answer until the pipe closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's; it closes the pipe
    if setting.run.threads is not None:
        torch.set_num_threads(setting.run.threads)
    module, _, make = PROVIDERS[name].partition(":")
    provider: Any = None
    while True:
        try:
            what, arguments = pipe.recv()
        except EOFError:
            return
        try:
            if provider is None:
                provider = getattr(import_module(module), make)(setting)
            answer = (True, getattr(provider, what)(*arguments))
        except Exception:  # noqa: BLE001 - whatever it is, the parent reports it
            answer = (False, traceback.format_exc())
        pipe.send(answer)
