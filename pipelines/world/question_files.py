"""VQA's, Visual Genome QA's and GQA's questions in their published files, and the answer vocabularies."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

from pipelines.answers import Answers, normalise_answer
from pipelines.world.claims import NUMBERS
from pipelines.world.files import write_json
from pipelines.world.language import word
from pipelines.world.plan import Plan
from pipelines.world.questions import ANSWERS, Question, draw_questions

_AGREEMENT = (10, 10, 10, 10, 9, 9, 8, 8, 7, 7)
"""How many of ten people give the right answer."""
_COCO_SPLIT = {"train": "train2014", "val": "val2014", "test": "test2015"}


def write_vqa(plan: Plan, folder: Path) -> None:
    """`v2_OpenEnded_mscoco_*_questions.json` and `v2_mscoco_*_annotations.json`, and the answers shared with VG QA."""
    drawn = {split: draw_questions(plan, "vqa", split) for split in _COCO_SPLIT}
    for split, questions in drawn.items():
        random = plan.random(f"vqa answers {split}")
        name = _COCO_SPLIT[split]
        records = list(_numbered(questions, 1000))
        header = {"info": {"description": "stopgo world"}, "data_subtype": name, "data_type": "mscoco"}
        write_json(folder / f"v2_OpenEnded_mscoco_{name}_questions.json", {
            **header, "task_type": "Open-Ended",
            "questions": [{"image_id": q.image, "question": _written(q.text), "question_id": n} for n, q in records],
        })  # fmt: skip
        write_json(folder / f"v2_mscoco_{name}_annotations.json", {
            **header, "annotations": [_annotation(random, number, question) for number, question in records],
        })  # fmt: skip
    words = [q.answer for q in drawn["train"]] + [q.answer for q in draw_questions(plan, "visual_genome_qa", "train")]
    _save_answers(words, folder / "trainval_label2ans.json")


def _annotation(random: Random, number: int, question: Question) -> dict[str, Any]:
    """Ten people's answers; where some disagree, the majority is right."""
    right = random.choice(_AGREEMENT)
    answers = [question.answer] * right + [_slip(random, question) for _ in range(10 - right)]
    random.shuffle(answers)
    kind = {"yes": "yes/no", "no": "yes/no"}.get(question.answer, "number" if question.kind == "number" else "other")
    return {
        "question_type": " ".join(question.text.split()[:2]), "multiple_choice_answer": question.answer,
        "answers": [
            {"answer": answer, "answer_confidence": "yes" if answer == question.answer else "maybe", "answer_id": place}
            for place, answer in enumerate(answers, start=1)
        ],
        "image_id": question.image, "answer_type": kind, "question_id": number,
    }  # fmt: skip


def _slip(random: Random, question: Question) -> str:
    """What somebody who did not look closely answers, or another word for the right answer."""
    synonym = word(random, question.answer)
    if synonym != question.answer:
        return synonym
    values = next((values for values in ANSWERS.values() if question.answer in values), ("yes", "no"))
    return random.choice([value for value in values if value != question.answer])


def write_visual_genome_qa(plan: Plan, folder: Path) -> None:
    """`question_answers.json` for every split: answers are sentences, as published ("Three.")."""
    for split in ("train", "val", "test"):
        questions = list(_numbered(draw_questions(plan, "visual_genome_qa", split), 1000))
        images: dict[int, list[dict[str, Any]]] = {}
        for number, question in questions:
            answer = NUMBERS[int(question.answer)] if question.kind == "number" else question.answer
            images.setdefault(question.image, []).append(
                {"a_objects": [], "question": _written(question.text), "image_id": question.image, "qa_id": number,
                 "answer": f"{answer.capitalize()}.", "q_objects": []}
            )  # fmt: skip
        write_json(folder / f"question_answers_{split}.json", [{"id": i, "qas": qas} for i, qas in images.items()])


def write_gqa(plan: Plan, folder: Path) -> None:
    """`*_balanced_questions.json`, and GQA's own answers."""
    words: list[str] = []
    for split, name in (("train", "train"), ("val", "val"), ("test", "testdev")):
        questions = draw_questions(plan, "gqa", split)
        words += [question.answer for question in questions if split == "train"]
        write_json(folder / f"{name}_balanced_questions.json", {
            str(number): {
                "semantic": [], "entailed": [], "equivalent": [str(number)], "question": _written(question.text),
                "imageId": str(question.image), "isBalanced": True, "groups": {"global": question.kind, "local": None},
                "answer": question.answer, "semanticStr": "", "annotations": {"answer": {}, "question": {}},
                "types": {"detailed": question.kind, "semantic": "attr", "structural": _structural(question.kind)},
                "fullAnswer": f"{question.answer.capitalize()}.",
            }
            for number, question in _numbered(questions, 1000)
        })  # fmt: skip
    _save_answers(words, folder / "trainval_label2ans.json")


def _structural(kind: str) -> str:
    if kind in ("both", "either"):
        return "logical"
    if kind in ("compare", "more"):
        return "compare"
    if kind in ("exists", "verify", "where"):
        return "verify"
    return "choose" if kind == "choose" else "query"


def _numbered(questions: list[Question], step: int) -> Iterator[tuple[int, Question]]:
    """Question ids as VQA's: the image id, then a running number."""
    of_image: Counter[int] = Counter()
    for question in questions:
        yield question.image * step + of_image[question.image], question
        of_image[question.image] += 1


def _written(text: str) -> str:
    return text[0].upper() + text[1:]


def _save_answers(words: list[str], path: Path) -> None:
    Answers.build(Counter(normalise_answer(answer) for answer in words)).save(path)
