"""What a step makes the host wait for, and what it sends: counted where every operation passes by (torch's dispatcher).

**A read** makes the host wait for a value that the device computes: a scalar (`item`, `bool`, `int`, `float`, an index), the
length of a result (`nonzero`, `masked_select`, a mask as an index, `unique`), a comparison (`equal`), a copy (`cpu`,
`tolist`). On a CPU all memory is the host's, so there a tensor counts as the device's unless it was named as one that is on
the host on every machine (a counter of steps, say), and `numpy`, which only works on those, is no read. What branches on
`is_cuda` is seen in the branch of the machine that counts. Threads other than the counting one are not seen.

**Who** reads or sends is the innermost file of this checkout or of DeepSpeed on the stack.
"""

from __future__ import annotations

import sys
import threading
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

ROOT = Path(__file__).resolve().parent.parent
_THEIRS = "/deepspeed/"
_SCALARS = frozenset({"aten::_local_scalar_dense"})
_LENGTHS = frozenset(
    {
        "aten::nonzero", "aten::masked_select", "aten::_unique", "aten::_unique2", "aten::unique_dim",
        "aten::unique_consecutive", "aten::equal", "aten::allclose", "aten::bincount",
    }
)  # fmt: skip
_MASKS = frozenset({"aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_"})
_METHODS = ("cpu", "to", "tolist")
"""Of tensors, which a CPU does without the dispatcher."""


class Seen(NamedTuple):
    """One read or one collective."""

    phase: str
    entry: int
    """Which time of its phase, from 0."""
    kind: str
    """`read` or the collective's name."""
    who: str
    """File and function."""
    bytes: int
    """Of a collective: the larger of what goes in and what comes out, on this rank; else 0."""
    group: str = ""
    """Of a collective: the name that `name_group` gave its group."""

    @property
    def theirs(self) -> bool:
        """Whether DeepSpeed did it."""
        return self.who.startswith("deepspeed")


class HostCounts(TorchDispatchMode):
    """Counts in this thread while entered. `host`: tensors that are on the host whatever the device."""

    def __init__(self, host: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self.seen: list[Seen] = []
        self.entries: Counter[str] = Counter({"": 1})
        self._host = {_place(tensor) for tensor in host}
        self._phases: list[tuple[str, int]] = [("", 0)]
        self._methods: dict[str, Any] = {}
        self._groups: dict[str, str] = {}
        self._thread = 0

    def name_group(self, group: ProcessGroup, name: str) -> None:
        """Tell a process group's collectives from others."""
        self._groups[group.group_name] = name

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """What is seen within it is of this phase; of nested ones the innermost counts."""
        self._phases.append((name, self.entries[name]))
        self.entries[name] += 1
        try:
            yield
        finally:
            self._phases.pop()

    def during(self, owner: object, method: str, name: str) -> None:
        """Make every call of an object's method a phase."""
        inner = getattr(owner, method)

        def called(*args: Any, **keywords: Any) -> Any:
            with self.phase(name):
                return inner(*args, **keywords)

        setattr(owner, method, called)

    def of(self, phase: str) -> list[list[Seen]]:
        """What was seen in each entry of a phase; of "", outside of all phases."""
        found: list[list[Seen]] = [[] for _ in range(self.entries[phase])]
        for seen in self.seen:
            if seen.phase == phase:
                found[seen.entry].append(seen)
        return found

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name
        if name.startswith("c10d::"):
            sizes = [sum(t.nbytes for t in tree_iter(arg) if isinstance(t, Tensor)) for arg in args]
            group = next((ProcessGroup.unbox(arg) for arg in args if isinstance(arg, torch.ScriptObject)), None)
            named = self._groups.get(group.group_name, "") if group is not None else ""
            self._note(name.removeprefix("c10d::").strip("_"), max(sizes, default=0), group=named)
        elif (
            (name in _SCALARS and _place(args[0]) not in self._host)
            or name in _LENGTHS
            or (name in _MASKS and any(t is not None and t.dtype in (torch.bool, torch.uint8) for t in args[1]))
            or (name == "aten::repeat_interleave" and len(args) == 1 and (kwargs or {}).get("output_size") is None)
        ):
            self._note("read", 0)
        return func(*args, **(kwargs or {}))

    def __enter__(self) -> Self:
        self._thread = threading.get_ident()
        for name in _METHODS:
            self._methods[name] = getattr(Tensor, name)
            setattr(Tensor, name, self._watched(name))
        super().__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        super().__exit__(kind, error, trace)
        for name, method in self._methods.items():
            setattr(Tensor, name, method)

    def _watched(self, name: str) -> Any:
        inner = self._methods[name]

        def called(tensor: Tensor, *args: Any, **keywords: Any) -> Any:
            away = name != "to" or _wants_cpu(*args, **keywords)
            mine = threading.get_ident() == self._thread
            if mine and away and _place(tensor) not in self._host and not (name == "to" and _to_device(who := _who())):
                self._note("read", 0, who if name == "to" else "")
            return inner(tensor, *args, **keywords)

        return called

    def _note(self, kind: str, size: int, who: str = "", group: str = "") -> None:
        self.seen.append(Seen(*self._phases[-1], kind, who or _who(), size, group))


def _wants_cpu(*args: Any, **keywords: Any) -> bool:
    asked = keywords.get("device", args[0] if args else None)
    return isinstance(asked, str | torch.device) and torch.device(asked).type == "cpu"


def _to_device(who: str) -> bool:
    """Whose `to` brings something to the device, which may be a CPU: that of a batch, and DeepSpeed's."""
    return who == "pipelines/batch.py:to" or who.startswith("deepspeed")


def _place(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _who() -> str:
    frame = sys._getframe(1)
    while frame is not None:
        file = frame.f_code.co_filename
        if file != __file__:
            if file.startswith(f"{ROOT}/") and "/site-packages/" not in file:
                return f"{Path(file).relative_to(ROOT)}:{frame.f_code.co_name}"
            if _THEIRS in file:
                return f"deepspeed/{file.rpartition(_THEIRS)[2]}:{frame.f_code.co_name}"
        frame = frame.f_back  # type: ignore[assignment]
    return "unknown"
