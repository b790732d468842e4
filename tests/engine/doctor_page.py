"""Reading the doctor's page in tests."""

from __future__ import annotations

import pytest

from engine.doctor.__main__ import main


def page_of(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    capsys.readouterr()
    assert main(arguments) in (0, 1)
    return capsys.readouterr().out


def line_of(text: str, what: str) -> str:
    """A line of the plain page, with its mend."""
    lines = text.splitlines()
    found = [n for n, line in enumerate(lines) if line[9:].startswith(what)]
    assert found, text
    mend = lines[found[0] + 1]
    return lines[found[0]] + (mend if "mend: " in mend else "")
