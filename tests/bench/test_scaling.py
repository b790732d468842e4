"""Points along an axis have what they say; the picture has a panel for each; a real run of all axes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from bench import scaling, scaling_plot
from engine.tasks import load_table


@pytest.mark.parametrize("axis", scaling.AXES)
def test_a_point_is_what_its_axis_says(axis: str) -> None:
    row, run = load_table().row("vqa"), scaling._run("tiny")
    for value, point in scaling.points(run, axis, 3).items():
        samples = point.samples(row, 0)
        found = {
            "batch": {len(samples.answers)},
            "texts": {len(text) + 1 for text in samples.texts},  # and the task's token
            "regions": {len(boxes) for boxes in samples.boxes},
        }
        assert found[axis] == {value}
        assert len(samples.answers) == (value if axis == "batch" else 3)


def test_the_picture(tmp_path: Path) -> None:
    rows = [{"at": n, "seconds": n, "memory": 1e6 * n, "predicted": 1.1 * n, "predicted_memory": 1e6} for n in (1, 2)]
    task = {"task": "vqa", "seconds": 1.0, "stopped": 0.25, "examples": 3, "validation": 2.0, "between_validations": 9}
    axes = {"batch": rows, "threads": rows, "ranks": [{"at": 1, "seconds": 1.0}], "tasks": [task]}
    about = {"model": "tiny", "task": "vqa", "batch": 4, "precision": "bfloat16"}
    scaling_plot.draw({"axes": axes, "conditions": about}, tmp_path / "new/scaling.png")
    with Image.open(tmp_path / "new/scaling.png") as image:
        assert image.width > image.height > 300


def test_bad_input_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert scaling.main(["--axes", "batch,colours"]) == 2
    assert capsys.readouterr().err.startswith("error: --axes colours")


@pytest.mark.slow
def test_all_axes(tmp_path: Path) -> None:
    out = tmp_path / "scaling.json"
    assert scaling.main(["--model", "tiny", "--json", str(out), "--plot", str(tmp_path / "scaling.png")]) == 0
    found = json.loads(out.read_text())
    assert set(found["axes"]) == {*scaling.AXES, *scaling.OTHERS}
    assert all(row["seconds"] > 0 for rows in found["axes"].values() for row in rows)
    texts = found["axes"]["texts"]
    assert texts[-1]["memory"] > texts[0]["memory"] and texts[-1]["predicted"] > texts[0]["predicted"]
