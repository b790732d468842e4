"""An exported folder (`engine.export`) read back: checked against its fingerprints, without the data that it was trained on."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from engine.checkpoint import fingerprint
from pipelines.answers import Answers
from pipelines.errors import BadInput
from pipelines.files import open_json
from pipelines.sheet import Sheet

FORMAT = 1
CONFIG, WEIGHTS, LABELS, RUN, ROWS = "config.json", "model.safetensors", "labels.json", "run.yaml", "task_rows.yaml"


def is_exported(source: Path) -> bool:
    """Whether this folder was made by `stopgo export`."""
    return all((source / name).is_file() for name in (CONFIG, WEIGHTS, RUN))


def verify(folder: Path) -> None:
    """Every file is what config.json says. Raises BadInput naming the file."""
    content = open_json(folder / CONFIG)
    own: Any = content.get("stopgo") if isinstance(content, dict) else None
    if not isinstance(own, dict) or own.get("format") != FORMAT or not isinstance(own.get("files"), dict):
        raise BadInput(folder / CONFIG, f"not of a folder in export format {FORMAT}", "export the model again")
    wanted = {WEIGHTS, LABELS, RUN, ROWS, "vocab.txt"}
    if own["files"].keys() != wanted:
        raise BadInput(folder / CONFIG, f"names other files than {', '.join(sorted(wanted))}", "export the model again")
    for name, expected in own["files"].items():
        if not (folder / name).is_file() or fingerprint(folder / name) != expected:
            raise BadInput(folder / name, "is not what config.json says", "the folder is damaged: copy it again")


def overrides(folder: Path) -> list[str]:
    """What a run configuration that came along is told about where it lies now."""
    return [f"task_rows=[{folder.absolute() / ROWS}]"]


def no_data(folder: Path) -> Sheet:
    """A data sheet without data sets, which has a vocabulary all the same."""
    return Sheet(folder / RUN, folder, folder / "vocab.txt", {})


def answers(folder: Path, heads: Mapping[str, str]) -> dict[str, Answers]:
    """The answer vocabulary of each answer head. `heads`: name -> kind. Raises BadInput."""
    path = folder / LABELS
    labels = open_json(path)
    found = {}
    for name in (name for name, kind in heads.items() if kind == "answers"):
        of_head = labels.get(name) if isinstance(labels, dict) else None
        if not isinstance(of_head, list) or not all(isinstance(label, str) for label in of_head):
            raise BadInput(f"{path}: {name}", "not a list of answers", "the folder is damaged: copy it again")
        found[name] = Answers(of_head, path)
    return found
