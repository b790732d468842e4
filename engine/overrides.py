"""Where a run's values come from: a file, the files that it extends, a model preset, `key.path=value` overrides."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from engine.tasks import CONFIGS
from engine.yaml_files import KeyPath, dotted, fields_at, parse, read_mapping, unknown_key
from pipelines.errors import BadInput

MODELS = CONFIGS / "models"


@dataclass
class Sources:
    """Merged values, and for every key path the file or override that gave it."""

    file: Path
    data: dict[str, Any] = field(default_factory=dict)
    given_by: dict[KeyPath, object] = field(default_factory=dict)

    def origin(self, path: KeyPath) -> object:
        """What gave the value at `path`: the source of its longest known prefix, else the run's file."""
        for length in range(len(path), 0, -1):
            if path[:length] in self.given_by:
                return self.given_by[path[:length]]
        return self.file

    def merge(self, values: dict[str, Any], source: object, at: KeyPath = ()) -> None:
        """Lay `values` over what is there: mappings merge, everything else (a model's name too) replaces."""
        target = self.data
        for part in at:
            target = target.setdefault(str(part), {})
        for key, value in values.items():
            path, giver = (*at, key), source
            if path == ("model",) and isinstance(value, str):
                giver, value = model_preset(value, source)
                self._forget(path, target)
            if isinstance(value, dict) and isinstance(target.get(key, {}), dict):
                target.setdefault(key, {})
                self.given_by.setdefault(path, giver)
                self.merge(value, giver, path)
            else:
                self._forget(path, target)
                target[key] = value
                self.given_by[path] = giver

    def _forget(self, path: KeyPath, target: dict[str, Any]) -> None:
        target.pop(str(path[-1]), None)
        for known in [known for known in self.given_by if known[: len(path)] == path]:
            del self.given_by[known]


def gather(path: Path, overrides: list[str], model: type[BaseModel]) -> Sources:
    """Everything that describes a run, later sources over earlier ones. Raises BadInput."""
    sources = Sources(path)
    for file, values in reversed(_chain(path)):
        sources.merge(values, file)
    for override in overrides:
        keys, value = _split(override, model)
        for part in reversed(keys):
            value = {part: value}
        sources.merge(value, f"override {override}")
    return sources


def _chain(path: Path) -> list[tuple[Path, dict[str, Any]]]:
    """The file and those that it extends, nearest first."""
    chain: list[tuple[Path, dict[str, Any]]] = []
    seen: set[Path] = set()
    following: Path | None = path
    while following is not None:
        if following.resolve() in seen:
            raise BadInput(f"{chain[-1][0]}: extends", f"{following} extends this file in turn")
        seen.add(following.resolve())
        values = read_mapping(following)
        base = values.pop("extends", None)
        if base is not None and not isinstance(base, str):
            raise BadInput(f"{following}: extends", "not the name of a file")
        chain.append((following, values))
        following = following.parent / base if base else None
    return chain


def _split(override: str, model: type[BaseModel]) -> tuple[list[str], Any]:
    name, equals, text = override.partition("=")
    keys = name.strip().split(".")
    if not equals or not all(keys):
        raise BadInput(f"override {override}", "not of the form key=value, or key.path=value")
    for depth, key in enumerate(keys):
        valid = fields_at(model, tuple(keys[:depth]))
        if valid and key not in valid:
            raise BadInput(f"override {override}: {dotted(tuple(keys[: depth + 1]))}", unknown_key(key, valid))
    return keys, parse(text, f"override {override}")


def model_preset(name: str, source: object) -> tuple[Path, dict[str, Any]]:
    """File and keys of a model preset: a name in `configs/models`, or a path. Raises BadInput."""
    path = Path(name) if name.endswith((".yaml", ".yml")) else MODELS / f"{name}.yaml"
    if not path.is_file():
        presets = ", ".join(sorted(file.stem for file in MODELS.glob("*.yaml")))
        raise BadInput(f"{source}: model", f"no model preset or file {name}", f"presets: {presets}")
    return path, read_mapping(path)
