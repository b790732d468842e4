"""From what is known to one HTML file: no script, nothing fetched, every text escaped, and a policy that says so."""

from __future__ import annotations

import base64
import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from engine.report.experiment_page import ExperimentPage
from engine.report.gallery import Look, TaskCards
from engine.report.journal_page import JournalPage
from engine.report.overlap_page import Overlap
from engine.report.pictures import Album

MOST_BYTES = 10 << 20
"""Of a page."""

GROUPS = {
    "G1": "Vocabulary-based question answering",
    "G2": "Image retrieval",
    "G3": "Referring expressions",
    "G4": "Multi-modal verification",
}
"""What the paper calls its groups (section 2.1)."""


@dataclass(frozen=True)
class Seen:
    """What was asked of a run's model."""

    album: Album
    tasks: tuple[TaskCards, ...] = ()
    looks: tuple[Look, ...] = ()
    checkpoint: str = ""
    split: str = "val"
    note: str = ""
    """Why there are no pictures."""

    @property
    def groups(self) -> list[tuple[str, list[TaskCards]]]:
        """Tasks by the paper's groups."""
        groups: dict[str, list[TaskCards]] = {}
        for task in self.tasks:
            groups.setdefault(task.row.group, []).append(task)
        return list(groups.items())


def run_html(page: JournalPage, seen: Seen, overlap: Overlap | None, overlap_note: str) -> str:
    """The page of a run."""
    return _render("run.html", page=page, seen=seen, overlap=overlap, overlap_note=overlap_note, title=page.name)


def experiment_html(page: ExperimentPage, run: JournalPage | None, seen: Seen) -> str:
    """The page of an experiment, with the pictures of one run."""
    return _render("experiment.html", page=page, run=run, seen=seen, title=page.name)


def _render(template: str, seen: Seen, **values: Any) -> str:
    environment = Environment(
        loader=PackageLoader("engine.report", "templates"), autoescape=True, undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    environment.filters.update(percent=_percent, number=_number, share=_share, group_name=_group_name)
    style = environment.get_template("style.css").render()
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    return environment.get_template(template).render(
        **values, seen=seen, album=seen.album, style=Markup(style), style_hash=digest
    )


def _group_name(group: str) -> str:
    return f"{group}: {GROUPS[group]}" if group in GROUPS else group


def _percent(share: float | None, digits: int = 1) -> str:
    return "–" if share is None else f"{100 * share:.{digits}f}"


def _share(share: float | None) -> str:
    return "–" if share is None else f"{100 * share:.1f} %"


def _number(value: Any) -> str:
    """A cell of a table: whole numbers with thousands, others with what they have, up to four digits."""
    if value is None:
        return "–"
    if isinstance(value, bool | str):
        return str(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:,.4g}" if abs(value) >= 1000 else f"{value:.2f}"


def too_large(html: str, path: Path) -> str | None:
    """A warning for a page that is larger than one would pass on."""
    size = len(html.encode())
    return f"{path}: {size / 2**20:.1f} MiB, more than {MOST_BYTES >> 20}" if size > MOST_BYTES else None
