"""A git repository of a few files that bench.compare can drive: steps that only wait, so that a comparison takes seconds."""

from __future__ import annotations

import subprocess
from pathlib import Path

FILES = {
    ".gitignore": "/build/\n__pycache__/\n",
    "engine/__init__.py": "",
    "engine/assembly.py": """
from types import SimpleNamespace
def device_of(run):
    return SimpleNamespace(type="cpu")
""",
    "engine/config.py": """
class Run:
    threads = 1
    def __init__(self, told): self.told = told
    def model_dump_json(self): return str(self.told)
def load(file, overrides): return Run(overrides)
""",
    "engine/tasks.py": """
class Table:
    def row(self, name): return name
def load_table(): return Table()
""",
    "kernels/__init__.py": "",
    "kernels/native_library.py": """
def available():
    open("../compiled", "a").write("x")  # beside the worktrees
""",
    "bench/__init__.py": "",
    "bench/timing.py": """
def conditions(device): return {"device": "test", "torch": "0"}
""",
    "bench/provider.py": """
def Setting(run, batch, device): return batch
""",
    "bench/ours.py": """
import random, time
from types import SimpleNamespace
SECONDS, REAL, LAUNCHES, LOSS = 0.0015, 7, 3, 1.0
LUCK = random.gauss(0, 0.002)
class Ours:
    def __init__(self, batch): pass
    def prepare(self, row, turn):
        self.row = row
        return SimpleNamespace(rows=REAL + 1, real=REAL)
    def step(self):
        print("a revision may print")
        until = time.perf_counter() + SECONDS * (1 + LUCK)
        while time.perf_counter() < until:
            pass
        return SimpleNamespace(loss=LOSS)
    def count(self):
        return {"launches": LAUNCHES, "minor_faults": random.randrange(10**9), "ops": {"add": LAUNCHES - 1, "mul": 1}}
""",
}


class Revisions:
    """The repository; every commit replaces texts in files of the first one."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True)
        self.git("init", "-q")
        (folder / "README").write_text("nothing yet\n")
        self.empty = self._commit("empty")
        for name, text in FILES.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(text)
        self.first = self._commit("first")

    def change(self, old: str, new: str, file: str = "bench/ours.py") -> str:
        """A commit on top of where we are, and back to the first one."""
        self.edit(old, new, file)
        commit = self._commit(new)
        self.git("checkout", "-q", self.first)
        return commit

    def edit(self, old: str, new: str, file: str = "bench/ours.py") -> None:
        """Without a commit."""
        path = self.folder / file
        text = path.read_text()
        assert old in text
        path.write_text(text.replace(old, new))

    def worktrees(self) -> list[str]:
        """What git knows of, without the checkout itself."""
        lines = self.git("worktree", "list", "--porcelain").splitlines()
        return [line.split("/")[-1] for line in lines if line.startswith("worktree ")][1:]

    def git(self, *arguments: str) -> str:
        who = ("-c", "user.name=test", "-c", "user.email=test@test", "-c", "commit.gpgsign=false")
        done = subprocess.run(["git", *who, *arguments], cwd=self.folder, capture_output=True, text=True, check=True)
        return done.stdout.strip()

    def _commit(self, message: str) -> str:
        self.git("add", "-A")
        self.git("commit", "-q", "-m", message)
        return self.git("rev-parse", "HEAD")
