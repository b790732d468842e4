"""Named ranges of a run, for whoever looks on: NVIDIA's profilers (`logging.nvtx`), traces, `python -m bench.profile`.

    iteration 12 / vqa / data | copy | forward / text 3 | loss | backward / text 3 | step

Nobody looks on unless told to. Then `span` hands out one object that does nothing: a look at a variable, and a `with` block,
about a hundred times a step. A step that CUDA graphs replay shows `graph` in place of what was recorded.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

Watcher = Callable[[str], AbstractContextManager[object]]
"""Gives the context manager of a range by its name. It may be entered by a thread of autograd's."""

NOTHING: AbstractContextManager[None] = nullcontext()
_watcher: Watcher | None = None


def span(name: str) -> AbstractContextManager[object]:
    """A `with` block that is a range of this name."""
    return NOTHING if _watcher is None else _watcher(name)


@contextmanager
def watched_by(watcher: Watcher) -> Iterator[None]:
    """Within the block ranges go to `watcher`, and to it alone."""
    global _watcher
    before, _watcher = _watcher, watcher
    try:
        yield
    finally:
        _watcher = before


def nvtx() -> Watcher:
    """Ranges for `nsys profile -t nvtx,cuda` and Nsight Compute. Never run on a GPU yet."""
    import torch

    return torch.cuda.nvtx.range
