"""Two result files against each other: of `bench.iterations`, or of `bench.kernels`.

They come from two runs, and so from two states of the machine: their times cannot be compared as they are. Where both
runs had the same peers, each time is taken over the peers' of the same turn, and these ratios are compared. Where they had
none, the ratio of the raw times is shown, and no verdict is given.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import median
from typing import Any

from bench.compare.verdicts import OP, STEP, TASK, Estimate, Key, average, difference
from pipelines.errors import BadInput

LUCK = 0.01
"""Standard deviation of log(time) of the same code from process to process (bench/LOG.md). A file knows one process only."""
_OWN = ("ours", "native", "triton", "reference")
_SAME_WORK = ("model", "batch", "precision", "seed", "same_batch", "overrides")
_SAME_MACHINE = ("device", "isa", "threads", "torch", "triton")
Series = dict[Key, dict[str, list[float]]]
"""Row -> provider -> seconds of every turn; ours is called "ours"."""


def estimates(base: Path, head: Path) -> tuple[dict[Key, Estimate], dict[str, dict[str, str]], list[str]]:
    """Of all rows that both files have; the conditions of each file; what is to be known of the numbers.

    Raises BadInput for files that cannot be read, or that measured different work.
    """
    results = _read(base), _read(head)
    kinds = [_kind(result, path) for result, path in zip(results, (base, head), strict=True)]
    if kinds[0] is not kinds[1]:
        raise BadInput(head, f"is of another benchmark than {base}", "compare two files of the same command")
    conditions = [_conditions(result, path) for result, path in zip(results, (base, head), strict=True)]
    notes = _differences(conditions[0], conditions[1], base, head)
    old, new = (_series(kinds[0], result, path) for result, path in zip(results, (base, head), strict=True))
    common = [key for key in old if key in new]
    if not common:
        raise BadInput(head, f"has no row in common with {base}")
    found = {key: _estimate(old[key], new[key]) for key in common}
    if any(not _peers(old[key], new[key]) for key in common):
        notes.append(
            "raw times of two runs: the machine's mood is in them, and no verdict is given (measure with peers)"
        )
    elif any(estimate.freedom < 1 for estimate in found.values()):
        notes.append("rows without an interval: their files keep no raw times (measure again)")
    else:
        notes.append("times are taken over those of the peers in the same run")
    tasks = [estimate for (kind, _), estimate in found.items() if kind == TASK]
    step = {(STEP, STEP): average(tasks)} if tasks else {}
    return {**step, **found}, {"base": conditions[0], "head": conditions[1]}, notes


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise BadInput(path, f"cannot be read as JSON: {error}", "take what --json of a benchmark wrote") from None
    if not isinstance(found, dict):
        raise BadInput(path, "is no result of a benchmark", "take what --json of a benchmark wrote")
    return found


def _of_iterations(result: Mapping[str, Any]) -> Series:
    return {
        (TASK, name): {provider: list(of["all"]) for provider, of in task["seconds"].items()}
        for name, task in result["tasks"].items()
    }


def _of_kernels(result: Mapping[str, Any]) -> Series:
    found: Series = {}
    for row in result["rows"]:
        name = " ".join((row["op"], row["mode"], row["dtype"], row["task"], row["shape"]))
        provider = "ours" if row["provider"] in _OWN else row["provider"]
        times = row.get("samples_us") or [row["median_us"]]
        found.setdefault((OP, name), {})[provider] = [1e-6 * time for time in times]
    return {key: providers for key, providers in found.items() if "ours" in providers}


_KINDS: Mapping[str, Callable[[Mapping[str, Any]], Series]] = {"tasks": _of_iterations, "rows": _of_kernels}
"""What a file of each benchmark has -> how its times are read."""


def _kind(result: Mapping[str, Any], path: Path) -> Callable[[Mapping[str, Any]], Series]:
    kind = next((read for name, read in _KINDS.items() if name in result), None)
    if kind is None:
        raise BadInput(path, "is of no benchmark whose files can be compared", "those of iterations and kernels can")
    return kind


def _series(read: Callable[[Mapping[str, Any]], Series], result: Mapping[str, Any], path: Path) -> Series:
    try:
        found = read(result)
    except (KeyError, TypeError, AttributeError) as error:
        raise BadInput(path, f"lacks what this version reads: {error!r}", "measure again") from None
    for (_, name), providers in found.items():
        for times in providers.values():
            if not times or not all(isinstance(time, float) and 0 < time < math.inf for time in times):
                raise BadInput(f"{path}: {name}", "times must be positive numbers", "measure again")
    return found


def _conditions(result: Mapping[str, Any], path: Path) -> dict[str, str]:
    found = result.get("conditions")
    if not isinstance(found, dict):
        raise BadInput(f"{path}: conditions", "missing", "measure again")
    return {name: str(value) for name, value in found.items()}


def _differences(base: Mapping[str, str], head: Mapping[str, str], old: Path, new: Path) -> list[str]:
    for name in _SAME_WORK:
        if base.get(name) != head.get(name):
            raise BadInput(new, f"measured other work than {old}: {name} {head.get(name)}, not {base.get(name)}")
    return [
        f"{name}: {base.get(name)}, then {head.get(name)}" for name in _SAME_MACHINE if base.get(name) != head.get(name)
    ]


def _peers(base: Mapping[str, list[float]], head: Mapping[str, list[float]]) -> list[str]:
    return [name for name in base if name != "ours" and name in head]


def _estimate(base: Mapping[str, list[float]], head: Mapping[str, list[float]]) -> Estimate:
    peers = _peers(base, head)
    old, new = _logarithms(base, peers), _logarithms(head, peers)
    if not peers or min(len(old), len(new)) < 2:
        return Estimate(median(new) - median(old), math.inf, 0)
    found = difference(new, old)
    luck = 2 * LUCK**2 * (1 + 1 / len(peers))  # two files; ours and each peer a process of its own
    return Estimate(found.mean, math.sqrt(found.error**2 + luck), found.freedom)


def _logarithms(providers: Mapping[str, list[float]], peers: list[str]) -> list[float]:
    """Of ours over the peers in every turn."""
    turns = zip(providers["ours"], *(providers[peer] for peer in peers), strict=False)
    return [math.log(ours) - sum(map(math.log, others)) / max(1, len(others)) for ours, *others in turns]
