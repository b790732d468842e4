"""The tables of the READMEs hold what was measured, to the last digit."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bench import tables
from bench.tables import ROOT, TABLES, Shown, main, replaced
from pipelines.errors import BadInput


@pytest.mark.parametrize("shown", TABLES, ids=lambda shown: shown.lines.__name__)
def test_a_readme_says_what_was_measured(shown: Shown) -> None:
    """Measured again, it has to be written again: `python -m bench.tables --write`."""
    assert "\n".join(shown.made()) + "\n" in (ROOT / shown.readme).read_text()


def test_a_table_takes_the_place_of_one_that_begins_alike(tmp_path: Path) -> None:
    text = "before\n\n| a | b |\n|---|---|\n| 1 | 2 |\n\nafter | here\n"
    lines = ["| a | b |", "|---|---|", "| 3 | 4 |", "| 5 | 6 |"]
    assert replaced(text, lines, tmp_path) == "before\n\n" + "\n".join(lines) + "\n\nafter | here\n"
    with pytest.raises(BadInput, match="no table that begins"):
        replaced("nothing", lines, tmp_path)


@pytest.mark.parametrize("content", [None, "{", "[]", '{"tasks": {"vqa": 1}}'])
def test_a_result_that_is_none_is_named(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "profile.json").write_text(content)
    with pytest.raises(BadInput, match="profile.json"):
        Shown("bench/README.md", ("profile.json",), tables.profile).made(tmp_path)


def test_a_number_that_changed_shows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = json.loads((tables.RESULTS / "plan.json").read_text())
    runs = json.loads((tables.RESULTS / "plan_ranks.json").read_text())
    before = list(tables.plan(found, runs))
    for check in found["checks"]:
        check["ratio"] *= 1.1
    assert list(tables.plan(found, runs)) != before


def test_writing_changes_the_table_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old = "# Title\n\n| run | predicted over measured, geometric mean | tasks |\n|---|\n| old | 1 |\n\nend\n"
    (tmp_path / "README.md").write_text(old)
    monkeypatch.setattr(tables, "ROOT", tmp_path)
    monkeypatch.setattr(tables, "TABLES", (Shown("README.md", ("plan.json", "plan_ranks.json"), tables.plan),))
    assert main(["--write"]) == 0
    text = (tmp_path / "README.md").read_text()
    assert text.startswith("# Title\n\n| run |") and text.endswith("12 tasks | 0.88 | 0.68 to 1.03 |\n\nend\n")
