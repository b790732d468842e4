"""One picture for a person: some scenes, and what the data sets' readers read about them."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from PIL import Image

from pipelines.examples import BoxXYXY, Choice, Example, Label, Region, SoftAnswers
from pipelines.extractor import extract
from pipelines.readers import captions, gqa, guesswhat, nlvr2, refer, snli_ve, visual7w, visual_genome, vqa

_INK, _QUIET, _PAPER = "#1d2733", "#6b7580", "#fbfaf7"
_MARKS = ("#d6246e", "#1763c6", "#0c8a5b")
_VERDICTS = ("contradiction", "neutral", "entailment")
_WIDTH = 44  # characters of a line of text


@dataclass
class Panel:
    """One image, or two side by side, with text below."""

    title: str
    images: list[Path]
    lines: list[tuple[str, str]]
    """Text and its colour."""
    boxes: list[tuple[BoxXYXY, str, str]] = field(default_factory=list)
    """Box, colour and a short name; in the first image."""


def draw_figure(folder: Path, target: Path) -> None:
    """Draw eight panels about the world in `folder` into the PNG file `target`. Dashed: what the extractor finds."""
    panels = [_vqa(folder), _genome(folder), _retrieval(folder), _refer(folder),
              _visual7w(folder), _guesswhat(folder), _snli_ve(folder), _nlvr2(folder)]  # fmt: skip
    figure = Figure(figsize=(17, 10.4), facecolor=_PAPER)
    FigureCanvasAgg(figure)
    rows = figure.add_gridspec(2, 4, left=0.02, right=0.98, top=0.93, bottom=0.02, hspace=0.1, wspace=0.08)
    for place, panel in enumerate(panels):
        cell = rows[place // 4, place % 4].subgridspec(2, 1, height_ratios=(1.25, 1), hspace=0.03)
        _show(figure.add_subplot(cell[0, 0]), panel)
        _write(figure.add_subplot(cell[1, 0]), panel)
    figure.suptitle("The embedded world: scenes, and what its data sets say about them", color=_INK, fontsize=17)
    figure.savefig(target, dpi=110)


def _show(axes: Axes, panel: Panel) -> None:
    pictures = [Image.open(path).convert("RGB") for path in panel.images]
    height = max(picture.height for picture in pictures)
    joined = Image.new("RGB", (sum(p.width for p in pictures) + 8 * (len(pictures) - 1), height), _PAPER)
    left = 0
    for picture in pictures:
        joined.paste(picture, (left, 0))
        for x1, y1, x2, y2 in extract(picture).boxes.tolist():
            corner, size = (left + x1 - 2, y1 - 2), (x2 - x1 + 4, y2 - y1 + 4)
            axes.add_patch(Rectangle(corner, *size, fill=False, ls=(0, (3, 2)), lw=0.8, ec="w"))
        left += picture.width + 8
    axes.imshow(np.asarray(joined), interpolation="lanczos")
    for (x1, y1, x2, y2), colour, name in panel.boxes:
        axes.add_patch(Rectangle((x1 - 3, y1 - 3), x2 - x1 + 6, y2 - y1 + 6, fill=False, lw=2.4, ec=colour))
        axes.text(x1 - 3, y1 - 5, name, color="w", fontsize=8.5, weight="bold", va="bottom",
                  bbox={"facecolor": colour, "edgecolor": "none", "pad": 1.4})  # fmt: skip
    axes.set_title(panel.title, loc="left", fontsize=12.5, color=_INK, weight="bold", pad=5)
    axes.axis("off")


def _write(axes: Axes, panel: Panel) -> None:
    axes.axis("off")
    height = 1.0
    for text, colour in panel.lines:
        for row, line in enumerate(textwrap.wrap(text, _WIDTH)):
            axes.text(0.02 + 0.03 * (row > 0), height, line, color=colour, fontsize=10.5, va="top",
                      transform=axes.transAxes)  # fmt: skip
            height -= 0.085
        height -= 0.02


def _of_one_image(examples: Iterable[Example], count: int) -> list[Example]:
    """Up to `count` examples about one image, of the image that first has so many."""
    by_image: dict[str, list[Example]] = {}
    for example in examples:
        of_image = by_image.setdefault(example.images[0], [])
        of_image.append(example)
        if len(of_image) == count:
            return of_image
    return max(by_image.values(), key=len)


def _image(folder: Path, source: str, key: str) -> Path:
    name = f"COCO_*_{int(key):012d}.jpg" if source == "coco" else f"{key}.jpg"
    return next((folder / "images" / source).glob(name))


def _asked(examples: list[Example]) -> list[tuple[str, str]]:
    """Questions, each followed by its answers, the best first."""
    lines = []
    for example in examples:
        target = example.target
        assert isinstance(target, SoftAnswers)
        ranked = sorted(zip(target.answers, target.scores, strict=True), key=lambda item: -item[1])
        said = ", ".join(f"{answer}" if score == 1 else f"{answer} ({score})" for answer, score in ranked)
        lines.append((f"{example.text} → {said}", _INK))
    return lines


def _vqa(folder: Path) -> Panel:
    questions, annotations = (folder / "vqa" / name for name in (
        "v2_OpenEnded_mscoco_val2014_questions.json", "v2_mscoco_val2014_annotations.json"))  # fmt: skip
    asked = _of_one_image(vqa.read(questions=[questions], annotations=[annotations]), 5)
    return Panel("VQA", [_image(folder, "coco", asked[0].images[0])], _asked(asked))


def _genome(folder: Path) -> Panel:
    asked = _of_one_image(gqa.read(questions=[folder / "gqa" / "val_balanced_questions.json"]), 3)
    image = asked[0].images[0]
    every = sorted((folder / "visual_genome").glob("question_answers_*.json"))
    more = [example for example in visual_genome.read(questions=every) if example.images == (image,)][:3]
    return Panel("GQA and Visual Genome QA", [_image(folder, "vg", image)], _asked(asked + more))


def _retrieval(folder: Path) -> Panel:
    file = folder / "coco_retrieval" / "all_data_final_val_2014.jsonline"
    written = _of_one_image(captions.read(captions=[file]), 5)
    return Panel("COCO retrieval", [_image(folder, "coco", written[0].images[0])], [(e.text, _INK) for e in written])


def _refer(folder: Path) -> Panel:
    def read(name: str, who: str) -> list[Example]:
        files = {"refs": folder / name / f"refs({who}).json", "instances": folder / name / "instances.json"}
        return [example for split in ("train", "val", "test") for example in refer.read(**files, split=split)]

    by_name = {
        "RefCOCO": read("refcoco", "unc"),
        "RefCOCO+": read("refcoco+", "unc"),
        "RefCOCOg": read("refcocog", "umd"),
    }
    shared = [{example.images[0] for example in examples} for examples in by_name.values()]
    image = min(set.intersection(*shared) or shared[0])
    lines, boxes = [], []
    for (name, examples), colour in zip(by_name.items(), _MARKS, strict=True):
        of_image = [example for example in examples if example.images[0] == image]
        if of_image:
            target = of_image[0].target
            assert isinstance(target, Region)
            texts = [example.text for example in of_image if example.target == target]
            lines.append((f"{name}: {' · '.join(texts[:2])}", colour))
            boxes.append((target.boxes[0], colour, name[-1].lower()))
    return Panel("RefCOCO, RefCOCO+, RefCOCOg", [_image(folder, "coco", image)], lines, boxes)


def _options(choice: Choice, only: Iterable[int]) -> list[tuple[BoxXYXY, str, str]]:
    """Candidate boxes with letters, the answer in colour."""
    return [
        (choice.candidates[choice.choices[place]], _MARKS[0] if place == choice.answer else _QUIET, "ABCDEFGHI"[place])
        for place in only
    ]


def _visual7w(folder: Path) -> Panel:
    file = folder / "visual7w" / "dataset_v7w_pointing.json"
    example = next(iter(visual7w.read(questions=file, split="val")))
    choice = example.target
    assert isinstance(choice, Choice)
    lines = [(example.text, _INK), (f"{'ABCD'[choice.answer]} of A, B, C, D", _MARKS[0])]
    return Panel("Visual7W", [_image(folder, "vg", example.images[0])], lines, _options(choice, range(4)))


def _guesswhat(folder: Path) -> Panel:
    games = list(guesswhat.read(games=[folder / "guesswhat" / "guesswhat.valid.jsonl"]))
    example = max(games[:30], key=lambda game: len(game.text))
    choice = example.target
    assert isinstance(choice, Choice)
    turns = [turn.replace("start ", "").replace(" answer", " →") for turn in example.text.split(" stop ") if turn]
    lines = [(turn, _INK) for turn in turns] + [(f"It is {'ABCDEFGHI'[choice.answer]}.", _MARKS[0])]
    boxes = _options(choice, range(len(choice.choices)))
    return Panel("GuessWhat", [_image(folder, "coco", example.images[0])], lines, boxes)


def _snli_ve(folder: Path) -> Panel:
    pairs = list(snli_ve.read(pairs=[folder / "snli_ve" / "snli_ve_train.jsonl"]))
    image = pairs[0].images[0]
    lines = []
    for label, verdict in reversed(list(enumerate(_VERDICTS))):
        said = [pair.text for pair in pairs if pair.images[0] == image and pair.target == Label(label)]
        lines += [(f"{text} → {verdict}", _MARKS[label]) for text in said[:2]]
    return Panel("SNLI-VE", [_image(folder, "flickr", image)], lines)


def _nlvr2(folder: Path) -> Panel:
    read = nlvr2.read(statements=[folder / "nlvr2" / "dev.json"])
    by_pair: dict[tuple[str, ...], list[tuple[str, str]]] = {}
    for example in read:
        truth = example.target == Label(1)
        by_pair.setdefault(example.images, []).append((f"{example.text} → {truth}", _MARKS[2] if truth else _MARKS[0]))
    images, lines = next(iter(by_pair.items()))
    return Panel("NLVR2", [_image(folder, "nlvr2", key) for key in images], lines)
