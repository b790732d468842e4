"""`python -m pipelines.world DIR [--seed N] [--size default|small] [--picture FILE]`"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from rich.progress import Progress, TaskID

from pipelines.errors import BadInput
from pipelines.world.builder import ensure
from pipelines.world.plan import SCALES


def main(argv: list[str] | None = None) -> int:
    """Build a world unless it is there already, and draw a picture of it if asked. Returns the exit status."""
    parser = argparse.ArgumentParser(prog="pipelines.world", description=__doc__)
    parser.add_argument("folder", metavar="DIR", type=Path, help="built here; an older world in it is replaced")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--size", choices=SCALES, default="default")
    parser.add_argument("--picture", metavar="FILE", type=Path, help="a PNG of some scenes with their annotations")
    arguments = parser.parse_args(argv)
    start = time.monotonic()
    try:
        with Progress(transient=True, disable=not sys.stderr.isatty()) as bars:
            shown: dict[str, TaskID] = {}

            def show(what: str, done: int, total: int) -> None:
                if what not in shown:
                    shown[what] = bars.add_task(what, total=total)
                bars.update(shown[what], completed=done, total=total)

            sheet = ensure(arguments.folder, arguments.seed, arguments.size, show)
        if arguments.picture:
            from pipelines.world.figure import draw_figure  # matplotlib is slow to import

            draw_figure(arguments.folder, arguments.picture)
    except BadInput as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{sheet} is ready ({time.monotonic() - start:.1f} s)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
