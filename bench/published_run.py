"""Overrides that make the published run a benchmark: its model, precision and threads. Imports no torch."""

from __future__ import annotations

from engine.overrides import model_preset
from engine.tasks import CONFIGS, load_table

RUN = CONFIGS / "runs/twelve_in_one.yaml"
"""Optimizer, task tokens and sharing are those of the published run."""


def overrides(model: str, precision: str, threads: int | None) -> list[str]:
    """`model`: a preset of configs/models, or a file. BadInput where there is none."""
    found = [f"model={model}", f"precision={precision}"]
    longest = max(row.max_tokens for row in load_table().default_tasks())
    _, preset = model_preset(model, "--model")
    if preset.get("max_position_embeddings", longest) < longest:  # a small model made for short texts
        found.append(f"model.max_position_embeddings={longest}")
    return [*found, *([f"threads={threads}"] if threads else [])]
