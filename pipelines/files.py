"""Opening published files: gzip read transparently, and every complaint names the file and the place in it."""

from __future__ import annotations

import gzip
import json
import os
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from pipelines.errors import BadInput

_GZIP_MAGIC = b"\x1f\x8b"


@contextmanager
def open_text(path: Path) -> Iterator[TextIO]:
    """The file as UTF-8 text, unpacked if it is gzip (told by its first bytes: names like `.gzip` exist).

    Raises `BadInput` where it is missing, not UTF-8, or a truncated archive, also while it is being read.
    """
    try:
        with open(path, "rb") as raw:
            packed = raw.read(2) == _GZIP_MAGIC
            raw.seek(0)
            if packed:
                with gzip.open(raw, "rt", encoding="utf-8") as text:
                    yield text
            else:
                with open(path, encoding="utf-8") as text:
                    yield text
    except FileNotFoundError:
        raise BadInput(path, "no such file", "check the path in the configuration") from None
    except UnicodeDecodeError as error:
        raise BadInput(path, f"not UTF-8 text (byte {error.start}: {error.reason})", "is this the file?") from None
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise BadInput(path, f"the gzip archive is truncated or damaged ({error})", "fetch it again") from None
    except OSError as error:
        raise BadInput(path, f"cannot be read: {error.strerror}", "check the path and its permissions") from None


def lines(path: Path) -> Iterator[tuple[int, str]]:
    """(line number from 1, line without its end) of every line, empty ones included. Raises as `open_text`."""
    with open_text(path) as text:
        for number, line in enumerate(text, 1):
            yield number, line.rstrip("\n")


def open_json(path: Path) -> Any:
    """The value in a JSON file, gzip or not. Raises `BadInput` with line and column where the JSON ends or breaks."""
    with open_text(path) as text:
        content = text.read()
    return _parse(content, path)


def json_lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line number from 1, object) of a file with one JSON object a line; blank lines are skipped.

    Raises `BadInput` naming file and line where a line is no JSON object.
    """
    for number, line in lines(path):
        if line.strip():
            value = _parse(line, f"{path}:{number}")
            if not isinstance(value, dict):
                raise BadInput(f"{path}:{number}", f"a JSON object is expected, not {kind_name(value)}")
            yield number, value


def kind_name(value: object) -> str:
    """What JSON calls the type of a value, for messages."""
    names = {dict: "an object", list: "a list", str: "a text", bool: "a truth value", type(None): "null"}
    return names.get(type(value), "a number" if isinstance(value, int | float) else type(value).__name__)


def write_atomic(path: Path, content: bytes) -> None:
    """Write `content` to `path` so that a crash leaves the old file or the new one, never a part."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _parse(content: str, where: object) -> Any:
    try:
        return json.loads(content)
    except json.JSONDecodeError as error:
        at = f"line {error.lineno}, column {error.colno}"
        raise BadInput(where, f"malformed or truncated JSON at {at}: {error.msg}", "fetch it again") from None
    except RecursionError:
        raise BadInput(where, "JSON nested too deeply", "is it the right file?") from None


def sync(path: Path) -> None:
    """Force a file, or a folder's entries, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
