"""`python -m bench.lengths`: how long the texts of the twelve tasks are, and how many regions their images have.

Texts are measured from real annotations, through the readers and the tokenizer that train: WordPiece, [CLS], [SEP], cut
to the task's `max_tokens`, and the task token. Where no real text or box could be had, the row says what is assumed.
The result, `bench/lengths.json`, is committed, so that benchmarks need no data.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from engine.tasks import TaskRow, load_table
from pipelines.errors import BadInput
from pipelines.examples import Choice, Example
from pipelines.files import open_json
from pipelines.readers import captions, gqa, guesswhat, nlvr2, refer, snli_ve, visual_genome, vqa
from pipelines.wordpiece import WordPiece

FILE = Path(__file__).resolve().parent / "lengths.json"
DATA = Path(os.environ.get("STOPGO_REFERENCE", Path(__file__).resolve().parent.parent.parent / "shared")) / "data"
"""Where real annotations are looked for by default, as by the tests."""

VOCABULARY = "vocab/bert-base-uncased-vocab.txt"

DETECTED = 100
"""Regions of every image in the published features (spec section 5.1); the global row comes on top."""

Counts = dict[int, int]
"""Length -> how many items have it."""


@dataclass(frozen=True)
class Measured:
    """One histogram and where it comes from."""

    counts: Counts
    source: str
    real: bool

    @property
    def mean(self) -> float:
        return sum(length * count for length, count in self.counts.items()) / sum(self.counts.values())

    def draw(self, random: np.random.Generator, n: int) -> NDArray[np.int64]:
        """n lengths, int64, with the histogram's frequencies."""
        lengths = np.fromiter(self.counts, np.int64)
        weights = np.fromiter(self.counts.values(), np.float64)
        return random.choice(lengths, n, p=weights / weights.sum())

    def as_json(self) -> dict[str, Any]:
        """For the file; `items` and `mean` are for people."""
        counts = {str(length): count for length, count in sorted(self.counts.items())}
        items = sum(self.counts.values())
        return {"real": self.real, "source": self.source, "items": items, "mean": round(self.mean, 2), "counts": counts}

    @classmethod
    def of_json(cls, row: Mapping[str, Any]) -> Self:
        return cls({int(length): count for length, count in row["counts"].items()}, row["source"], row["real"])


@dataclass(frozen=True)
class TaskLengths:
    """Text rows of a text (the task token included), and annotated boxes that an image brings beside the detected ones."""

    texts: Measured
    boxes: Measured
    options: int | None = None
    """How many of the annotated boxes a sample chooses from; None: all."""

    def draw_regions(self, random: np.random.Generator, n: int) -> NDArray[np.int64]:
        """Region rows of n images, int64: the global row, the detected regions, the annotated boxes."""
        return 1 + DETECTED + self.boxes.draw(random, n)


def load(path: Path = FILE) -> dict[str, TaskLengths]:
    """The lengths of every task that the file knows. Raises BadInput where it is of another form."""
    try:
        rows = json.loads(path.read_text())["tasks"]
        return {
            name: TaskLengths(Measured.of_json(row["texts"]), Measured.of_json(row["boxes"]), row["options"])
            for name, row in rows.items()
        }
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BadInput(path, f"no file of lengths: {error!r}", "python -m bench.lengths writes one") from None


def main(argv: list[str] | None = None) -> int:
    """Command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m bench.lengths", description=__doc__.split("\n\n")[0])
    parser.add_argument("--data", type=Path, default=DATA, help="folder of real annotations (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=FILE, help="file to write (default: %(default)s)")
    arguments = parser.parse_args(argv)
    try:
        measured = measure(arguments.data)
    except BadInput as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    arguments.out.write_text(_written(measured))
    print(f"{'task':22}{'text rows':>10}{'of':>5}{'texts':>9}{'region rows':>13}{'of':>5}")
    rows = load_table().tasks
    for name, lengths in measured.items():
        texts, row = lengths.texts, rows[name]
        items = f"{sum(texts.counts.values()):,}" if texts.real else "assumed"
        regions = 1 + DETECTED + lengths.boxes.mean
        print(f"{name:22}{texts.mean:10.2f}{row.max_tokens + 1:5}{items:>9}{regions:13.1f}{row.max_regions:5}")
    return 0


def measure(data: Path) -> dict[str, TaskLengths]:
    """Lengths of the twelve tasks from the annotations under `data`. Raises BadInput for a missing or damaged file."""
    rows = load_table().tasks
    tokenizer = WordPiece.load(data / VOCABULARY)
    texts = {name: texts_of(rows[name], data, tokenizer) for name in _TEXTS}
    for name, (other, longer, why) in _TEXTS_ASSUMED.items():
        texts[name] = Measured(_lengthened(texts[other].counts, longer, rows[name].max_tokens + 1), why, real=False)
    boxes = _boxes(data)
    names = [row.name for row in load_table().default_tasks()]
    return {name: TaskLengths(texts[name], boxes.get(name, _NO_BOXES), _OPTIONS.get(name)) for name in names}


def texts_of(row: TaskRow, data: Path, tokenizer: WordPiece) -> Measured:
    """Rows that each real text of a task has in a batch; empty texts, which one published file holds, are no samples."""
    what, read = _TEXTS[row.name]
    _, offsets = tokenizer.encode_batch([text for text in read(data) if text.strip()], row.max_tokens)
    counts = Counter((np.diff(offsets) + 1).tolist())  # the task token is the one more
    return Measured(dict(sorted(counts.items())), what, real=True)


def _lengthened(counts: Counts, more: int, longest: int) -> Counts:
    result: Counter[int] = Counter()
    for length, count in counts.items():
        result[min(length + more, longest)] += count
    return dict(sorted(result.items()))


def _said(examples: Iterable[Example]) -> Iterator[str]:
    return (example.text for example in examples)


def _refcoco(data: Path) -> Iterator[str]:
    """A file of expressions alone: {reference: [[expression], …]}."""
    for expressions in open_json(data / "refcoco/refcoco_test_expressions_5000.json").values():
        yield from chain.from_iterable(expressions)


def _refcocog(data: Path) -> Iterator[str]:
    folder = data / "refcoco/refcocog"
    for split in ("train", "val", "test"):
        yield from _said(refer.read(refs=folder / "refs(umd).p", instances=folder / "instances.json", split=split))


def _flickr30k(data: Path) -> Iterator[str]:
    folder = data / "flickr30k/multi30k_train_captions"
    files = [folder / f"train.{number}.en.gz" for number in range(1, 6)]
    return _said(captions.read_parallel(captions=files, images=folder / "train_images.txt"))


_GAMES = [f"guesswhat/compguesswhat.{split}.jsonl.gz" for split in ("train", "valid")]
_DIALOGUES = "guesswhat/guesswhat_train_100_human_games.jsonl"

_TEXTS: dict[str, tuple[str, Callable[[Path], Iterable[str]]]] = {
    "vqa": (
        "VQA v2 questions of train2014, a subset of 57,038",
        lambda d: _said(vqa.read(questions=[d / f"vqav2/subset60k/vqa_questions_{s}.json.gz" for s in ("train", "valid")])),
    ),
    "visual_genome_qa": (
        "Visual Genome question_answers.json, images 1 to 5",
        lambda d: _said(visual_genome.read(questions=[d / "visual_genome/hf_5img/question_answers.json"])),
    ),
    "gqa": ("GQA testdev-balanced, 11,088 questions", lambda d: _said(gqa.read(questions=[d / "gqa/testdev.json"]))),
    "coco_retrieval": (
        "COCO captions_val2017, whole",
        lambda d: _said(captions.read(captions=[d / "coco_retrieval/captions_val2017.json"])),
    ),
    "flickr30k_retrieval": ("Flickr30k captions of 29,000 training images", _flickr30k),
    "refcoco": ("RefCOCO test expressions", _refcoco),
    "refcocog": ("RefCOCOg refs(umd).p, 15 objects only", _refcocog),
    "guesswhat_pointing": (
        "GuessWhat dialogues: 100 training games and 12 of CompGuessWhat",
        lambda d: _said(guesswhat.read(games=[d / name for name in (*_GAMES, _DIALOGUES)])),
    ),
    "nlvr2": (
        "NLVR2 dev and test1, whole",
        lambda d: _said(nlvr2.read(statements=[d / "nlvr2/dev.json", d / "nlvr2/test1.json"])),
    ),
    "snli_ve": ("e-SNLI-VE dev hypotheses", lambda d: _said(snli_ve.read(pairs=[d / "snli_ve/esnlive_dev.csv"]))),
}  # fmt: skip
"""Task -> what its texts are, and how to read them."""

_TEXTS_ASSUMED = {
    "refcoco_plus": ("refcoco", 0, "assumed: as RefCOCO (published means: 3.5 words both); no real text at hand"),
    "visual7w": (
        "visual_genome_qa", 2,
        "assumed: Visual Genome questions, two tokens longer ('which …' questions name their object); no real text at hand",
    ),
}  # fmt: skip
"""Task -> the task whose lengths it takes, tokens added to them, and why."""

_NO_BOXES = Measured(
    {0: 1}, f"published features: {DETECTED} detected boxes, none annotated (spec section 5.1)", real=False
)

_OPTIONS = {"visual7w": 4}
"""Tasks that choose among some of an image's annotated boxes only (spec section 3.2)."""

_VISUAL7W_QUESTIONS = {2: 4, 3: 8, 4: 12, 5: 16, 6: 20, 7: 16, 8: 12, 9: 8, 10: 4}


def _boxes(data: Path) -> dict[str, Measured]:
    """Annotated boxes beside the detected ones, for the tasks that append them."""
    games = list(guesswhat.read(games=[data / name for name in _GAMES]))
    objects = Counter(len(game.target.candidates) for game in games if isinstance(game.target, Choice))
    return {
        "guesswhat_pointing": Measured(
            dict(sorted(objects.items())), "objects of the image in 12 CompGuessWhat games", real=True
        ),
        "visual7w": Measured(
            {4 * questions: weight for questions, weight in _VISUAL7W_QUESTIONS.items()},
            "assumed: four boxes for each of 2 to 10 questions on an image, 24 on average (spec section 3.4 estimates "
            "23); no real record at hand",
            real=False,
        ),
    }


def _written(measured: Mapping[str, TaskLengths]) -> str:
    """JSON with one histogram a line."""
    about = {
        "texts": "text rows of one text: WordPiece tokens with [CLS], [SEP] and the task token, cut to max_tokens + 1",
        "boxes": f"annotated boxes of one image; its region rows are 1 + {DETECTED} + these",
        "options": "how many of the annotated boxes a sample chooses from; null: all",
        "written by": "python -m bench.lengths",
    }
    lines = ["{", f' "about": {json.dumps(about)},', ' "tasks": {']
    rows = []
    for name, lengths in measured.items():
        texts, boxes = (json.dumps(part.as_json()) for part in (lengths.texts, lengths.boxes))
        options = json.dumps(lengths.options)
        rows.append(
            f'  {json.dumps(name)}: {{\n   "texts": {texts},\n   "boxes": {boxes},\n   "options": {options}\n  }}'
        )
    return "\n".join([*lines, ",\n".join(rows), " }", "}", ""])


if __name__ == "__main__":
    sys.exit(main())
