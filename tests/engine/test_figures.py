"""Figures come from the journal files alone, show what they say, and refuse folders that are no run."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from PIL import Image

from engine.figures import PALETTE, curves, dsg_timeline, read_history, scores
from engine.journal import EVENTS_FILE, Journal
from engine.stopgo import ReferenceController
from engine.tasks import load_table
from pipelines.errors import BadInput

ROWS = load_table().default_tasks()


def made_up_run(folder: Path, iterations: int = 240, results: bool = True) -> Path:
    """Twelve tasks that saturate at different speeds under a real controller."""
    with Journal(folder) as journal:
        tasks = [{"name": row.name, "title": row.title, "group": row.group} for row in ROWS]
        journal.event("start", 0, name="made-up", tasks=tasks)
        for place, row in enumerate(ROWS):
            controller, speed, best, score = ReferenceController(), 0.01 * (1 + place), 0.0, 0.0
            for iteration in range(1, iterations + 1):
                progress = 1 - math.exp(-speed * iteration)
                if iteration % 5 == 0:
                    journal.metrics(iteration, task=row.name, loss=3 - 2.5 * progress + 0.1 * math.sin(iteration))
                if iteration % (6 + place) == 0:
                    score = 0.2 + 0.6 * progress + 0.01 * math.sin(place + iteration / 3)
                    best, before = max(best, score), controller.decision
                    journal.event("validation", iteration, task=row.name, score=score, best=best)
                    if controller.update(score) is not before:
                        journal.event("decision", iteration, task=row.name, state=str(controller.decision))
            if results:
                blind = None if row.name == "gqa" else 0.4
                journal.event("result", iterations, task=row.name, score=score, best=best, majority=0.25, blind=blind)
    return folder


def pixels(path: Path, colour: str) -> int:
    """How many pixels of exactly this colour the picture has."""
    wanted = tuple(bytes.fromhex(colour[1:]))
    with Image.open(path) as image:
        return sum(count for count, found in image.convert("RGB").getcolors(1 << 24) or [] if found == wanted)


def test_the_three_pictures(tmp_path: Path) -> None:
    folder = made_up_run(tmp_path)
    for draw, name in ((dsg_timeline, "dsg.png"), (curves, "curves.png"), (scores, "scores.png")):
        path = draw(folder)
        assert path == folder / name
        with Image.open(path) as image:
            assert image.width > 900
            assert image.height > 500
    assert not [path for path in folder.iterdir() if path.name.startswith(".")]


def test_the_timeline_is_thick_where_tasks_go(tmp_path: Path) -> None:
    (tmp_path / "all").mkdir()
    (tmp_path / "half").mkdir()
    for name in ("all", "half"):
        with Journal(tmp_path / name) as journal:
            journal.event("start", 0, name=name, tasks=[{"name": "a", "title": "A", "group": "G1"}])
            journal.event("validation", 50, task="a", score=0.5)
            if name == "half":
                journal.event("decision", 50, task="a", state="stop")
            journal.event("end", 100, reason="done")
    full, half = (pixels(dsg_timeline(tmp_path / name), PALETTE[0]) for name in ("all", "half"))
    assert 0.5 < half / full < 0.65  # half the band, and a thin line


def test_bands_follow_the_decisions(tmp_path: Path) -> None:
    with Journal(tmp_path) as journal:
        journal.event("start", 0, name="x", tasks=[{"name": "a", "title": "A", "group": "G1"}])
        for iteration, state in ((20, "stop"), (50, "go"), (90, "stop")):
            journal.event("decision", iteration, task="a", state=state)
        journal.metrics(100, task="a", loss=math.nan)
    run = read_history(tmp_path)
    assert run.tasks[0].bands(run.last) == [(0, 20, "go"), (20, 50, "stop"), (50, 90, "go"), (90, 100, "stop")]
    assert run.tasks[0].losses == []


def test_a_run_that_has_just_begun_can_be_drawn(tmp_path: Path) -> None:
    with Journal(tmp_path) as journal:
        journal.event("start", 0, name="x", tasks=[{"name": "a", "title": "A", "group": "G1"}])
    assert dsg_timeline(tmp_path).is_file()
    assert curves(tmp_path).is_file()
    with pytest.raises(BadInput, match="no results yet"):
        scores(tmp_path)


def test_a_folder_that_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="no such file"):
        dsg_timeline(tmp_path)
    Journal(tmp_path).close()
    with pytest.raises(BadInput, match=f"{EVENTS_FILE}: no start event"):
        curves(tmp_path)
