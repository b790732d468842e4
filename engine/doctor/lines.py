"""What the doctor says, line by line, and the probes that say it. A probe that fails is a line itself."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pipelines.errors import BadInput

if TYPE_CHECKING:
    from engine.config import RunConfig

State = Literal["good", "note", "problem"]
"""note: it costs something, or will where more is asked for. problem: a run fails, or loses much of its speed."""


@dataclass(frozen=True)
class Line:
    """One thing that was looked at. Notes and problems, and only these, have a mend."""

    what: str
    value: str
    state: State = "good"
    mend: str = ""
    """What to type."""

    def __post_init__(self) -> None:
        if (self.state == "good") == bool(self.mend):
            raise ValueError(f"{self.what}: {self.state}, with the mend {self.mend!r}")

    def as_json(self) -> dict[str, str]:
        """The same as data."""
        return asdict(self)


@dataclass(frozen=True)
class Asked:
    """What the doctor was asked to look at."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    config: RunConfig | None = None
    config_path: Path | None = None
    run: Path | None = None
    build: bool = False
    """Compile what is not built yet."""
    debug: bool = False
    """Show the tracebacks of probes that fail, on stderr."""


Probe = Callable[[Asked], Iterable[Line]]


def examine(
    probes: Mapping[str, Probe], asked: Asked, looking_at: Callable[[str], None] = lambda name: None
) -> list[Line]:
    """The lines of all probes in order. Never raises what a probe raises. `looking_at` is told which one is at work."""
    found: list[Line] = []
    for name, probe in probes.items():
        looking_at(name)
        try:
            for line in probe(asked):
                found.append(line)  # one by one: what was found before a probe fails stays
        except Exception as error:  # noqa: BLE001 - whatever it is, the other probes still have something to say
            if asked.debug:
                traceback.print_exc(file=sys.stderr)
            found.append(failed(name, error))
    return found


def failed(name: str, error: Exception) -> Line:
    """What there is to say of a probe that failed."""
    if isinstance(error, BadInput):
        return of_bad_input(name, error)
    if isinstance(error, ImportError):
        return Line(name, f"cannot be told: {error}", "problem", "make setup")
    reason = (str(error).strip().splitlines() or [""])[0]
    return Line(name, f"cannot be told: {type(error).__name__}: {reason}", "note", "stopgo doctor --debug")


def of_bad_input(what: str, error: BadInput, mend: str = "") -> Line:
    """A problem that some part of the project has named. `mend`: what to type, where the error itself only describes it."""
    value = f"{error.where}: {error.what}"
    if mend and error.mend:
        value += f" ({error.mend})"
    return Line(what, value, "problem", mend or error.mend or "stopgo doctor --debug")


def short(path: Path) -> str:
    """A path as one would type it here."""
    beside = os.path.relpath(path)
    return str(path) if beside.startswith("..") else beside


def gib(count: float) -> str:
    """A number of bytes for people."""
    for size, unit in ((2**40, "TiB"), (2**30, "GiB"), (2**20, "MiB")):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count / 2**10:.0f} KiB"
