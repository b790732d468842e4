"""The data sets' official rules: from decisions to marks, metrics and the file that a test server takes.

A rule is a function of (trained model, split, progress) and a row in `RULES`; the task table names it (`TaskRow.rule`). What a
rule needs of the answers it takes from the split's columns, so that a split without answers gives a result file and no score.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engine.evaluation import results
from engine.evaluation.decisions import decide
from engine.evaluation.ranks import best, measures, ranks
from engine.evaluation.results import File
from engine.evaluation.retrieval import pair_scores
from engine.evaluation.scores import Marks
from engine.losses import ACCEPTED_IOU
from engine.tasks import EvaluationKind
from engine.trained import Trained
from pipelines.answers import official_accuracy
from pipelines.datasets import TaskData
from pipelines.errors import BadInput
from pipelines.progress import Show
from pipelines.ragged import lengths_of
from pipelines.readers import vqa
from pipelines.regions import Regions
from pipelines.targets import Choices, Classes, SoftLabels, TrueBoxes

Chosen = NDArray[np.int64]
_EXAMPLES = 1024
"""Whose regions are looked at together."""


@dataclass(frozen=True)
class Outcome:
    """What a rule makes of a split."""

    file: File
    marks: Marks | None = None
    """None where the split publishes no answers."""
    metrics: Mapping[str, float] = field(default_factory=dict)
    by_group: bool = True
    """Whether the examples' groups are something to break the score down by."""


def _answers(trained: Trained, data: TaskData, show: Show) -> Outcome:
    """Visual Genome QA: the soft score of the answer given (spec section 6)."""
    words, marks = _answered(trained, data, show)
    return Outcome(results.lines(results.answer_rows(data, words)), marks, _mean("soft_accuracy", marks))


def _gqa(trained: Trained, data: TaskData, show: Show) -> Outcome:
    """GQA has one right answer; one outside of the vocabulary cannot be given, and is wrong."""
    words, marks = _answered(trained, data, show)
    return Outcome(results.gqa(data, words), marks, _mean("accuracy", marks))


def _vqa(trained: Trained, data: TaskData, show: Show) -> Outcome:
    """VQA's ten-answer accuracy of the answer in words, beside the soft score that training uses. Where the annotations do
    not have what people said (caches and processed forms), the soft score stands alone: it is the same but for answers on
    which all ten agree and that the normalisation changes."""
    words, soft = _answered(trained, data, show)
    file = results.vqa(data, words)
    given = _people(trained, data)
    if soft is None or given is None:
        return Outcome(file, soft, _mean("soft_accuracy", soft))
    missing = next((id for id in data.ids.tolist() if id not in given), None)
    if missing is not None:
        raise BadInput(f"task {data.spec.name}, {data.split}: question {missing}", "the annotations lack its answers")
    pairs = zip(words, data.ids.tolist(), strict=True)
    marks = np.array([official_accuracy(answer, given[id]) for answer, id in pairs])
    return Outcome(file, marks, {**_mean("vqa_accuracy", marks), **_mean("soft_accuracy", soft)})


def _people(trained: Trained, data: TaskData) -> dict[str, tuple[str, ...]] | None:
    """What people answered, where the reader is given official annotations."""
    row = trained.row(data.spec.name)
    arguments, _ = trained.sheet.reader_arguments(row.name, data.split, row.reader)
    files = arguments.get("annotations")
    return vqa.people(files) if files else None


def _answered(trained: Trained, data: TaskData, show: Show) -> tuple[list[str], Marks | None]:
    """The answers in words, and the soft score of each."""
    chosen = decide(trained, data, show)
    vocabulary = trained.answers[trained.row(data.spec.name).head]
    words = [vocabulary.answer(label) for label in chosen.tolist()]
    return words, _soft_marks(chosen, data.target) if isinstance(data.target, SoftLabels) else None


def _soft_marks(chosen: Chosen, target: SoftLabels) -> Marks:
    example = np.repeat(np.arange(len(chosen)), lengths_of(target.offsets))
    hit = target.labels == chosen[example]
    return np.bincount(example[hit], weights=target.scores[hit], minlength=len(chosen)).astype(np.float64)


def _retrieval(trained: Trained, data: TaskData, show: Show) -> Outcome:
    """Each caption against all images of the split (spec section 6)."""
    assert data.pool is not None
    scores = pair_scores(trained, data, show)
    found = ranks(scores, data.pool.position)
    file = results.lines(results.retrieval_rows(data, best(scores), found))
    return Outcome(file, (found < 1).astype(np.float64), measures(found))


def _regions(trained: Trained, data: TaskData, show: Show) -> Outcome:
    """RefCOCO(+/g) and phrases of Flickr30k (there it is called R@1): the chosen region, the whole image among them, overlaps
    a right box by more than one half, pixels counted inclusively (spec section 2). Beside it, how often any region does."""
    chosen = decide(trained, data, show)
    boxes, found, reachable = (np.concatenate(part) for part in zip(*_looked_at(data, chosen), strict=True))
    known = isinstance(data.target, TrueBoxes)
    file = results.lines(results.region_rows(data, chosen, boxes, found if known else None))
    if not known:
        return Outcome(file)
    marks = (found > ACCEPTED_IOU).astype(np.float64)
    return Outcome(file, marks, {**_mean("accuracy", marks), "reachable": float((reachable > ACCEPTED_IOU).mean())})


def _looked_at(data: TaskData, chosen: Chosen) -> Iterator[tuple[NDArray[Any], ...]]:
    """For some examples at a time: the chosen box [m, 4] in pixels, its IoU with the best right box [m], and the best IoU of
    all regions [m]; without right boxes both are 0."""
    for start in range(0, len(data), _EXAMPLES):
        indices = np.arange(start, min(start + _EXAMPLES, len(data)))
        regions = Regions.of(data, data.image_rows[indices, 0].astype(np.int64))
        pixels, starts = regions.pixels(), regions.cu_images[:-1]
        overlaps = np.zeros(len(pixels), np.float32)
        if isinstance(data.target, TrueBoxes):
            overlaps = data.target.pack(indices, regions.cu_images, pixels, training=False).scores.numpy()
        rows = starts + chosen[indices]
        yield pixels[rows], overlaps[rows], np.maximum.reduceat(overlaps, starts)


def _choices(trained: Trained, data: TaskData, show: Show) -> Outcome:
    """Visual7W and GuessWhat: the right one of the given boxes."""
    chosen = decide(trained, data, show)
    assert isinstance(data.target, Choices)  # `decide` saw to it
    starts, scores = data.target.offsets[:-1], data.target.scores
    right = [int(np.argmax(scores[i:j])) for i, j in zip(starts, data.target.offsets[1:], strict=True)]
    marks = (chosen == right).astype(np.float64)
    rows = results.choice_rows(data, chosen, data.target.candidates[starts + chosen])
    return Outcome(results.lines(rows), marks, _mean("accuracy", marks))


def _classes(trained: Trained, data: TaskData, show: Show) -> Outcome:
    """SNLI-VE: the right class of three. A pair without a class, on which its annotators did not agree, is never right."""
    chosen, marks = _classified(trained, data, show)
    return Outcome(results.lines(results.class_rows(data, chosen)), marks, _mean("accuracy", marks))


def _nlvr2(trained: Trained, data: TaskData, show: Show) -> Outcome:
    """NLVR2: accuracy; and consistency, the share of sentences that are judged right with all of their pairs of images."""
    chosen, marks = _classified(trained, data, show)
    file = results.nlvr2(data, chosen)
    if marks is None:
        return Outcome(file)
    return Outcome(
        file, marks, {**_mean("accuracy", marks), "consistency": consistency(marks, data.group_codes)}, False
    )


def _classified(trained: Trained, data: TaskData, show: Show) -> tuple[Chosen, Marks | None]:
    chosen = decide(trained, data, show)
    known = isinstance(data.target, Classes)
    return chosen, (chosen == data.target.index).astype(np.float64) if known else None  # type: ignore[union-attr]


def consistency(marks: Marks, sentences: NDArray[np.int32]) -> float:
    """Share of sentences all of whose examples have mark 1. `sentences`: int32 [n], 0 … sentences - 1."""
    wrong = np.bincount(sentences, weights=marks < 1)
    return float((wrong == 0).mean())


def _mean(name: str, marks: Marks | None) -> dict[str, float]:
    return {} if marks is None else {name: float(marks.mean())}


Rule = Callable[[Trained, TaskData, Show], Outcome]

RULES: dict[EvaluationKind, Rule] = {
    "vqa": _vqa,
    "gqa": _gqa,
    "answers": _answers,
    "retrieval": _retrieval,
    "regions": _regions,
    "choices": _choices,
    "nlvr2": _nlvr2,
    "classes": _classes,
}
