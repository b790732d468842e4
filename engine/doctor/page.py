"""The page: a line for each thing, its mend below it. In colour on a terminal, the same as plain text where it is piped."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from io import TextIOWrapper

from engine.doctor.lines import Line

Sections = Mapping[str, Sequence[Line]]
_STYLES = {"good": "green", "note": "yellow", "problem": "bold red"}
_STATE, _MEND = 7, "mend: "
_WIDEST = 17
"""Of the column that says what a line is about."""


def show(sections: Sections) -> None:
    """Print the page to stdout."""
    if isinstance(sys.stdout, TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # paths and terminals may know other letters
    if sys.stdout.isatty():
        try:
            _show_in_colour(sections)
            return
        except ImportError:  # no rich: the page itself says that packages are missing
            pass
    print(plain(sections))


def plain(sections: Sections) -> str:
    """As text, a line for each line, however long."""
    width = _width(sections)
    told: list[str] = []
    for title, lines in sections.items():
        told += ["", title] if told else [title]
        for line in lines:
            told.append(f"{line.state:{_STATE}}  {line.what:{width}}  {line.value}")
            if line.mend:
                told.append(f"{'':{_STATE}}  {'':{width}}  {_MEND}{line.mend}")
    return "\n".join([*told, "", summary(sections)])


def summary(sections: Sections) -> str:
    """How many notes and problems there are."""
    states = [line.state for lines in sections.values() for line in lines]
    counts = {"problem": states.count("problem"), "note": states.count("note")}
    told = [f"{count} {name}{'s' * (count > 1)}" for name, count in counts.items() if count]
    return ", ".join(told) or "no problems"


def _show_in_colour(sections: Sections) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(highlight=False)
    for title, lines in sections.items():
        table = Table.grid(padding=(0, 2, 0, 0))
        table.add_column(width=_STATE)
        table.add_column(width=_width(sections))
        table.add_column(overflow="fold")
        for line in lines:
            value = Text(line.value)
            if line.mend:
                value.append(f"\n{_MEND}", style="dim").append(line.mend, style="bold")
            table.add_row(Text(line.state, style=_STYLES[line.state]), Text(line.what), value)
        console.print(Text(title, style="bold"))
        console.print(table)
        console.print()
    console.print(Text(summary(sections)))


def _width(sections: Sections) -> int:
    return min(_WIDEST, max((len(line.what) for lines in sections.values() for line in lines), default=0))
