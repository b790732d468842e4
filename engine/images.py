"""Images that a model can be asked about: from a task's feature stores, or picture files by way of a detector."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from engine.trained import Trained
from pipelines.errors import BadInput
from pipelines.extract.detectors import Detector
from pipelines.extract.run import Options, extract
from pipelines.files import write_atomic
from pipelines.identity import image_key
from pipelines.store.reader import FeatureStore


@dataclass(frozen=True)
class Pictures:
    """Images with their regions, all of one store."""

    store: FeatureStore
    keys: tuple[str, ...]
    candidates: FeatureStore | None = None
    """Annotated boxes, where the task chooses among these."""


def stored(trained: Trained, task: str, names: Sequence[str]) -> Pictures:
    """Images of the task's feature stores, by key or by any published name of it. Raises BadInput for one without features."""
    row = trained.row(task)
    trained.check_data()
    entry = trained.sheet.entry(task)
    keys = tuple(image_key(name) for name in names)
    stores = [trained.sheet.store(path) for path in dict.fromkeys(entry.stores().values())]
    best = max(stores, key=lambda store: sum(key in store for key in keys))
    for name, key in zip(names, keys, strict=True):
        if key not in best:
            what = f"neither a picture file nor an image of {best.path}"
            raise BadInput(f"--image {name}", what, f"such as {', '.join(best.keys()[:3])}; or a path to a picture")
    if row.loss != "choices" or entry.candidates is None:
        return Pictures(best, keys)
    return Pictures(best, keys, trained.sheet.store(entry.candidates))


def from_files(
    trained: Trained, task: str, files: Sequence[Path], detector: Detector, folder: Path, boxes: Path | None = None
) -> Pictures:
    """Picture files through a detector, by way of a store in `folder` as `stopgo extract` would make it.

    `boxes`: for tasks that choose among given boxes, JSON {image name: [[x1, y1, x2, y2], …]} in pixels. Raises BadInput.
    """
    row, width = trained.row(task), trained.config.model.v_feature_size
    if detector.feature_dim != width:
        what = f"describes regions by {detector.feature_dim} values, the model reads {width}"
        raise BadInput("--detector", what, "take the detector that the model was trained with, and its weights")
    if (row.loss == "choices") != (boxes is not None):
        wanted = "chooses among given boxes" if row.loss == "choices" else "finds its regions itself"
        raise BadInput("--boxes", f"{task} {wanted}", "name a JSON file" if row.loss == "choices" else "leave it out")
    for file in files:
        if not file.is_file():
            raise BadInput(f"--image {file}", "no such file", "check the path")
    listed = folder / "pictures.txt"
    write_atomic(listed, "".join(f"{file.absolute()}\n" for file in dict.fromkeys(files)).encode())
    keys = tuple(image_key(file.name) for file in files)
    store = _extracted(listed, folder / "regions", detector, None)
    return Pictures(store, keys, None if boxes is None else _extracted(listed, folder / "boxes", detector, boxes))


def _extracted(listed: Path, target: Path, detector: Detector, boxes: Path | None) -> FeatureStore:
    extract(listed, target, detector, "asked", Options(boxes=boxes, batch=1, decoder="pil"))
    return FeatureStore(target)
