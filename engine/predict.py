"""`python -m engine.predict CHECKPOINT --task TASK --image IMAGE --text TEXT`: one question to a trained model.

CHECKPOINT is a run folder, one checkpoint of it, an exported folder (stopgo export), or a file of weights with --config.
IMAGE is a key in the feature store of the task's data set, or the path of a picture file, which goes through a detector.

  questions        --task vqa --image 131486 --text "what color is the cat?"
  retrieval        --task coco_retrieval --text "two dogs on a sofa" --image 1 --image 2 --image 3     (images ranked)
                   --task coco_retrieval --image 1 --text "a caption" --text "another one"             (texts ranked)
  grounding        --task refcoco --image 131486 --text "the cat on the left"
  choice of boxes  --task visual7w --image 42 --text "which pillow is farther?"     (annotated boxes of the data set's image)
                   --task visual7w --image cat.jpg --boxes boxes.json --text …      (boxes of your own)
  two images       --task nlvr2 --image dev-0-0-img0 --image dev-0-0-img1 --text "both have a dog"

Scores: of retrieval, the softmax over what was given; of all others the sigmoid that the loss trains, answer by answer.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from engine.asking import Answer, ask
from engine.house import check_imports
from engine.images import Pictures, from_files, stored
from engine.trained import Trained, load_trained
from pipelines.errors import BadInput
from pipelines.extract.detectors import DETECTORS, load_detector


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code."""
    arguments = _parser().parse_intermixed_args(argv)
    try:
        check_imports()
        if arguments.top < 1:
            raise BadInput("--top", f"{arguments.top} answers", "1 or more")
        trained = load_trained(
            arguments.checkpoint, arguments.config, arguments.overrides, lambda line: print(line, file=sys.stderr)
        )
        with tempfile.TemporaryDirectory(prefix="stopgo-") as folder:
            pictures = _pictures(trained, arguments, Path(folder))
            answers = ask(trained, arguments.task, arguments.text, pictures, choices=arguments.choices)
    except (BadInput, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    _print(arguments, trained, answers[: arguments.top])
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m engine.predict", description=__doc__, epilog="Exit codes: 0 done, 2 bad input, 130 interrupted.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    add = parser.add_argument
    add("checkpoint", metavar="CHECKPOINT", type=Path)
    add("overrides", nargs="*", metavar="key=value", help="of the run: data, world.path, device, threads, precision, …")
    add("--task", required=True, help="name of a task that the run trained")
    add("--image", action="append", required=True, metavar="KEY_OR_FILE", help="give it again for several")
    add("--text", action="append", required=True, help="give it again for several (retrieval)")
    add("--config", type=Path, metavar="RUN.yaml", help="the run configuration that a file of weights belongs to")
    add("--top", type=int, default=5, metavar="N", help="how many answers (default: 5)")
    add("--json", action="store_true", help="the answers as JSON")
    add("--choices", type=int, nargs="+", metavar="ROW", help="which annotated boxes compete, from 0 (default: all)")
    add(
        "--boxes",
        type=Path,
        metavar="FILE",
        help="boxes to choose from in picture files: JSON {image name: [[x1, y1, x2, y2]]}",
    )
    add("--detector", default="world", metavar="DETECTOR",
        help=f"for picture files: {', '.join(DETECTORS)}, or module:factory (default: world, for the embedded world's "
        "pictures only)")  # fmt: skip
    add("--weights", type=Path, metavar="FILE", help="the detector's weights")
    return parser


def _pictures(trained: Trained, arguments: argparse.Namespace, folder: Path) -> Pictures:
    """By key or by file, whichever the first one is: one question has its images from one place."""
    files = [Path(name) for name in arguments.image if Path(name).is_file()]
    if not files:
        if arguments.boxes is not None:
            raise BadInput("--boxes", "is for picture files", "images of a store have their own annotated boxes")
        return stored(trained, arguments.task, arguments.image)
    if len(files) < len(arguments.image):
        other = next(name for name in arguments.image if not Path(name).is_file())
        raise BadInput(f"--image {other}", "no file, and others are", "give all by key, or all as picture files")
    detector = load_detector(arguments.detector, arguments.weights, trained.device.type)
    return from_files(trained, arguments.task, files, detector, folder, arguments.boxes)


def _print(arguments: argparse.Namespace, trained: Trained, answers: Sequence[Answer]) -> None:
    if arguments.json:
        said = {"task": arguments.task, "text": arguments.text, "images": arguments.image}
        print(json.dumps({**said, "answers": [asdict(answer) for answer in answers]}, ensure_ascii=False))
        return
    console = Console(width=None if sys.stdout.isatty() else 120, highlight=False)
    console.print(f"[bold]{trained.row(arguments.task).title}[/bold] {escape(' | '.join(arguments.text))}")
    table = Table(header_style="bold")
    boxes = any(answer.box for answer in answers)
    for heading in ("answer", "probability", "logit", *(["box x1 y1 x2 y2, pixels"] if boxes else [])):
        table.add_column(heading, justify="left" if heading == "answer" else "right")
    for answer in answers:
        box = [" ".join(f"{value:.0f}" for value in answer.box)] if answer.box else []
        table.add_row(escape(answer.label), f"{answer.probability:.4f}", f"{answer.logit:.3f}", *box)
    console.print(table)


if __name__ == "__main__":
    sys.exit(main())
