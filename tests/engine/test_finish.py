"""How a rank ends: `engine.ranks.finish`."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from engine.ranks import finish, join, leave
from tests.engine.on_ranks import launch
from tests.reference import ROOT

COLLECTIVES = 300
KEPT: list[object] = []
"""Libraries keep process groups, so that their threads outlive `leave`."""


def main() -> None:
    """A rank whose last collectives, and the tensors that they hold, are still with gloo's threads when it ends."""
    how, folder = [argument for argument in sys.argv[1:] if not argument.startswith("--local_rank")]
    ranks = join(60, "cpu")
    KEPT.append(ranks)
    (Path(folder) / f"{ranks.rank}.json").write_text(json.dumps("done"))
    for _ in range(COLLECTIVES):
        value = torch.ones(5)
        value.of_python = True  # type: ignore[attr-defined]
        dist.all_reduce(value, group=ranks.side, async_op=True)
    leave()
    if how == "finish":
        finish(0)


def test_a_finished_rank_ends_with_its_code_whatever_gloo_still_holds(tmp_path: Path) -> None:
    for _ in range(2):
        done = launch(2, "tests.engine.test_finish", "finish", str(tmp_path))
        assert done.returncode == 0, done.stdout + done.stderr
        assert len(list(tmp_path.glob("*.json"))) == 2


def test_without_a_process_group_it_is_sys_exit() -> None:
    """So a profiler that wraps the module still writes its report."""
    code = "import atexit; from engine.ranks import finish; atexit.register(print, 'called'); finish(3)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 3 and done.stdout == "called\n"


if __name__ == "__main__":
    main()
