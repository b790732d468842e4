"""Real features with their real captions, questions and phrases, through converter, store, sheet, readers and loop:
can the small model learn by heart what is there?"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import yaml

from engine.assembly import Parts, Task, assemble
from engine.baselines import majority
from engine.config import load
from engine.cursor import Cursor
from engine.evaluation import evaluate
from engine.loop import Listener, Loop
from engine.losses import ACCEPTED_IOU
from engine.trained import Trained, load_trained
from engine.validation import validate
from pipelines.batch import Batch, RegionTarget
from pipelines.loader import validation_batches
from tests.real_data import REGIONS, RETRIEVAL, SENTENCES, TASKS, VQA_ON_BOTTOM_UP, VQA_ON_PHOTOS, Phrases, prepare

LEARNED = 0.95

Prepared = tuple[Path, Phrases]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    folder = tmp_path_factory.mktemp("real_data")
    return folder, prepare(folder)


def learn(folder: Path, checkpoints: str, *overrides: str) -> Parts:
    """What the ordinary loop has trained."""
    parts = assemble(load(folder / "run.yaml", list(overrides)))
    assert Loop(parts, Cursor(), folder / checkpoints, Listener()).run()
    return parts


def trained(folder: Path, checkpoints: str, tasks: Sequence[str] = TASKS) -> Trained:
    """The same from its checkpoint."""
    run = yaml.safe_load((folder / "run.yaml").read_text())
    (folder / f"{checkpoints}.yaml").write_text(yaml.safe_dump({**run, "tasks": list(tasks)}))
    return load_trained(max((folder / checkpoints).iterdir()), folder / f"{checkpoints}.yaml")


def training_split(parts: Parts, task: Task) -> list[Batch]:
    return list(validation_batches(task.train.data, 64, seed=parts.config.seed, task_token=task.token))


def accuracy(parts: Parts, name: str) -> float:
    """Mean score on the whole training split, in evaluation mode."""
    task = parts.tasks[name]
    return validate(parts.model, training_split(parts, task), task.row.head, parts.device).score


def test_what_the_real_photos_feed(prepared: Prepared) -> None:
    folder, phrases = prepared
    assert (phrases.total, phrases.reachable, len(phrases.learnable)) == (684, 326, 271)
    assert phrases.ceiling == pytest.approx(289 / 684)
    parts = assemble(load(folder / "run.yaml"))
    assert {name: len(task.train.data) for name, task in parts.tasks.items()} == {
        RETRIEVAL: 60, SENTENCES: 91, REGIONS: 271, VQA_ON_PHOTOS: 3, VQA_ON_BOTTOM_UP: 5,
    }  # fmt: skip
    for batch in training_split(parts, parts.tasks[REGIONS]):
        assert isinstance(batch.target, RegionTarget)
        scores = batch.target.scores.split(batch.target.cu_regions.diff().tolist())
        assert all(of_one.max() > ACCEPTED_IOU for of_one in scores), "a learnable phrase has a right row"


def test_real_captions_are_learned_by_heart(prepared: Prepared) -> None:
    rate = ["optimizer.base_lr=5e-4", "optimizer.head_lr=5e-4"]  # a task alone takes less than the five together
    parts = learn(prepared[0], "captions", f"tasks=[{RETRIEVAL}]", "max_iterations=90", *rate)
    assert accuracy(parts, RETRIEVAL) >= LEARNED
    scores = evaluate(trained(prepared[0], "captions", [RETRIEVAL]), split="val")[RETRIEVAL]
    assert (
        scores.n == 60 and scores.score is not None and scores.score >= 0.8
    )  # the right one of all photos, not of four


@pytest.mark.slow
def test_all_that_real_photos_feed_is_learned_by_heart(prepared: Prepared) -> None:
    folder, phrases = prepared
    parts = learn(folder, "all")
    print(
        f"\nregion phrases: {phrases.total}; {phrases.reachable} have a region at IoU > 0.5, of these "
        f"{len(phrases.learnable)} are said once of their photo: trained; ceiling on all of them {phrases.ceiling:.3f}"
    )
    scores = {name: accuracy(parts, name) for name in TASKS}
    for name, task in parts.tasks.items():
        constant = majority(task.train.data, training_split(parts, task))
        examples = len(task.train.data)
        print(f"{name}: {examples} examples, training accuracy {scores[name]:.3f}, majority or chance {constant:.3f}")
    assert min(scores.values()) >= LEARNED, scores
    found = evaluate(trained(folder, "all"), split="val")
    print({name: task.metrics for name, task in found.items()})
    for name in TASKS[1:]:
        assert found[name].metrics.get("soft_accuracy", found[name].score) == pytest.approx(scores[name], abs=1e-6)
    assert found[VQA_ON_BOTTOM_UP].score == pytest.approx(scores[VQA_ON_BOTTOM_UP], abs=1e-6)  # nobody was unanimous
