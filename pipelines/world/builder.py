"""Build a world: all its files, in a folder that appears complete or not at all."""

from __future__ import annotations

import fcntl
import hashlib
import json
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Any

import yaml

from pipelines.errors import BadInput
from pipelines.overlap import survey
from pipelines.removal import list_path, removal_list, save_list
from pipelines.runs import read_run
from pipelines.sheet import load_sheet
from pipelines.world.captions import write_coco, write_conceptual_captions, write_flickr
from pipelines.world.expressions import write_refer, write_visual7w
from pipelines.world.files import write_json, write_text
from pipelines.world.games import write_guesswhat
from pipelines.world.pictures import Progress, write_pictures
from pipelines.world.plan import Plan, draw_plan, overlap
from pipelines.world.question_files import write_gqa, write_visual_genome_qa, write_vqa
from pipelines.world.statements import write_nlvr2, write_snli_ve
from pipelines.world.vocabulary import write_vocabulary

FORMAT = 1


def ensure(path: Path | str, seed: int = 0, size: str = "default", progress: Progress | None = None) -> Path:
    """The sheet of the world at `path`, built first where it is not there, or is of another seed, size or recipe.

    Processes that call this at the same time wait for one of them to build. Raises BadInput where `path` is something
    else than a world, or the size is unknown.
    """
    path = Path(path)
    with _alone(path):
        if _found(path) != _identity(seed, size):
            _build(path, seed, size, progress or _silent)
    return path / "sheet.yaml"


def build(path: Path | str, seed: int = 0, size: str = "default", progress: Progress | None = None) -> Path:
    """Build the world anew, in place of an older one; its sheet. Raises as `ensure`."""
    path = Path(path)
    with _alone(path):
        _build(path, seed, size, progress or _silent)
    return path / "sheet.yaml"


def _silent(what: str, done: int, total: int) -> None:
    """No progress is shown."""


def _identity(seed: int, size: str) -> dict[str, Any]:
    """What makes two worlds the same. The recipe is the code itself: a changed one builds another world."""
    folder = Path(__file__).parent
    recipe = hashlib.sha256()
    others = (folder.parent / f"{name}.py" for name in ("extractor", "overlap", "removal"))
    for source in [*sorted(folder.glob("*.py")), *others]:
        recipe.update(source.read_bytes())
    return {"format": FORMAT, "seed": seed, "size": size, "recipe": recipe.hexdigest()[:16]}


def _found(path: Path) -> dict[str, Any] | None:
    """The identity of the world at `path`; None where nothing is. Raises BadInput for anything else."""
    if not path.exists() or (path.is_dir() and not any(path.iterdir())):
        return None
    try:
        content = json.loads((path / "world.json").read_text(encoding="utf-8"))
        return {key: content[key] for key in ("format", "seed", "size", "recipe")}
    except (OSError, ValueError, KeyError, TypeError):
        raise BadInput(path, "is there and is no embedded world", "name another folder") from None


@contextmanager
def _alone(path: Path) -> Iterator[None]:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.with_name(path.name + ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _build(path: Path, seed: int, size: str, progress: Progress) -> None:
    plan = draw_plan(seed, size)
    _found(path)  # refuses to replace what is no world
    for left_behind in path.parent.glob(f"{path.name}.partial-*"):  # by a build that was killed; the lock is ours
        shutil.rmtree(left_behind)
    partial = Path(tempfile.mkdtemp(prefix=f"{path.name}.partial-", dir=path.parent))
    try:
        write_annotations(plan, partial, progress)
        write_pictures(plan, partial, progress)
        write_text(partial / "sheet.yaml", yaml.safe_dump(sheet(), sort_keys=False, width=120))
        write_removal_list(partial / "sheet.yaml", progress)
        write_json(partial / "world.json", {
            **_identity(seed, size), "pictures": len(plan.scenes),
            "images": {source: len(images) for source, images in plan.sources.items()},
            "test_images_in_train_or_val_percent": overlap(plan),
        })  # fmt: skip
        partial.chmod(0o755)
        if path.exists():
            shutil.rmtree(path)
        partial.rename(path)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def write_annotations(plan: Plan, folder: Path, progress: Progress) -> None:
    """All annotation files, and the vocabulary of all their texts."""
    steps = [
        lambda: write_vqa(plan, folder / "vqa"),
        lambda: write_visual_genome_qa(plan, folder / "visual_genome"),
        lambda: write_gqa(plan, folder / "gqa"),
        lambda: write_coco(plan, folder / "coco_retrieval"),
        lambda: write_flickr(plan, folder / "flickr30k", folder / "flickr30k_entities"),
        lambda: write_refer(plan, "refcoco", folder / "refcoco"),
        lambda: write_refer(plan, "refcoco_plus", folder / "refcoco+"),
        lambda: write_refer(plan, "refcocog", folder / "refcocog"),
        lambda: write_visual7w(plan, folder / "visual7w"),
        lambda: write_guesswhat(plan, folder / "guesswhat"),
        lambda: write_nlvr2(plan, folder / "nlvr2"),
        lambda: write_snli_ve(plan, folder / "snli_ve"),
        lambda: write_conceptual_captions(plan, folder / "conceptual_captions"),
        lambda: write_vocabulary(folder, sheet()),
    ]
    for done, step in enumerate(steps, start=1):
        step()
        progress("annotations", done, len(steps))


def write_removal_list(sheet: Path, progress: Progress) -> None:
    """What `python -m pipelines.clean` would write: a world is clean from the start."""
    run, loaded = read_run(sheet), load_sheet(sheet)
    splits = count(start=1)
    total = sum(len(entry.splits()) for entry in loaded.sets.values())
    found = survey(loaded, run.readers, loaded.sets, lambda *_: progress("removal list", next(splits), total))
    save_list(removal_list(found, loaded, run.readers), list_path(loaded))


def sheet() -> dict[str, Any]:
    """The data sheet (see `pipelines.sheet`): for every data set its stores, and its reader's arguments by split."""

    def by_split(train: str, val: str, test: str, arguments: Callable[[str], dict[str, Any]]) -> dict[str, Any]:
        return {"train": arguments(train), "val": arguments(val), "test": arguments(test)}

    def refer(folder: str, who: str) -> dict[str, Any]:
        files = {"refs": f"{folder}/refs({who}).json", "instances": f"{folder}/instances.json"}
        return by_split("train", "val", "test", lambda split: {**files, "split": split})

    def retrieval(folder: str, test: str) -> dict[str, Any]:
        return by_split("train", "val", test, lambda s: {"captions": [f"{folder}/all_data_final_{s}_2014.jsonline"]})

    vqa = by_split("train2014", "val2014", "test2015", lambda split: {
        "questions": [f"vqa/v2_OpenEnded_mscoco_{split}_questions.json"],
        "annotations": [f"vqa/v2_mscoco_{split}_annotations.json"],
    })  # fmt: skip
    genome = by_split("train", "val", "test", lambda s: {"questions": [f"visual_genome/question_answers_{s}.json"]})
    gqa = by_split("train", "val", "testdev", lambda split: {"questions": [f"gqa/{split}_balanced_questions.json"]})
    pointing = by_split("train", "val", "test", lambda split: {
        "questions": "visual7w/dataset_v7w_pointing.json", "split": split,
    })  # fmt: skip
    games = by_split("train", "valid", "test", lambda split: {"games": [f"guesswhat/guesswhat.{split}.jsonl"]})
    nlvr2 = by_split("train", "dev", "test1", lambda split: {"statements": [f"nlvr2/{split}.json"]})
    snli_ve = by_split("train", "dev", "test", lambda split: {"pairs": [f"snli_ve/snli_ve_{split}.jsonl"]})
    grounding = by_split("train", "val", "test", lambda split: {
        "sentences": "flickr30k_entities/Sentences", "annotations": "flickr30k_entities/Annotations",
        "images": f"flickr30k_entities/{split}.txt",
    })  # fmt: skip
    coco, vg, flickr, nlvr2_photos = (
        {"source": source, "features": f"features/{store}.lmdb"}
        for source, store in (("coco", "coco"), ("visual_genome", "vg"), ("flickr30k", "flickr"), ("nlvr2", "nlvr2"))
    )
    shared_answers = {"answers": "vqa/trainval_label2ans.json"}
    return {
        "format": 1,
        "vocabulary": "vocab.txt",
        "links": "visual_genome/image_data.json",
        "removed": "removed.json",
        "sets": {
            "vqa": {**coco, **shared_answers, **vqa},
            "visual_genome_qa": {**vg, **shared_answers, **genome},
            "gqa": {**vg, "answers": "gqa/trainval_label2ans.json", **gqa},
            "coco_retrieval": {**coco, **retrieval("coco_retrieval", "test_set0")},
            "flickr30k_retrieval": {**flickr, **retrieval("flickr30k", "test")},
            "refcoco": {**coco, **refer("refcoco", "unc")},
            "refcoco_plus": {**coco, **refer("refcoco+", "unc")},
            "refcocog": {**coco, **refer("refcocog", "umd")},
            "visual7w": {**vg, "candidates": "features/visual7w_boxes.lmdb", **pointing},
            "guesswhat_pointing": {**coco, "candidates": "features/guesswhat_boxes.lmdb", **games},
            "nlvr2": {**nlvr2_photos, **nlvr2},
            "snli_ve": {**flickr, **snli_ve},
            "flickr30k_grounding": {**flickr, **grounding},
            "conceptual_captions": {
                "source": "conceptual_captions",
                "features": {split: f"features/cc_{split}.lmdb" for split in ("train", "val")},
                "train": {"captions": "conceptual_captions/Train_GCC-training.tsv"},
                "val": {"captions": "conceptual_captions/Validation_GCC-1.1.0-Validation.tsv"},
            },
        },
    }
