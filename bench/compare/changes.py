"""What is counted of a step, and differs between two revisions: it needs no clock, and is never noise."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

Counts = Mapping[str, tuple[Mapping[str, Any], Mapping[str, Any]]]
"""Task -> what a step of BASE and of HEAD does."""


def changed_counters(counts: Counts) -> dict[str, dict[str, tuple[int, int]]]:
    """Counter -> task -> (BASE, HEAD), of those that differ. Page faults are left out: they are not the same twice."""
    found: dict[str, dict[str, tuple[int, int]]] = {}
    for task, sides in counts.items():
        base, head = (_flat(side) for side in sides)
        for name in {**base, **head}:
            if base.get(name, 0) != head.get(name, 0):
                found.setdefault(name, {})[task] = (base.get(name, 0), head.get(name, 0))
    return found


def _flat(counts: Mapping[str, Any]) -> dict[str, int]:
    """{"copies": 3, "ops": {"add": 1}} -> {"copies": 3, "ops/add": 1}."""
    flat = {}
    for name, value in counts.items():
        if isinstance(value, Mapping):
            flat.update({f"{name}/{inner}": number for inner, number in value.items()})
        elif name != "minor_faults":
            flat[name] = value
    return flat
