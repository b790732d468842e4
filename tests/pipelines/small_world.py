"""One small embedded world for all tests that look at it, built on first use."""

from __future__ import annotations

import tempfile
from functools import lru_cache
from pathlib import Path
from typing import Any

import yaml

from pipelines.examples import Example
from pipelines.sheet import Sheet, load_sheet
from pipelines.world import build
from pipelines.world.plan import Plan, draw_plan
from tests.reference import ROOT

TASKS: dict[str, dict[str, Any]] = yaml.safe_load((ROOT / "configs" / "tasks.yaml").read_text())["tasks"]
SPLITS = ("train", "val", "test")
SEED = 3
_folder = tempfile.TemporaryDirectory(prefix="stopgo-world-")  # goes when the interpreter does


@lru_cache(maxsize=1)
def world() -> Path:
    """Its folder."""
    return build(Path(_folder.name) / "small", seed=SEED, size="small").parent


@lru_cache(maxsize=1)
def plan() -> Plan:
    """What it was built from."""
    return draw_plan(SEED, "small")


@lru_cache(maxsize=1)
def sheet() -> Sheet:
    """Its data sheet."""
    return load_sheet(world() / "sheet.yaml")


@lru_cache(maxsize=64)
def examples(name: str, split: str) -> list[Example]:
    """What the task's reader reads."""
    return list(sheet().examples(name, split, TASKS[name]["reader"]))
