"""`python -m engine.evaluate CHECKPOINT`: a trained model by each data set's official rule.

CHECKPOINT is a run folder (its newest checkpoint that verifies), one checkpoint of it, an exported folder with
data=SHEET.yaml, or a file of weights with --config.
Scores are those of the paper: VQA's ten-answer accuracy; the soft score of Visual Genome QA; GQA's accuracy; recall at 1 of
retrieval, every caption against all images of the split; IoU above 0.5 of referring expressions and phrases; the right option
of Visual7W and GuessWhat; NLVR2's accuracy, with its consistency; SNLI-VE's accuracy.

--output DIR keeps what was found:
  scores.json               scores, all metrics, scores by group (answer type, question type, ...)
  vqa_test.json             [{question_id, answer}], as the test server takes it
  gqa_test.json             [{questionId, prediction}], likewise
  nlvr2_test.csv            identifier,True or False
  <task>_<split>.jsonl      the others: id and answer, class, box, option, or the 20 best images of each caption
A split without published answers gives its result file and no score. A data set without a test split (Visual Genome QA has
none) is evaluated on its validation split, and the table says so.

key=value changes what changes no weights: data=SHEET.yaml, precision=bfloat16, device=cuda, threads=1, ...
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from engine.evaluation.run import evaluate
from engine.evaluation.table import show as show_table
from engine.house import check_imports
from engine.trained import load_trained
from pipelines.errors import BadInput
from pipelines.progress import progress_on_stderr


def main(argv: list[str] | None = None) -> int:
    """Command line; returns the exit code."""
    arguments = _parser().parse_intermixed_args(argv)
    tasks = None if arguments.tasks is None else [name.strip() for name in arguments.tasks.split(",")]
    try:
        check_imports()
        trained = load_trained(arguments.checkpoint, arguments.config, arguments.overrides, _say)
        with progress_on_stderr() as show:
            scores = evaluate(trained, tasks, arguments.split, arguments.output, show)
    except (BadInput, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; tasks that were done have their result files", file=sys.stderr)
        return 130
    show_table(scores, trained.rows, arguments.split)
    if arguments.output is not None:
        print(f"{arguments.output}: scores.json and a result file of each task")
    return 0


def _say(message: str) -> None:
    print(message, file=sys.stderr)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m engine.evaluate", description=__doc__, epilog="Exit codes: 0 done, 2 bad input, 130 interrupted.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("checkpoint", metavar="CHECKPOINT", type=Path)
    parser.add_argument("overrides", metavar="key=value", nargs="*", help="what an evaluation may say otherwise")
    parser.add_argument("--tasks", metavar="A,B", help="names of tasks (default: all that the run trained)")
    parser.add_argument("--split", choices=("test", "val"), default="test", help="default: %(default)s")
    parser.add_argument("--output", metavar="DIR", type=Path, help="where scores.json and result files go")
    parser.add_argument("--config", metavar="RUN.yaml", type=Path, help="the configuration, for a file of weights")
    return parser


if __name__ == "__main__":
    sys.exit(main())
