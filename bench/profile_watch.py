"""Puts a watcher around everything that a profile tells apart, for the time of a `with` block, and nothing is left behind.

Ranges of the engine say phases and blocks. Ops are functions of `kernels`: wherever a module has imported one, the watched one
stands in. Kernels are the native library's functions, attributes of one object.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from importlib import import_module
from types import ModuleType
from typing import Any, Protocol
from unittest.mock import patch

import torch.distributed as dist

from bench.counters import native_functions
from bench.profile_ops import COLLECTIVES, OPS, Op
from engine.ranges import watched_by

Function = Callable[..., Any]
_LOOKED_THROUGH = ("engine.", "kernels.")


class Watcher(Protocol):
    """What is told of a step as it goes."""

    def range(self, name: str) -> AbstractContextManager[object]:
        """A range of `engine.ranges`."""

    def op(self, op: Op, function: Function) -> Function:
        """The function, watched."""

    def kernel(self, name: str, function: Function) -> Function:
        """The same of a native kernel."""

    def collective(self, name: str, function: Function) -> Function:
        """The same of what ranks do together."""


@contextmanager
def watching(watcher: Watcher) -> Iterator[None]:
    """What runs within the block is told to the watcher."""
    with ExitStack() as stack:
        for op in OPS:
            for place, name, function in list(_sites(op)):
                stack.enter_context(_replaced(place, name, watcher.op(op, function)))
        library, functions = native_functions()
        for name, function in functions.items():
            stack.enter_context(patch.object(library, name, watcher.kernel(name.removeprefix("stopgo_"), function)))
        for owner in (dist, sys.modules.get("deepspeed.comm")):  # whose functions hold torch's, bound at its start
            for name in COLLECTIVES:
                if hasattr(owner, name):
                    stack.enter_context(patch.object(owner, name, watcher.collective(name, getattr(owner, name))))
        stack.enter_context(watched_by(watcher.range))
        yield


def _sites(op: Op) -> Iterator[tuple[Any, str, Function]]:
    """(module, class or table; name; function) of everywhere that the op is called from."""
    owner = _owner(op.owner)
    if op.key is not None:
        table = getattr(owner, op.attribute)
        if op.key in table:
            yield table, op.key, table[op.key]
        return
    function = getattr(owner, op.attribute)
    if not isinstance(owner, ModuleType):
        yield owner, op.attribute, function
        return
    for name, module in list(sys.modules.items()):
        if name.startswith(_LOOKED_THROUGH) and isinstance(module, ModuleType):
            for attribute, value in list(vars(module).items()):
                if value is function:
                    yield module, attribute, function


def _owner(path: str) -> Any:
    """A module, or a class of one."""
    module, _, name = path.rpartition(".")
    return getattr(import_module(module), name) if name.lstrip("_")[:1].isupper() else import_module(path)


def _replaced(place: Any, name: str, function: Function) -> AbstractContextManager[object]:
    if isinstance(place, dict):
        return patch.dict(place, {name: function})
    return patch.object(place, name, staticmethod(function) if isinstance(place, type) else function)
