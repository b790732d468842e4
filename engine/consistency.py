"""`python -m engine.consistency CHECKPOINT [TASK=CHECKPOINT …]`: does a model that answers a question about a thing also
find it? (paper section 5, "Multi-Task visual grounding consistency")

Images of the test splits of referring expressions that questions are asked about as well: each question of such an image
stands against each expression. A pair weighs as many nouns and adjectives as both texts have in common; pairs with none do not
count. It is right where the question is answered and the region found. Printed: the weighted share of right pairs, in percent.

A model trained on everything is one CHECKPOINT (a run folder, or a checkpoint of it). Single-task models are compared by naming
the checkpoint of each task: vqa=RUN refcoco=RUN refcoco_plus=RUN.

Questions come from all training and validation examples of their data set: a run leaves out those on test images, so it
has not seen them. The paper does not say what "answered" means with ten answers: `soft` weighs a pair by the answer's score in
[0, 1], `strict` asks for at least 0.9, which is three of ten people.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from engine.assembly import data_spec
from engine.concepts import check_installed, concepts
from engine.house import check_imports
from engine.losses import loss_and_score
from engine.trained import Trained, load_trained
from pipelines.datasets import TaskData, load_task
from pipelines.errors import BadInput
from pipelines.examples import Example
from pipelines.packing import pack
from pipelines.progress import Show, progress_on_stderr

QUESTIONS, EXPRESSIONS = ("vqa",), ("refcoco", "refcoco_plus")
STRICT = 0.9
"""The training targets' score of an answer that three of ten people gave."""

Concepts = Callable[[Iterable[str]], Iterable[frozenset[str]]]


@dataclass(frozen=True)
class Asked:
    """A question or an expression that a model was asked."""

    image: str
    text: str
    score: float
    """In [0, 1]."""


@dataclass(frozen=True)
class Consistency:
    """The weighted accuracy, and over how much."""

    images: int
    pairs: int
    """Every question of an image with every expression."""
    overlapping: int
    """Pairs with a concept in common."""
    weight: int
    """Concepts in common, summed over pairs."""
    soft: float
    strict: float


def consistency(questions: Sequence[Asked], expressions: Sequence[Asked], tag: Concepts = concepts) -> Consistency:
    """The rule itself. Raises BadInput where no pair has a concept in common."""
    known = dict.fromkeys(asked.text for asked in (*questions, *expressions))
    of_text = dict(zip(known, tag(known), strict=True))
    by_image: dict[str, list[Asked]] = {}
    for question in questions:
        by_image.setdefault(question.image, []).append(question)
    images, pairs, overlapping, weight, soft, strict = set(), 0, 0, 0, 0.0, 0
    for expression in expressions:
        for question in by_image.get(expression.image, ()):
            shared = len(of_text[question.text] & of_text[expression.text])
            images.add(expression.image)
            pairs += 1
            overlapping += shared > 0
            weight += shared
            soft += shared * question.score * expression.score
            strict += shared * (question.score >= STRICT and expression.score >= STRICT)
    if not weight:
        what = f"none of {pairs:,} pairs of a question and an expression on one image has a noun or adjective in common"
        raise BadInput("grounding consistency", what, "name tasks whose questions are about the expressions' images")
    return Consistency(len(images), pairs, overlapping, weight, soft / weight, strict / weight)


def measure(
    models: Mapping[str, Trained],
    questions: Sequence[str] = QUESTIONS,
    expressions: Sequence[str] = EXPRESSIONS,
    show: Show = lambda what, done, total: None,
    tag: Concepts = concepts,
) -> Consistency:
    """Ask each task's model. Raises BadInput where tasks do not show images of one source."""
    first = models[expressions[0]]
    source = first.sheet.source(expressions[0])
    for task in (*questions, *expressions):
        other = models[task].sheet.source(task)
        if other != source:
            what = f"its images are those of {other}, the expressions' of {source}"
            raise BadInput(f"{models[task].sheet.path}: sets.{task}", what, "name tasks of one source")
    referred = [one for task in expressions for one in _ask(models[task], task, ("test",), None, show)]
    images = {one.image for one in referred}
    asked = [one for task in questions for one in _ask(models[task], task, ("train", "val"), images, show)]
    return consistency(asked, referred, tag)


def _ask(trained: Trained, task: str, splits: Sequence[str], images: set[str] | None, show: Show) -> list[Asked]:
    """Every example of these splits that shows one of the images (None: all), with the model's score."""
    row, found = trained.row(task), []
    for split in splits:
        examples = list(trained.sheet.examples(task, split, row.reader))
        data = load_task(
            data_spec(row, trained.table.head(row)), trained.sheet, split, trained.tokenizer,
            answers=trained.answers.get(row.head),
        )  # fmt: skip
        chosen = [at for at, example in enumerate(examples) if images is None or example.images[0] in images]
        scores = _scores(trained, data, np.array(chosen, np.int64), show)
        found += [_asked(examples[at], score) for at, score in zip(chosen, scores, strict=True)]
    return found


def _asked(example: Example, score: float) -> Asked:
    return Asked(example.images[0], example.text, score)


def _scores(trained: Trained, data: TaskData, chosen: NDArray[np.int64], show: Show) -> list[float]:
    """The score of each of these examples, by the rule of their loss."""
    if data.target is None:
        where = f"{trained.sheet.path}: sets.{data.spec.name}.{data.split}"
        raise BadInput(where, "its annotations hold no answers", "name a split that publishes them")
    row = trained.row(data.spec.name)
    size = row.batch * trained.config.validation.batch_factor
    scores = []
    for start in range(0, len(chosen), size):
        batch = pack(
            data, chosen[start : start + size], epoch=0, seed=trained.config.seed, training=False,
            task_token=trained.token(row.name), dtype=trained.dtype, share=trained.config.share_prefixes,
        )  # fmt: skip
        scores.append(loss_and_score(trained.logits(batch), batch)[1])
        show(f"asking {row.title}", min(start + size, len(chosen)), len(chosen))
    return torch.cat(scores).tolist() if scores else []


def _models(arguments: Sequence[str], tasks: Sequence[str]) -> dict[str, Trained]:
    """Each task's model: TASK=CHECKPOINT, or the one that is named alone; other `key=value` is said of all of them."""
    named = dict(argument.split("=", 1) for argument in arguments if argument.split("=", 1)[0] in tasks)
    others = [argument for argument in arguments if argument.split("=", 1)[0] not in tasks]
    alone = [argument for argument in others if "=" not in argument or Path(argument).exists()]
    overrides = [argument for argument in others if argument not in alone]
    if len(alone) > 1:
        raise BadInput(alone[1], "a second checkpoint for all tasks", f"TASK=CHECKPOINT, of {', '.join(tasks)}")
    missing = [task for task in tasks if task not in named]
    if missing and not alone:
        raise BadInput(missing[0], "no checkpoint for it", f"{missing[0]}=CHECKPOINT, or one for all tasks")
    paths = {task: Path(named.get(task, alone[0] if alone else "")) for task in tasks}
    loaded = {path: load_trained(path, overrides=overrides, say=_say) for path in dict.fromkeys(paths.values())}
    return {task: loaded[path] for task, path in paths.items()}


def main(argv: list[str] | None = None) -> int:
    """Command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m engine.consistency", description=__doc__, epilog="Exit codes: 0 done, 2 bad input, 130 interrupted.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument(
        "checkpoints",
        nargs="+",
        metavar="CHECKPOINT",
        help="or TASK=CHECKPOINT for each task; key=value of the runs: device=cpu, data=SHEET, …",
    )
    parser.add_argument("--questions", metavar="TASK,…", default=",".join(QUESTIONS), help="tasks with answers (vqa)")
    parser.add_argument(
        "--expressions",
        metavar="TASK,…",
        default=",".join(EXPRESSIONS),
        help="tasks with regions (refcoco,refcoco_plus)",
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    arguments = parser.parse_intermixed_args(argv)
    questions, expressions = arguments.questions.split(","), arguments.expressions.split(",")
    try:
        check_imports()
        check_installed()
        with progress_on_stderr() as show:
            models = _models(arguments.checkpoints, [*questions, *expressions])
            found = measure(models, questions, expressions, show)
    except (BadInput, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    print(json.dumps(asdict(found), indent=1)) if arguments.json else Console().print(_table(found))
    return 0


def _say(message: str) -> None:
    print(message, file=sys.stderr)


def _table(found: Consistency) -> Table:
    table = Table(title="grounding consistency", title_justify="left")
    for name in ("images", "pairs", "with a concept in common", "soft, %", "strict, %"):
        table.add_column(name, justify="right")
    table.add_row(
        f"{found.images:,}", f"{found.pairs:,}", f"{found.overlapping:,}", f"{100 * found.soft:.2f}",
        f"{100 * found.strict:.2f}",
    )  # fmt: skip
    return table


if __name__ == "__main__":
    raise SystemExit(main())
