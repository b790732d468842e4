"""The engine's ranges: which there are, in which order, and that they are nothing while nobody looks on."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from engine.assembly import assemble
from engine.cursor import Cursor
from engine.loop import Listener, Loop
from engine.ranges import NOTHING, span, watched_by
from pipelines.errors import BadInput
from tests.engine.small_run import configure


def test_nobody_looks_on() -> None:
    """One object for all, which does nothing; also after somebody has looked on, and failed."""
    assert span("forward") is span("text 3") is NOTHING
    with pytest.raises(ValueError, match="stop"), watched_by(lambda name: NOTHING):
        raise ValueError("stop")
    assert span("forward") is NOTHING


def test_ranges_of_a_run(tmp_path: Path) -> None:
    """Iteration, task, phases, blocks, one in the other, through the ordinary loop."""
    seen: list[str] = []
    inside: list[str] = []

    @contextmanager
    def watch(name: str) -> Iterator[None]:
        inside.append(name)
        seen.append(" / ".join(inside))
        yield
        inside.pop()

    config = configure(
        tmp_path, "tasks=[answers]", "max_iterations=1", "validation.on_last=false", "validation.max_examples=1"
    )
    with watched_by(watch):
        Loop(assemble(config), Cursor(), tmp_path / "checkpoints", Listener()).run()
    step = [one.removeprefix("iteration 1 / answers / ") for one in seen if one.startswith("iteration 1 / answers / ")]
    assert [one for one in step if " / " not in one] == ["data", "copy", "forward", "loss", "loss", "backward", "step"]
    forward = [
        "text embedding",
        "text 0",
        "text 1",
        "image embedding",
        "connection 0",
        "image 0",
        "text 2",
        "answer_head",
    ]
    assert [one for one in step if one.startswith("forward / ")][:8] == [f"forward / {block}" for block in forward]
    assert "forward / answer_head / poolers" in step
    backward = [one.removeprefix("backward / ") for one in step if one.startswith("backward / ")]
    assert backward[0] == "answer_head"
    assert {"text 0", "text 2", "image 0", "connection 0", "text embedding"} <= set(backward)


def test_nvtx_needs_a_gpu(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"logging\.nvtx: ranges are for NVIDIA's profilers, and this run is on cpu"):
        assemble(configure(tmp_path, "logging.nvtx=true", "device=cpu"))
