"""`python -m engine.export CHECKPOINT DIR`: a trained model as a folder to pass on, laid out as model hubs have it.

  model.safetensors      float32 weights in the published layout
  config.json            the model's sizes, its heads and tasks, and the fingerprints of the other files
  labels.json            of each head that answers or classifies, its labels in order
  tokenizer.json, vocab.txt, tokenizer_config.json    the WordPiece tokenizer, as the `tokenizers` library reads it
  run.yaml, task_rows.yaml    the run configuration; rows of tasks that are not in the project's own table
  README.md              the model card: scores of the run's journal, tasks, data

CHECKPOINT is a run folder, one checkpoint of it, or a file of weights with --config. DIR must not exist yet. Wherever a command
takes a checkpoint to ask, it takes DIR: `stopgo predict DIR --task vqa --image cat.jpg …` needs no data set; questions about
images of a data set also take data=SHEET.yaml.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from engine.checkpoint import fingerprint
from engine.config import resolved
from engine.convert import State, read, write_safetensors, write_whole
from engine.exported import CONFIG, FORMAT, LABELS, ROWS, RUN, WEIGHTS
from engine.house import check_imports
from engine.model_card import model_card
from engine.tasks import TASKS_FILE, load_table
from engine.trained import Trained, load_trained, run_folder
from pipelines.errors import BadInput
from pipelines.files import write_atomic


def export(trained: Trained, source: Path, target: Path) -> None:
    """Write the folder. `source` is what `trained` was loaded from. Raises BadInput; nothing half written stays."""
    if target.exists():
        raise BadInput(target, "exists already", "remove it or choose another name")
    if not target.absolute().parent.is_dir():
        raise BadInput(target.parent, "no such folder", "make it first")
    state = read(source, lambda what, done, total: None, lambda line: None)
    write_whole(lambda state, folder: _fill(trained, run_folder(source), state, folder), state, target)


def _fill(trained: Trained, run: Path | None, state: State, folder: Path) -> None:
    folder.mkdir()
    write_safetensors(state, folder / WEIGHTS)
    trained.tokenizer.save(folder)
    shutil.copymode(folder / "vocab.txt", folder / WEIGHTS)  # which its writer lets nobody else read
    _write_json(folder / "tokenizer_config.json", _tokenizer_config(trained))
    _write_json(folder / LABELS, labels(trained))
    # What the run began from and where it lay is nothing that can be found elsewhere.
    config = trained.config.model_copy(
        update={"output": "", "initial_weights": None, "initial_text": None, "task_rows": ()}
    )
    write_atomic(folder / RUN, resolved(config).encode())
    write_atomic(folder / ROWS, yaml.safe_dump(_foreign_rows(trained), sort_keys=False, allow_unicode=True).encode())
    files = {name: fingerprint(folder / name) for name in (WEIGHTS, LABELS, RUN, ROWS, "vocab.txt")}
    _write_json(folder / CONFIG, _config(trained, files))
    write_atomic(folder / "README.md", model_card(trained, run).encode())


def labels(trained: Trained) -> dict[str, list[str]]:
    """Of each head that answers or classifies, the labels of its outputs in order."""
    found = {}
    for row in trained.rows.values():
        head = trained.table.head(row)
        if row.head in trained.answers:
            answers = trained.answers[row.head]
            found[row.head] = [answers.answer(i) for i in range(len(answers))]
        elif head.classes is not None:
            found[row.head] = [head.label(i) for i in range(head.classes)]
    return found


def _config(trained: Trained, files: dict[str, Any]) -> dict[str, Any]:
    heads = {name: {"kind": spec.kind, "outputs": spec.outputs} for name, spec in trained.model.head_specs.items()}
    tasks = {
        name: {"title": row.title, "head": row.head, "task_token": trained.token(name), "max_tokens": row.max_tokens,
               "max_regions": row.max_regions, "images": row.images}
        for name, row in trained.rows.items()
    }  # fmt: skip
    own = {"format": FORMAT, "heads": heads, "tasks": tasks, "files": files}
    return {
        "architectures": ["ViLBERT"],
        "model_type": "vilbert",
        "torch_dtype": "float32",
        **trained.config.model.model_dump(mode="json"),
        "stopgo": own,
    }


def _tokenizer_config(trained: Trained) -> dict[str, Any]:
    return {
        "tokenizer_class": "BertTokenizer", "do_lower_case": True,
        "model_max_length": trained.config.model.max_position_embeddings,
        "unk_token": "[UNK]", "sep_token": "[SEP]", "pad_token": "[PAD]", "cls_token": "[CLS]", "mask_token": "[MASK]",
    }  # fmt: skip


def _foreign_rows(trained: Trained) -> dict[str, Any]:
    """Heads and tasks that the run added to the project's table."""
    own = load_table(TASKS_FILE)
    kinds = ((own.heads, trained.table.heads, "heads"), (own.tasks, trained.table.tasks, "tasks"))
    return {
        kind: {
            name: row.model_dump(mode="json", exclude={"name"}, exclude_none=True)
            for name, row in rows.items()
            if name not in known
        }
        for known, rows, kind in kinds
    }


def _write_json(path: Path, content: Any) -> None:
    write_atomic(path, (json.dumps(content, ensure_ascii=False, indent=1) + "\n").encode())


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m engine.export", description=__doc__, epilog="Exit codes: 0 done, 2 bad input, 130 interrupted.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("checkpoint", metavar="CHECKPOINT", type=Path)
    parser.add_argument("target", metavar="DIR", type=Path)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="of the run: data, world.path, …")
    parser.add_argument("--config", type=Path, metavar="RUN.yaml", help="which a file of weights belongs to")
    arguments = parser.parse_intermixed_args(argv)
    try:
        check_imports()
        trained = load_trained(
            arguments.checkpoint, arguments.config, arguments.overrides, lambda line: print(line, file=sys.stderr)
        )
        export(trained, arguments.checkpoint, arguments.target)
    except (BadInput, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; nothing was left behind", file=sys.stderr)
        return 130
    size = sum(file.stat().st_size for file in arguments.target.iterdir())
    print(f"wrote {arguments.target}: {len(trained.rows)} tasks, {size / 2**20:,.1f} MiB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
