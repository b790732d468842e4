"""Worktrees of a small repository: made once, whole or not at all, and what is said where there can be none."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from bench.compare.revisions import Repository
from pipelines.errors import BadInput
from tests.bench.small_revisions import Revisions


@pytest.fixture
def small(tmp_path: Path) -> Revisions:
    return Revisions(tmp_path / "repository")


def test_revisions_lie_side_by_side_and_are_kept(small: Revisions) -> None:
    other = small.change("LAUNCHES, LOSS = 0.0015, 7, 3", "LAUNCHES, LOSS = 0.0015, 7, 4")
    repository = Repository(small.folder)
    base, head = repository.checkout(small.first), repository.checkout(other)
    assert "7, 3" in (base.folder / "bench/ours.py").read_text()
    assert "7, 4" in (head.folder / "bench/ours.py").read_text()
    assert base.folder.parent == head.folder.parent == small.folder / "build/compare"
    assert (base.folder / "build").resolve() == small.folder / "build", "libraries are shared"
    assert small.first.startswith(base.commit) and not base.changes
    made = head.folder.stat().st_ino
    assert repository.checkout(other) == head and head.folder.stat().st_ino == made
    assert sorted(small.worktrees()) == sorted([small.first[:12], other[:12]])
    assert not small.git("status", "--porcelain")


def test_the_working_tree_is_taken_as_it_is(small: Revisions) -> None:
    repository = Repository(small.folder)
    clean = repository.checkout(".")
    assert clean.folder == small.folder and not clean.changes and not clean.commit.endswith("+")
    small.edit("LOSS = ", "LOSS =  ")
    dirty = repository.checkout("WORKTREE")
    assert dirty.commit.endswith("+") and dirty.changes
    (small.folder / "new.py").write_text("1\n")
    assert repository.checkout(".").changes != dirty.changes, "new files count"


def test_ctrl_c_leaves_nothing_behind(small: Revisions, monkeypatch: pytest.MonkeyPatch) -> None:
    repository = Repository(small.folder)

    def interrupted(*arguments: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Path, "symlink_to", interrupted)  # the worktree is there, its marker is not
        with pytest.raises(KeyboardInterrupt):
            repository.checkout(small.first)
    assert not small.worktrees() and not (small.folder / "build/compare" / small.first[:12]).exists()
    assert repository.checkout(small.first).folder.is_dir()


def test_what_a_kill_left_is_made_anew(small: Revisions) -> None:
    repository = Repository(small.folder)
    folder = repository.checkout(small.first).folder
    folder.with_name(f"{folder.name}.ready").unlink()
    (folder / "bench/ours.py").unlink()
    assert (repository.checkout(small.first).folder / "bench/ours.py").exists()
    shutil.rmtree(folder)  # by hand, while git still knows it
    assert (repository.checkout(small.first).folder / "bench/ours.py").exists()


def test_what_cannot_be_compared_is_said(small: Revisions, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    repository = Repository(small.folder)
    with pytest.raises(BadInput, match="no-such: neither a file nor a revision"):
        repository.checkout("no-such")
    with pytest.raises(BadInput, match="--upload-pack: neither"):
        repository.checkout("--upload-pack")
    with pytest.raises(BadInput, match=f"has no bench/ours.py.*first revision that has it is {small.first[:7]}"):
        repository.checkout(small.empty)
    assert not small.worktrees()
    folder = repository.checkout(small.first).folder
    (folder / "bench/ours.py").write_text("edited")
    with pytest.raises(BadInput, match="was edited"):
        repository.checkout(small.first)
    with pytest.raises(BadInput, match="is no git checkout"):
        Repository(tmp_path)
    monkeypatch.setenv("PATH", "")
    with pytest.raises(BadInput, match="is not installed"):
        Repository(small.folder)
