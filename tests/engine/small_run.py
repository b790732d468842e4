"""A run over small made-up data sets of every target kind, for tests of the loop: seconds, not minutes."""

from __future__ import annotations

from pathlib import Path

import yaml

from engine.config import RunConfig, load
from engine.train import main
from tests.pipelines.small import FEATURES, build

ITERATIONS, TASKS = 12, 5
SETTINGS = (f"max_iterations={ITERATIONS}", "checkpoint.every=2", "stopgo.gap=2")

ROWS: dict[str, dict[str, object]] = {
    "heads": {
        "answer_head": {"kind": "answers"},
        "match_head": {"kind": "match", "options": 4},
        "region_head": {"kind": "regions"},
        "pair_head": {"kind": "paired_classes", "classes": 2},
    },
    "tasks": {
        name: {
            "title": name, "number": number, "group": group, "head": head, "reader": "tests.pipelines.small:read",
            "batch": 8, "lr": lr, "max_tokens": 9, "max_regions": regions, "loss": loss, "metric": metric,
            "default": False, "images": images,
        }
        for name, number, group, head, lr, regions, loss, metric, images in (
            ("answers", 0, "G1", "answer_head", 2.0e-3, 8, "soft_labels", "soft_accuracy", 1),
            ("captions", 3, "G2", "match_head", 1.0e-3, 8, "options", "option_accuracy", 1),
            ("phrases", 5, "G3", "region_head", 1.0e-3, 8, "regions", "region_accuracy", 1),
            ("pointing", 6, "G3", "region_head", 1.0e-3, 12, "choices", "choice_accuracy", 1),
            ("pairs", 14, "G4", "pair_head", 1.0e-3, 8, "classes", "class_accuracy", 2),
        )
    },
}  # fmt: skip

MODEL = {
    "vocab_size": 30, "max_position_embeddings": 16, "hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2,
    "intermediate_size": 32, "v_feature_size": FEATURES, "v_target_size": 5, "v_hidden_size": 16,
    "v_num_hidden_layers": 1, "v_num_attention_heads": 2, "v_intermediate_size": 16, "bi_hidden_size": 16,
    "bi_num_attention_heads": 2, "v_biattention_id": [0], "t_biattention_id": [2],
    "initializer_range": 0.3,
}  # fmt: skip


def configure(folder: Path, *overrides: str) -> RunConfig:
    """The configuration of a small run whose data lie in `folder` and whose run folder is `folder / "run"`."""
    if not (folder / "sheet.yaml").exists():
        build(folder)
        (folder / "rows.yaml").write_text(yaml.safe_dump(ROWS))
        run = {
            "name": "small", "model": MODEL, "data": str(folder / "sheet.yaml"), "task_rows": [str(folder / "rows.yaml")],
            "tasks": [*ROWS["tasks"]], "max_iterations": 6, "output": str(folder / "run"),
            "logging": {"every": 3, "console": "quiet"}, "optimizer": {"head_lr": None},
        }  # fmt: skip
        (folder / "run.yaml").write_text(yaml.safe_dump(run))
    return load(folder / "run.yaml", list(overrides))


def train(data: Path, output: Path, precision: str, *more: str) -> int:
    return main(["--config", str(data / "run.yaml"), f"output={output}", f"precision={precision}", *SETTINGS, *more])


def resume(folder: Path) -> int:
    return main(["--resume", str(folder)])
