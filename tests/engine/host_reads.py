"""Two ranks of the small run, counted: `torchrun … -m tests.engine.host_reads DATA OUT STAGE:PRECISION:CLIP …`.

Every rank trains a few iterations of every task at each stage through the ordinary loop; rank 0 writes to OUT, as JSON,
what both saw.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from bench.host_counts import HostCounts
from engine.assembly import assemble
from engine.cursor import Cursor
from engine.loop import Listener, Loop
from engine.ranks import Ranks, finish, join, leave
from tests.engine.small_run import configure
from tests.pipelines.small import build

ITERATIONS = 4
SETTINGS = (f"max_iterations={ITERATIONS}", "logging.every=2")
PHASES = {"_told_to_stop": "boundary", "_write_windows": "log", "_validate": "validation", "_save": "save"}
"""Methods of the loop that are counted by themselves."""


def count(data: Path, case: str, ranks: Ranks) -> dict[str, Any]:
    """What one rank sees in one run, by phase and entry."""
    stage, precision, clip = case.split(":")
    config = configure(data, f"deepspeed=zero{stage}", f"precision={precision}", f"optimizer.clip={clip}", *SETTINGS)
    parts = assemble(config, ranks=ranks)
    on_host = [kept.values for kept in parts.stepper.state() if kept.key.endswith("/steps")]
    counts = HostCounts(on_host)
    assert ranks.side is not None
    counts.name_group(ranks.side, "side")
    loop = Loop(parts, Cursor(), data / "checkpoints" / case, Listener())
    counts.during(parts.stepper, "step", "step")
    for method, name in PHASES.items():
        counts.during(loop, method, name)
    with counts:
        assert loop.run()
    return {
        phase: [[seen._asdict() for seen in entry] for entry in counts.of(phase)] for phase in ("", *counts.entries)
    }


def main() -> None:
    data, out, *cases = sys.argv[1:]
    with TemporaryDirectory() as own:
        build(Path(own))  # the reader serves examples from this process's memory
    ranks = join(60, "cpu")
    found = {case: ranks.gathered(count(Path(data), case, ranks)) for case in cases}
    if ranks.first:
        Path(out).write_text(json.dumps(found))
    leave()


if __name__ == "__main__":
    main()
    finish(0)
