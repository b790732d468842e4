"""How many hooks fire on tensors and modules, and how long they take: everything that is registered while this is entered."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from types import TracebackType
from typing import Any, NamedTuple, Self

from torch import Tensor, nn

_REGISTERING = (
    (Tensor, "register_post_accumulate_grad_hook"),
    (Tensor, "register_hook"),
    (nn.Module, "register_forward_pre_hook"),
    (nn.Module, "register_forward_hook"),
    (nn.Module, "register_full_backward_pre_hook"),
    (nn.Module, "register_full_backward_hook"),
)


class Clocks(NamedTuple):
    """Seconds on two clocks."""

    thread: float
    """Of this thread on a core: what the host does itself, whoever else uses the machine."""
    wall: float

    @classmethod
    def now(cls) -> Self:
        """Both, of an instant."""
        return cls(time.thread_time(), time.perf_counter())

    def plus(self, other: Clocks) -> Clocks:
        """Their sums."""
        return Clocks(self.thread + other.thread, self.wall + other.wall)

    def minus(self, other: Clocks) -> Clocks:
        """Their differences."""
        return Clocks(self.thread - other.thread, self.wall - other.wall)


class HookWatch:
    """Replaces the methods that register hooks, by some that count the hooks' calls and their seconds."""

    def __init__(self) -> None:
        self.fired: Counter[str] = Counter()
        """By the method that registered it."""
        self.seconds = Clocks(0.0, 0.0)
        """Within hooks; a hook within a hook once."""
        self.tensors: set[int] = set()
        """Tensors with a hook on their gradient, by identity: parameters, which stay."""
        self._depth = 0
        self._before: list[tuple[type, str, Any]] = []

    def reset(self) -> None:
        """Count anew, of the hooks that are there."""
        self.fired.clear()
        self.seconds = Clocks(0.0, 0.0)

    def __enter__(self) -> Self:
        for owner, name in _REGISTERING:
            method = getattr(owner, name)
            self._before.append((owner, name, method))
            setattr(owner, name, self._registering(name, method))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for owner, name, method in self._before:
            setattr(owner, name, method)
        self._before.clear()

    def _registering(self, name: str, method: Any) -> Any:
        def register(owner: Any, hook: Callable[..., Any], *args: Any, **keywords: Any) -> Any:
            if name == "register_post_accumulate_grad_hook":
                self.tensors.add(id(owner))
            return method(owner, self._watched(name, hook), *args, **keywords)

        return register

    def _watched(self, name: str, hook: Callable[..., Any]) -> Callable[..., Any]:
        def called(*args: Any, **keywords: Any) -> Any:
            self.fired[name] += 1
            self._depth += 1
            began = Clocks.now()
            try:
                return hook(*args, **keywords)
            finally:
                self._depth -= 1
                if not self._depth:
                    self.seconds = self.seconds.plus(Clocks.now().minus(began))

        return called
