"""`python -m bench.standing`: the numbers that the project set itself, beside what was measured last, as a Markdown table.

Reads what the commands in the last column wrote; nothing is measured here. A number without a result says so.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipelines.errors import BadInput

RESULTS = Path("bench/results")
_ATTENTION = ("attention", "coattention")
_SHORT = 64
Result = Mapping[str, Any]


@dataclass(frozen=True)
class Goal:
    """One number: where it stands, what it should be, and below (or above) what it is not good enough."""

    name: str
    file: str
    """In `RESULTS`, without its ending."""
    value: Callable[[Result], float]
    goal: float
    floor: float
    less_is_better: bool = False
    form: str = "{:.2f} ×"

    def verdict(self, value: float) -> str:
        sign = -1 if self.less_is_better else 1
        if sign * value >= sign * self.goal:
            return "reached"
        return "above the floor" if sign * value >= sign * self.floor else "**below the floor**"


def _mean(peer: str) -> Callable[[Result], float]:
    return lambda result: result["geometric_mean"][peer]


def _worst(result: Result) -> float:
    return min(task["ratio"]["authors"] for task in result["tasks"].values())


def _guesswhat(result: Result) -> float:
    return result["tasks"]["guesswhat_pointing"]["ratio"]["authors"]


def _headline(section: str, key: str, number: str = "median") -> Callable[[Result], float]:
    return lambda result: result["headline"][section][key][number]


def _spills(result: Result) -> float:
    return sum(row["spill_loads"] + row["spill_stores"] for row in result["variants"])


def _bytes(key: str, wanted: Callable[[Result], bool]) -> Callable[[Result], float]:
    return lambda result: max(case[key] for case in result["traffic"] if wanted(case))


def _launches(pass_: str) -> Callable[[Result], float]:
    return lambda result: max(
        case[pass_]["launches"]
        for case in result["traffic"]
        if case["op"] == "coattention" and case["longest"] <= _SHORT
    )


def _iterations(batch: int, mean: tuple[float, float]) -> Iterator[Goal]:
    file = f"iterations_batch_{batch}"
    of = f"batch {batch}"
    yield Goal(f"steps/s against *authors*, geometric mean of the tasks, {of}", file, _mean("authors"), *mean)
    yield Goal(f"worst task, {of}", file, _worst, 4, 3.5)
    yield Goal(f"GuessWhat, {of}", file, _guesswhat, 13, 11)
    yield Goal(f"against *stock*, geometric mean, {of}", file, _mean("stock"), 2.5, 2)


_MASKED = ("masked_region_loss", "masked_lm_loss")
_REGIONS = "masked_region_loss_against_all_regions"


def _kernels() -> Iterator[Goal]:
    for dtype in ("float32", "bfloat16"):
        name = f"dropout + residual + LayerNorm against torch eager, {dtype}"
        yield Goal(name, "kernels", _headline("layernorm", f"torch, {dtype}"), 10, 5)
    short = "short_attention_bfloat16"
    yield Goal("short attention, bfloat16, against SDPA", "kernels", _headline(short, "sdpa"), 4, 3)
    yield Goal("the same against eager products", "kernels", _headline(short, "torch"), 1.3, 1.1)
    for dtype in ("float32", "bfloat16"):
        name = f"masked-region loss against all regions, {dtype}"
        yield Goal(f"{name}: time", "kernels", _headline(_REGIONS, dtype), 5, 4)
        beside = _headline(_REGIONS, dtype, "memory_beyond_gradients")
        yield Goal(f"{name}: memory beside gradients", "kernels", beside, 1 / 20, 1 / 10, True, "{:.3f} ×")


def _triton() -> Iterator[Goal]:
    yield Goal("Triton, sm_80 and sm_90: spill instructions", "aot", _spills, 0, 0, True, "{:.0f}")
    least = "bytes over the least possible"
    rest = _bytes("issued_over_least", lambda case: case["op"] not in (*_ATTENTION, *_MASKED))
    yield Goal(f"{least}: element-wise, embedding, answers", "aot", rest, 1.1, 1.2, True)
    masked = _bytes("distinct_over_least", lambda case: case["op"] in _MASKED)
    yield Goal(f"{least}: masked losses", "aot", masked, 1.1, 1.2, True)
    short = _bytes("issued_over_least", lambda case: case["op"] in _ATTENTION and case["longest"] <= _SHORT)
    yield Goal(f"{least}: attention over up to {_SHORT} rows", "aot", short, 1.3, 1.5, True)
    yield Goal("co-attention: launches forward", "aot", _launches("forward"), 1, 1, True, "{:.0f}")
    yield Goal("co-attention: launches backward", "aot", _launches("backward"), 2, 2, True, "{:.0f}")


def _pipeline() -> Iterator[Goal]:
    file = "pipeline"
    yield Goal("features into batches, one core, against *pickle* (the authors' way)", file, _ratio("pickle"), 35, 35)
    yield Goal("the same against *uniter*", file, _ratio("uniter"), 10, 10)
    share = "the same against copying the bytes alone (memcpy)"
    yield Goal(share, file, lambda result: result["memcpy_share"], 0.7, 0.7, form="{:.2f} ×")
    for run in ("world", "full size"):
        waiting = _waiting(run)
        yield Goal(f"step time spent waiting for data, {run}", file, waiting, 0.02, 0.02, True, "{:.2%}")


def _ratio(peer: str) -> Callable[[Result], float]:
    return lambda result: result["ratio"][peer]


def _waiting(run: str) -> Callable[[Result], float]:
    return lambda result: result["waiting"][run]["share"]


def _retrieval() -> Iterator[Goal]:
    for key, title in (("tiny bfloat16", "tiny"), ("vilbert_6l_6c bfloat16", "full model")):
        name = f"retrieval of 5,000 × 1,000, {title}"
        yield Goal(f"{name}, against *padded* in the same dtype", "retrieval", _slower(key, "padded"), 1.4, 1.2)
        yield Goal(f"{name}, against *authors*", "retrieval", _slower(key, "authors"), 5, 4)
        beyond = "images in another order than in float32, beyond the dtype's error"
        yield Goal(f"{name}: {beyond}", "retrieval", _beyond(key), 0, 0, True, "{:.0f}")


def _slower(key: str, peer: str) -> Callable[[Result], float]:
    return lambda result: result[key]["seconds_of_all"][peer] / result[key]["seconds_of_all"]["ours"]


def _beyond(key: str) -> Callable[[Result], float]:
    return lambda result: result[key]["order"]["beyond"]


_16 = "iterations_batch_16"
GOALS = (
    *_iterations(16, (5.5, 5)),
    *_iterations(4, (5, 4.5)),
    Goal("GEMM share of forward and backward, batch 16", _16, lambda r: r["gemm_share"], 0.85, 0.75, form="{:.2f}"),
    Goal(
        "working memory against *authors*, batch 16",
        _16,
        lambda r: r["memory"]["working_ratio"]["authors"],
        0.35,
        0.5,
        True,
    ),
    *_kernels(),
    *_triton(),
    *_pipeline(),
    *_retrieval(),
)
"""The order of the table."""

COMMANDS = {
    "iterations_batch_16": "python -m bench.iterations --batch 16 --rounds 3",
    "iterations_batch_4": "python -m bench.iterations --batch 4 --rounds 5",
    "kernels": "python -m bench.kernels",
    "aot": "python -m bench.kernels --aot sm_80,sm_90",
    "pipeline": "python -m bench.pipeline --training --simulate 4",
    "retrieval": "python -m bench.retrieval",
}


def table(folder: Path) -> str:
    """Markdown. BadInput for a result that is not one."""
    results = {file: _read(folder / f"{file}.json") for file in COMMANDS}
    lines = ["| number | goal | floor | measured | |", "|---|---:|---:|---:|---|"]
    for goal in GOALS:
        result = results[goal.file]
        limits = f"{goal.form.format(goal.goal)} | {goal.form.format(goal.floor)}"
        if result is None:
            lines.append(
                f"| {goal.name} | {limits} | | no result: `{COMMANDS[goal.file]} --json {folder / goal.file}.json` |"
            )
            continue
        try:
            value = goal.value(result)
        except (KeyError, TypeError, ValueError) as error:
            raise BadInput(
                folder / f"{goal.file}.json", f"has no {goal.name} ({error!r})", "measure it again"
            ) from None
        lines.append(f"| {goal.name} | {limits} | {goal.form.format(value)} | {goal.verdict(value)} |")
    return "\n".join(lines)


def _read(path: Path) -> Result | None:
    if not path.exists():
        return None
    try:
        result = json.loads(path.read_text())
    except ValueError as error:
        raise BadInput(path, f"is no JSON: {error}", "measure it again") from None
    if not isinstance(result, dict):
        raise BadInput(path, "is no result", "measure it again")
    return result


def main(argv: list[str] | None = None) -> int:
    """Command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m bench.standing", description=__doc__.partition("\n\n")[0])
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of results (default: %(default)s)")
    try:
        print(table(parser.parse_args(argv).results))
    except BadInput as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
