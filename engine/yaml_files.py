"""YAML in, checked models out: safe loading, YAML 1.2 numbers, and errors that name the file and the key path."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError

from pipelines.errors import BadInput

Model = TypeVar("Model", bound=BaseModel)
KeyPath = tuple[str | int, ...]


class _Loader(yaml.SafeLoader):
    """SafeLoader that reads `4e-5` as a number (PyYAML knows YAML 1.1 only) and refuses a key given twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key!r} is given twice", key_node.start_mark
                )
            seen.add(key)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)[eE][-+]?[0-9]+$"),
    list("-+.0123456789"),
)


def parse(text: str, where: object) -> Any:
    """The value of a YAML text. Raises BadInput(where) with the line where the text is no YAML."""
    try:
        return yaml.load(text, Loader=_Loader)  # noqa: S506 - _Loader is a SafeLoader
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f" in line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise BadInput(where, f"no valid YAML{place}: {getattr(error, 'problem', None) or error}") from None


def read_mapping(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file; an empty file is an empty mapping. Raises BadInput."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise BadInput(path, "no such file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(path, f"cannot be read: {error}") from None
    data = parse(text, path)
    if data is None:
        return {}
    if not isinstance(data, dict) or not all(isinstance(key, str) for key in data):
        raise BadInput(path, "not a mapping of names to values")
    return data


def validated(model: type[Model], data: Mapping[str, Any], origin: Callable[[KeyPath], object]) -> Model:
    """`model` made of `data`.

    Raises BadInput with one line per wrong key: where it came from (`origin` of its key path), the path, what is wrong,
    and the nearest valid key for an unknown one.
    """
    try:
        return model.model_validate(data)
    except ValidationError as error:
        raise _bad_input(model, data, error, origin) from None


def _bad_input(
    model: type[BaseModel], data: Mapping[str, Any], error: ValidationError, origin: Callable[[KeyPath], object]
) -> BadInput:
    problems: dict[KeyPath, list[str]] = {}
    for item in error.errors():
        path = _path_in(data, item["loc"]) if item["type"] not in ("extra_forbidden", "missing") else item["loc"]
        message = _message(model, item["type"], item["loc"], item["msg"])
        if message not in problems.setdefault(path, []):  # a union of types gives one error per type
            problems[path].append(message)
    lines = [
        (f"{origin(path)}: {dotted(path)}".removesuffix(": "), " or ".join(what)) for path, what in problems.items()
    ]
    if len(lines) == 1:
        return BadInput(*lines[0])
    head, *rest = lines
    return BadInput(head[0], "\n       ".join([head[1], *(f"{where}: {what}" for where, what in rest)]))


def _message(model: type[BaseModel], kind: str, loc: KeyPath, text: str) -> str:
    if kind == "extra_forbidden":
        return unknown_key(str(loc[-1]), fields_at(model, loc[:-1]))
    if kind == "missing":
        return "this key is required"
    if kind == "model_type":
        return f"needs a mapping of keys: {', '.join(fields_at(model, loc))}"
    if kind == "tuple_type":
        return "needs a list"
    return text.removeprefix("Value error, ")


def unknown_key(key: str, valid: list[str]) -> str:
    """What to say of a key that does not exist: the nearest valid one, or all of them."""
    near = difflib.get_close_matches(key, valid, n=1)
    return f"unknown key; did you mean {near[0]}?" if near else f"unknown key; valid are {', '.join(sorted(valid))}"


def fields_at(model: type[BaseModel], path: KeyPath) -> list[str]:
    """Names of the fields of the model found by walking `path` through `model`; empty where no model is there."""
    annotation: Any = model
    for part in path:
        current = _model_in(annotation)
        if current is not None:
            field = current.model_fields.get(str(part))
            annotation = field.annotation if field else None
        else:
            annotation = get_args(annotation)[-1] if get_origin(annotation) is dict else None
    current = _model_in(annotation)
    return list(current.model_fields) if current else []


def _model_in(annotation: Any) -> type[BaseModel] | None:
    """The model that a value of this type is, itself or as a member of a union."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    members = () if get_origin(annotation) is dict else get_args(annotation)
    return next((found for member in members if (found := _model_in(member))), None)


def _path_in(data: Any, loc: KeyPath) -> KeyPath:
    """The part of a pydantic location that is a path through the data (the rest names members of unions)."""
    path: list[str | int] = []
    for part in loc:
        try:
            data = data[part]
        except (KeyError, IndexError, TypeError):
            break
        path.append(part)
    return tuple(path)


def dotted(path: KeyPath) -> str:
    """`("a", "b", 0)` -> `a.b.0`."""
    return ".".join(map(str, path))
