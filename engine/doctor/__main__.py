"""`stopgo doctor`: what this machine has, what is wrong with it and how to mend that, and what held a run back.

  stopgo doctor                         packages, cores, memory, limits, GPUs, and the kernels that a run would use
  stopgo doctor --config RUN.yaml       also the stores of that run, and whether memory, disk and packages suffice for it
  stopgo doctor runs/world              also where the time of that run went: disk, CPU or steps, and the knob to turn

Every line is good, a note (it costs something) or a problem (a run fails, or loses much of its speed); the last two say
what to type. Nothing is built or changed, but with --build.
Exit codes: 0 no problem; 1 a problem; 2 bad input.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from engine.doctor import gpus, kernels, machine, packages, run, stores
from engine.doctor.lines import Asked, Line, Probe, examine
from engine.doctor.page import show
from pipelines.errors import BadInput

SECTIONS: Mapping[str, Mapping[str, Probe]] = {
    "packages": packages.PROBES,
    "machine": {**machine.PROBES, **gpus.PROBES},
    "kernels": kernels.PROBES,
    "data": stores.PROBES,
    "run": run.PROBES,
}
"""What is looked at, in the order of the page. A new probe is a row in the table of its file."""


def main(argv: list[str] | None = None) -> int:
    """Command line; returns the exit code."""
    arguments = _parser().parse_args(argv)
    try:
        asked = _asked(arguments)
        with _progress() as looking_at:
            found = {title: examine(probes, asked, looking_at) for title, probes in SECTIONS.items()}
        found = {title: lines for title, lines in found.items() if lines}
        if arguments.json:
            _write(arguments.json, found)
    except BadInput as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    show(found)
    return int(any(line.state == "problem" for lines in found.values() for line in lines))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="stopgo doctor", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", nargs="?", type=Path, metavar="RUN_FOLDER", help="say what held this run back")
    parser.add_argument("--config", type=Path, metavar="RUN.yaml", help="look at what this run needs")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="whose kernels to show")
    parser.add_argument("--build", action="store_true", help="compile what is not built yet (some 15 seconds)")
    parser.add_argument("--json", type=Path, metavar="F", help="write the same lines here, as data")
    parser.add_argument("--debug", action="store_true", help="tracebacks of probes that fail, on stderr")
    return parser


def _asked(arguments: argparse.Namespace) -> Asked:
    """Raises BadInput for a configuration or a run folder that is none."""
    config = None
    if arguments.config is not None:
        from engine.config import load

        config = load(arguments.config)
    if arguments.run is not None:
        run.folder_files(arguments.run)
    return Asked(arguments.device, config, arguments.config, arguments.run, arguments.build, arguments.debug)


@contextmanager
def _progress() -> Iterator[Callable[[str], None]]:
    """Shows on stderr, if that is a terminal, what is looked at: large stores take seconds to open."""
    try:
        from rich.console import Console
    except ImportError:  # the page will say so
        yield lambda name: None
        return
    with Console(stderr=True).status("") as status:
        yield lambda name: status.update(f"looking at {name}")


def _write(path: Path, found: Mapping[str, list[Line]]) -> None:
    """Raises BadInput where the file cannot be written."""
    from pipelines.files import write_atomic

    lines = [{"section": title, **line.as_json()} for title, lines in found.items() for line in lines]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, json.dumps({"lines": lines}, indent=1).encode() + b"\n")
    except OSError as error:
        raise BadInput(f"--json {path}", f"cannot be written: {error.strerror}", "choose another file") from None


if __name__ == "__main__":
    sys.exit(main())
