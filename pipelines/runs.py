"""What a run asks of its data, read from its YAML files without the engine: sheet, tasks, lengths, model sizes.

Only the keys named here are looked at; `engine.config` validates a run as a whole.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from pipelines.datasets import DataSpec
from pipelines.errors import BadInput

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
TASK_TABLE = CONFIGS / "tasks.yaml"


@dataclass(frozen=True)
class RunData:
    """The data side of a run."""

    sheet: Path | None
    """None: the embedded world, at `world`."""
    world: Mapping[str, Any]
    """path, seed, size: what the run says of the embedded world."""
    specs: tuple[DataSpec, ...]
    vocab_size: int | None = None
    """Rows of the model's word table, where the run names a model."""
    feature_size: int | None = None


def read_run(path: Path, table: Path = TASK_TABLE, tasks: Sequence[str] | None = None) -> RunData:
    """From a data sheet (it has `sets`) or a run configuration (it has none). Raises BadInput naming file and key.

    `tasks` limits it to these; by default a sheet stands for all tasks that it has data for.
    """
    keys = _with_bases(path, ())
    files = [table, *(Path(str(file)) for file in keys.get("task_rows") or ())]
    specs = _specs(files)
    if "sets" in keys:
        chosen = list(tasks) if tasks else [str(name) for name in _mapping(path, "sets", keys["sets"])]
        return RunData(path, {}, _choose(path, specs, chosen))
    default = [name for name, (_, by_default) in specs.items() if by_default]
    named = keys.get("tasks", "all")
    configured = default if named == "all" else [str(name) for name in _sequence(path, "tasks", named)]
    chosen = list(tasks) if tasks else configured
    overrides = _mapping(path, "task_overrides", keys.get("task_overrides") or {})
    data = str(keys.get("data", "world"))
    model = _model(path, keys.get("model"))
    return RunData(
        sheet=None if data == "world" else Path(data),
        world=_mapping(path, "world", keys.get("world") or {}),
        specs=tuple(_overridden(spec, overrides.get(spec.name)) for spec in _choose(path, specs, chosen)),
        vocab_size=model.get("vocab_size", 30522) if model else None,
        feature_size=model.get("v_feature_size", 2048) if model else None,
    )


def data_sheet(run: RunData) -> Path:
    """The run's data sheet; that of the embedded world is built if it is not there."""
    if run.sheet is not None:
        return run.sheet
    from pipelines.world import ensure  # rendering and its libraries only where a run wants them

    keys = run.world
    return ensure(Path(str(keys.get("path", ".world"))), int(keys.get("seed", 0)), str(keys.get("size", "default")))


def _with_bases(path: Path, seen: tuple[Path, ...]) -> dict[str, Any]:
    """A run's top-level keys over those of the files that it extends."""
    if path.resolve() in seen:
        raise BadInput(f"{path}: extends", "this file extends itself")
    keys = _mapping(path, "", _read(path))
    if "extends" not in keys:
        return keys
    base = _with_bases(path.parent / str(keys.pop("extends")), (*seen, path.resolve()))
    merged = {
        key: base[key] | value
        for key, value in keys.items()
        if isinstance(value, dict) and isinstance(base.get(key), dict)
    }
    return base | keys | merged


def _read(path: Path) -> Any:
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise BadInput(path, "no such file", "check the path") from error
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise BadInput(path, "not a readable YAML file: " + " ".join(str(error).split())) from error


def _specs(files: Sequence[Path]) -> dict[str, tuple[DataSpec, bool]]:
    """Every task's spec by name, and whether it belongs to `tasks: all`."""
    heads: dict[str, Any] = {}
    rows: dict[str, tuple[Path, Any]] = {}
    for file in files:
        content = _mapping(file, "", _read(file))
        heads |= _mapping(file, "heads", content.get("heads") or {})
        rows |= {str(name): (file, row) for name, row in _mapping(file, "tasks", content.get("tasks") or {}).items()}
    return {name: (_spec(file, name, row, heads), bool(row.get("default", True))) for name, (file, row) in rows.items()}


def _spec(file: Path, name: str, row: Any, heads: Mapping[str, Any]) -> DataSpec:
    where = f"{file}: tasks.{name}"
    keys = _mapping(file, f"tasks.{name}", row)
    try:
        head = _mapping(file, f"heads.{keys['head']}", heads[keys["head"]])
        return DataSpec(
            name=name,
            reader=str(keys["reader"]),
            number=int(keys["number"]),
            max_tokens=int(keys["max_tokens"]),
            max_regions=int(keys["max_regions"]),
            images=int(keys.get("images", 1)),
            target=keys["loss"],
            options=int(head.get("options", 1)),
        )
    except KeyError as error:
        raise BadInput(where, f"needs {error}", "see the head of configs/tasks.yaml") from error
    except (TypeError, ValueError) as error:
        raise BadInput(where, str(error)) from error


def _choose(path: Path, specs: Mapping[str, tuple[DataSpec, bool]], names: Sequence[str]) -> tuple[DataSpec, ...]:
    for name in names:
        if name not in specs:
            raise BadInput(path, f"no task {name!r} in the task table", f"it has {', '.join(specs)}")
    return tuple(specs[name][0] for name in names)


def _overridden(spec: DataSpec, override: Any) -> DataSpec:
    keys = override or {}
    return replace(
        spec,
        max_tokens=int(keys.get("max_tokens", spec.max_tokens)),
        max_regions=int(keys.get("max_regions", spec.max_regions)),
    )


def _model(path: Path, model: Any) -> Mapping[str, Any]:
    """The model's keys: given in the run, or in the preset or file that it names."""
    if model is None or isinstance(model, dict):
        return model or {}
    name = str(model)
    file = Path(name) if name.endswith((".yaml", ".yml")) else CONFIGS / "models" / f"{name}.yaml"
    if not file.is_file():
        raise BadInput(f"{path}: model", f"no model preset or file {name}")
    return _mapping(file, "", _read(file))


def _mapping(path: Path, key: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise BadInput(f"{path}: {key}" if key else path, "a mapping is wanted here")
    return value


def _sequence(path: Path, key: str, value: Any) -> list[Any]:
    if not isinstance(value, list):
        raise BadInput(f"{path}: {key}", "a list is wanted here")
    return value
