"""`python -m bench.tables`: the tables of the READMEs whose numbers are measured, made from `bench/results`.

Without arguments they are printed; with `--write` they take the place of those that stand there. A table is found by its first
line, so what stands around it stays. `tests/bench/test_tables.py` fails where a README says something else than the results.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import geometric_mean
from typing import Any

from bench import standing
from bench.blind import Comparison
from bench.blind import table as blind_table
from engine.experiments.paper import paper_table
from engine.experiments.results import Estimate, Results, Row, difference, estimate
from engine.experiments.systems import load_catalogue
from engine.tasks import load_table
from pipelines.errors import BadInput
from pipelines.files import write_atomic

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench/results"
GIB = 2**30

Result = Any
Lines = Iterator[str]

_SHOWN = ("vqa", "coco_retrieval", "refcocog", "guesswhat_pointing", "nlvr2")
"""One task of each group, and the longest texts; all twelve are in the figure."""
_PEERS = ("authors", "stock")


@dataclass(frozen=True)
class Shown:
    """A table in a README."""

    readme: str
    results: tuple[str, ...]
    """Files of `bench/results` that its numbers are in."""
    lines: Callable[..., Lines]
    """Of the results, in that order."""

    def made(self, folder: Path = RESULTS) -> list[str]:
        """Its lines. Raises BadInput for a result that is not there or is none."""
        read = []
        for name in self.results:
            try:
                read.append(json.loads((folder / name).read_text()))
            except (OSError, ValueError) as error:
                raise BadInput(folder / name, f"not a result: {error}", "measure it again (bench/README.md)") from None
        try:
            return list(self.lines(*read))
        except (KeyError, TypeError, AttributeError) as error:
            where = ", ".join(self.results)
            raise BadInput(folder / where, f"not the result that its table needs: {error!r}") from None


def speed(batch_16: Result, batch_4: Result) -> Lines:
    """The full model's step against two peers (root README)."""
    results = (batch_16, batch_4)
    yield "| | batch 16: steps/s | *authors* | *stock* | batch 4: steps/s | *authors* | *stock* |"
    yield "|---|---:|---:|---:|---:|---:|---:|"
    for name in _SHOWN:
        tasks = [result["tasks"][name] for result in results]
        cells = [[f"{task['iterations_per_s']:.2f}", *_times(task["ratio"])] for task in tasks]
        yield _row(load_table().row(name).title, *cells[0], *cells[1])
    means = [["", *(f"**{cell}**" for cell in _times(result["geometric_mean"]))] for result in results]
    yield _row("**twelve tasks, geometric mean**", *means[0], *means[1])
    memory = [result["memory"] for result in results]
    cells = [[f"{m['working_bytes']['ours'] / GIB:.1f} GiB", *_times(m["working_ratio"], 2)] for m in memory]
    yield _row("working memory, largest task", *cells[0], *cells[1])


_GPU_PEERS = ("authors", "stock", "stock_graphs")


def gpu_speed(result: Result) -> Lines:
    """The full model's step on a GPU (root README)."""
    yield "| one GPU, batch 16 | ms a step | *authors* | *stock* | *stock*, recorded |"
    yield "|---|---:|---:|---:|---:|"
    tasks = result["tasks"]
    for name in _SHOWN:
        cells = (f"{tasks[name]['ratio'][peer]:.1f} ×" for peer in _GPU_PEERS)
        yield _row(load_table().row(name).title, f"{1e3 / tasks[name]['iterations_per_s']:.1f}", *cells)
    means = (geometric_mean(task["ratio"][peer] for task in tasks.values()) for peer in _GPU_PEERS)
    yield _row(f"**{len(tasks)} tasks, geometric mean**", "", *(f"**{mean:.1f} ×**" for mean in means))


_FUSED = ("sdpa", "liger", "torch_fused")
"""What others fused, by preference."""


def gpu_kernels(result: Result) -> Lines:
    """Every op on a GPU, forward and backward, beside what could be recorded as well (bench/README.md)."""
    yield "| op, bfloat16, forward and backward | µs | of the ceiling | torch takes | others' fused one takes |"
    yield "|---|---:|---:|---:|---:|"
    rows = [row for row in result["rows"] if row["mode"] in ("both", "step")]
    for case in dict.fromkeys((row["op"], row["shape"]) for row in rows):
        found = {row["provider"]: row for row in rows if (row["op"], row["shape"]) == case and row["recorded"]}
        ours, fused = found["triton"], next((name for name in _FUSED if name in found), "")
        times = {name: f"{row['median_us'] / ours['median_us']:.1f} ×" for name, row in found.items()}
        other = f"{times[fused]} ({fused})" if fused else ""
        yield _row(
            f"`{case[0]}`, {case[1]}", f"{ours['median_us']:.0f}", f"{ours['share']:.0%}", times.get("torch", ""), other
        )


def blind(result: Result) -> Lines:
    """What is learned, and by looking (root README)."""
    yield from blind_table([Comparison(**task) for task in result["tasks"]], len(result["seeds"])).splitlines()


_CASES = {
    "vilbert_6l_6c, batch 4": "steps, full model, batch 4",
    "tiny, batch 32": "steps, tiny model, batch 32",
    "engine.train, 1 rank": "the embedded world's run, 1 rank",
    "engine.train, 2 ranks": "the same, 2 ranks",
}


def plan(steps: Result, runs: Result) -> Lines:
    """Predicted over measured (bench/README.md)."""
    yield "| run | predicted over measured, geometric mean | tasks |"
    yield "|---|---:|---:|"
    checks = [*steps["checks"], *runs["checks"]]
    for case, title in _CASES.items():
        ratios = [check["ratio"] for check in checks if check["case"] == case]
        tasks = f"{min(ratios):.2f} to {max(ratios):.2f}"
        yield _row(f"{title}, {len(ratios)} tasks", f"{geometric_mean(ratios):.2f}", tasks)


def profile(result: Result) -> Lines:
    """A step by phase, and what looking costs (bench/README.md)."""
    yield "| task | ms a step | looked into | phases add up to | forward | backward | optimizer |"
    yield "|---|---:|---:|---:|---:|---:|---:|"
    for name, task in result["tasks"].items():
        step, phases = task["step"], task["phases"]
        shares = (f"{phases[phase] / step['profiled_s']:.0%}" for phase in ("forward", "backward", "step"))
        found = (f"{1e3 * step['plain_s']:,.0f}", f"{step['overhead']:+.1%}", f"{step['phases_over_plain']:.1%}")
        yield _row(load_table().row(name).title, *found, *shares)


def experiments(*series: Result) -> Lines:
    """The paper's four comparisons, paired by seed (root README)."""
    yield "| average over the twelve tasks, in points | paper | trained from scratch | begun from one pretrained trunk |"
    yield "|---|---:|---:|---:|"
    found = [Results(tuple(Row(**row) for row in one["runs"])) for one in series]
    for row in load_catalogue().comparisons:
        name, first, second = row.paper
        paper = [paper_table(name).number(line, "average") or 0.0 for line in (first, second)]
        cells = (_ahead(one, row.of, row.against) for one in found)
        yield _row(row.title, f"{paper[0] - paper[1]:+.2f}", *(cell.signed() if cell else "–" for cell in cells))


_WAYS = ("ours", "padded", "authors")


def retrieval(result: Result) -> Lines:
    """Every caption of a pool with every image (bench/README.md)."""
    yield "| 5,000 captions × 1,000 images, bfloat16 | ours | *padded* | *authors* |"
    yield "|---|---:|---:|---:|"
    for key, title in (("tiny bfloat16", "tiny"), ("vilbert_6l_6c bfloat16", "full model")):
        found = result[key]
        unit, whole, counted = found["seconds_of_a_unit"], found["seconds_of_all"], found["counted"]
        yield _row(f"{title}: ms a pair", *(f"{1e3 * unit[f'{way} pairs']['median']:.2f}" for way in _WAYS))
        hours = [f"{whole[way] / 3600:.1f} ({whole[way] / whole['ours']:.1f} ×)" for way in _WAYS]
        yield _row(f"{title}: all pairs, hours", *hours)
        yield _row(
            f"{title}: rows through layers", *(f"{counted[way]['rows_through_layers'] / 1e9:.1f} G" for way in _WAYS)
        )
        yield _row(f"{title}: features embedded", *(f"{counted[way]['feature_bytes'] / 1e9:,.2f} GB" for way in _WAYS))


def _ahead(results: Results, of: str, against: str) -> Estimate | None:
    """How far one system is ahead of the other on average over its tasks, by seed."""
    tasks = [task for task in results.tasks() if results.of(of, task)]
    return estimate(difference(results.mean(of, tasks), results.mean(against, tasks)))


TABLES = (
    Shown("README.md", ("iterations_batch_16.json", "iterations_batch_4.json"), speed),
    Shown("README.md", ("gpu/iterations.json",), gpu_speed),
    Shown("README.md", ("blind.json",), blind),
    Shown("README.md", ("experiments_tiny.json", "experiments_tiny_pretrained.json"), experiments),
    Shown("bench/README.md", ("plan.json", "plan_ranks.json"), plan),
    Shown("bench/README.md", ("gpu/kernels.json",), gpu_kernels),
    Shown("bench/README.md", ("profile.json",), profile),
    Shown("bench/README.md", ("retrieval.json",), retrieval),
    Shown("bench/README.md", (), lambda: iter(standing.table(RESULTS).splitlines())),
)


def replaced(text: str, lines: Sequence[str], where: Path) -> str:
    """The text with these lines in place of its table that begins alike. Raises BadInput where it has none."""
    before = text.splitlines()
    if lines[0] not in before:
        raise BadInput(where, f"has no table that begins with {lines[0]!r}", "put that line where it belongs")
    start = before.index(lines[0])
    stop = next((at for at in range(start, len(before)) if not before[at].startswith("|")), len(before))
    return "\n".join([*before[:start], *lines, *before[stop:]]) + "\n"


def _times(ratios: Mapping[str, float], digits: int = 1) -> list[str]:
    return [f"{ratios[peer]:.{digits}f} ×" for peer in _PEERS]


def _row(*cells: str) -> str:
    return "| " + " | ".join(cells) + " |"


def main(argv: list[str] | None = None) -> int:
    """Returns 0, or 2 for a result or a README that cannot be used."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.tables", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--write", action="store_true", help="put them where they belong")
    arguments = parser.parse_args(argv)
    try:
        for shown in TABLES:
            lines, path = shown.made(), ROOT / shown.readme
            text = replaced(path.read_text(), lines, path)
            if arguments.write:
                write_atomic(path, text.encode())
            else:
                print(f"{shown.readme}, from {', '.join(shown.results) or 'all results'}\n", *lines, "", sep="\n")
    except BadInput as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
