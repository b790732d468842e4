"""Revisions side by side: git worktrees under build/compare/<commit>, kept from one comparison to the next.

A worktree counts once a marker beside it says so; what a kill left without one is removed by the next comparison. All share the
`build` folder of this checkout: libraries there are named by a digest of their sources and flags.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from pipelines.errors import BadInput

ROOT = Path(__file__).resolve().parents[2]
INTERFACE = "bench/ours.py"
"""What a revision needs to be driven by `side.py`."""
WORKTREE = (".", "WORKTREE")
_BUILD = "from kernels import native_library; native_library.available()"


@dataclass(frozen=True)
class Checkout:
    """A revision, ready to run."""

    name: str
    """As it was asked for."""
    commit: str
    """Short, with a + where files differ from it."""
    folder: Path
    changes: str = ""
    """Digest of what differs from the commit; empty where nothing does."""


class Repository:
    """The git repository of `root`. BadInput where there is no git, or no repository."""

    def __init__(self, root: Path = ROOT) -> None:
        self.root = root
        self._worktrees = root / "build/compare"
        self._git("rev-parse", "--git-dir", where=root, what="is no git checkout, so there are no revisions to compare")

    def resolve(self, name: str) -> str:
        """The full commit of a revision that can be compared. BadInput where there is none."""
        commit = self._git(
            "rev-parse", "--verify", "--quiet", "--end-of-options", f"{name}^{{commit}}", where=name,
            what="neither a file nor a revision of this repository",
            mend="a shallow clone has few: git fetch --unshallow --tags",
        )  # fmt: skip
        if not self._has(commit, INTERFACE):
            added = self._git("log", "--diff-filter=A", "--format=%h", "--reverse", "HEAD", "--", INTERFACE).split()
            since = f"the first revision that has it is {added[0]}" if added else "no revision before HEAD has it"
            raise BadInput(f"{name} ({commit[:7]})", f"has no {INTERFACE}, which steps for a comparison", since)
        return commit

    def checkout(self, name: str) -> Checkout:
        """The working tree as it is for "." and WORKTREE; else a worktree of the revision, made where there is none.

        Whatever stops this, Ctrl-C too, leaves no half of a worktree behind.
        """
        if name in WORKTREE:
            if not (self.root / INTERFACE).exists():
                raise BadInput(self.root, f"has no {INTERFACE}, which steps for a comparison")
            return Checkout(name, self.describe(self.root), self.root, self.changes())
        commit = self.resolve(name)
        folder = self._worktrees / commit[:12]
        with self._locked():
            self._remove_halves()
            if not _marker(folder).exists():
                self._add(folder, commit)
        if self._git("status", "--porcelain", "--untracked-files=no", at=folder):
            raise BadInput(
                folder,
                "the worktree of this revision was edited",
                f"git worktree remove --force {folder}; or compare with .",
            )
        return Checkout(name, self.describe(folder), folder)

    def changes(self) -> str:
        """Digest of everything in the working tree that differs from its commit; empty where nothing does."""
        difference = self._git("diff", "HEAD", "--binary")
        new = self._git("ls-files", "--others", "--exclude-standard").splitlines()
        if not difference and not new:
            return ""
        digest = hashlib.sha256(difference.encode())
        for path in new:
            digest.update(path.encode())
            if (self.root / path).is_file():
                digest.update((self.root / path).read_bytes())
        return digest.hexdigest()[:12]

    def built(self, checkout: Checkout) -> Path | None:
        """The marker that says that the checkout's native kernels were compiled; None where nothing may say so."""
        tree = _run(["git", "rev-parse", "--verify", "--quiet", "HEAD:kernels"], checkout.folder).stdout.strip()
        return None if checkout.changes or not tree else self._worktrees / f"kernels-{tree[:12]}.built"

    def build(self, checkout: Checkout) -> None:
        """Compile the native kernels where they are not there yet; where that fails, the side says so when it starts."""
        _run([sys.executable, "-c", _BUILD], checkout.folder)
        marker = self.built(checkout)
        if marker is not None:
            marker.parent.mkdir(parents=True, exist_ok=True)
            marker.touch()

    def _add(self, folder: Path, commit: str) -> None:
        try:
            self._git(
                "worktree", "add", "--detach", str(folder), commit, where=commit[:12], what="cannot be checked out"
            )
            build = folder / "build"
            if not build.exists():
                build.symlink_to(os.path.relpath(self.root / "build", folder))
            _marker(folder).touch()
        except BaseException:
            self._remove(folder)
            raise

    def _remove_halves(self) -> None:
        for folder in self._worktrees.glob("[0-9a-f]*"):
            if folder.is_dir() and not _marker(folder).exists():
                self._remove(folder)
        for marker in self._worktrees.glob("*.ready"):
            if not marker.with_suffix("").is_dir():  # somebody removed the worktree
                marker.unlink()
        self._git("worktree", "prune")

    def _remove(self, folder: Path) -> None:
        _marker(folder).unlink(missing_ok=True)
        if (folder / "build").is_symlink():  # what it points to is not the worktree's
            (folder / "build").unlink()
        # Twice --force: a worktree that was being made is locked.
        _run(["git", "worktree", "remove", "--force", "--force", str(folder)], self.root)
        shutil.rmtree(folder, ignore_errors=True)
        _run(["git", "worktree", "prune"], self.root)

    @contextmanager
    def _locked(self) -> Iterator[None]:
        self._worktrees.mkdir(parents=True, exist_ok=True)
        with (self._worktrees / ".lock").open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def _has(self, commit: str, path: str) -> bool:
        return _run(["git", "cat-file", "-e", f"{commit}:{path}"], self.root).returncode == 0

    def describe(self, folder: Path | None = None) -> str:
        """Short commit of a checkout, with a + where files differ from it."""
        return self._git("describe", "--always", "--dirty=+", "--exclude=*", at=folder)

    def _git(
        self, *arguments: str, at: Path | None = None, where: object = "git", what: str = "", mend: str = ""
    ) -> str:
        try:
            done = _run(["git", *arguments], at or self.root)
        except FileNotFoundError:
            raise BadInput(
                "git", "is not installed, so there are no revisions to compare", "compare two files"
            ) from None
        if done.returncode:
            said = (done.stderr.strip().splitlines() or ["git failed"])[-1]
            raise BadInput(where, f"{what}: {said}" if what else f"git {arguments[0]}: {said}", mend)
        return done.stdout.strip()


def _marker(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}.ready")


def _run(command: Sequence[str], folder: Path) -> subprocess.CompletedProcess[str]:
    # In a session of its own: Ctrl-C must find this process only, which then cleans up.
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False, start_new_session=True)
