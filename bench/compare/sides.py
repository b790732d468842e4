"""Both sides of a comparison as processes, and what is asked of them."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from types import TracebackType
from typing import Any, Self

_SCRIPT = Path(__file__).with_name("side.py")
_TAIL = 2000
"""Characters of a dead side's last words that are shown."""


class SideFailed(RuntimeError):
    """A side raised or died; the text says which, at what, and how."""


class Side:
    """The parent's end of `side.py`. Use as a context manager: the process ends with it."""

    def __init__(self, label: str, checkout: Path) -> None:
        self.label = label
        self._said = tempfile.TemporaryFile()  # noqa: SIM115 - closed with the side
        # -P: the script's folder is no place to import from.
        self._process = subprocess.Popen(
            [sys.executable, "-P", str(_SCRIPT)], cwd=checkout, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=self._said, text=True, bufsize=1,
        )  # fmt: skip
        self._asked = "start"

    def ask(self, what: str, *arguments: Any) -> Any:
        """The answer. SideFailed where it raised or the process died."""
        self.send(what, *arguments)
        return self.receive()

    def send(self, what: str, *arguments: Any) -> None:
        """Only ask: `receive` waits for the answer."""
        self._asked = what
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps([what, *arguments]) + "\n")
        except OSError:
            raise self._death() from None

    def receive(self) -> Any:
        """The answer to what was asked last."""
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line.endswith("\n"):
            raise self._death()
        answered, answer = json.loads(line)
        if not answered:
            raise SideFailed(f"{self.label}: `{self._asked}` failed\n{answer.rstrip()}")
        return answer

    def _death(self) -> SideFailed:
        code = self._process.wait()
        why = "killed: out of memory? take a smaller model or batch" if code == -signal.SIGKILL else f"exit code {code}"
        self._said.seek(0)
        last_words = self._said.read().decode(errors="replace").strip()[-_TAIL:]
        return SideFailed(f"{self.label}: ended at `{self._asked}` ({why})" + (last_words and f"\n{last_words}"))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.kill()  # nothing of it is kept, and a step under way would take its time
        self._process.communicate()
        self._said.close()


class Pair:
    """BASE and HEAD, started together, then one at a time."""

    def __init__(self, base: Side, head: Side) -> None:
        self.sides = (base, head)

    def both(self, what: str, *arguments: Any) -> tuple[Any, Any]:
        """Asked of both at once; only for what is not timed."""
        for side in self.sides:
            side.send(what, *arguments)
        base, head = (side.receive() for side in self.sides)
        return base, head

    def visit(self, what: str, *arguments: Any, head_first: bool) -> tuple[Any, Any]:
        """Asked of one after the other: (answer of BASE, of HEAD)."""
        first, second = (1, 0) if head_first else (0, 1)
        answers = {first: self.sides[first].ask(what, *arguments)}
        answers[second] = self.sides[second].ask(what, *arguments)
        return answers[0], answers[1]
