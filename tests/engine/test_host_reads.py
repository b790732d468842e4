"""What a step on two ranks sends, and what it makes the host wait for: counted at every ZeRO stage, through the ordinary loop.

How, and what a count on a CPU can and cannot show, is in `bench/host_counts.py`. Values that were never on a device (the
counters of steps, what packing knows) are no reads.
"""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

import pytest

from tests.engine import two_ranks
from tests.engine.host_reads import ITERATIONS
from tests.engine.small_run import ROWS, configure

Entry = list[dict[str, Any]]

CASES = ("0:bfloat16:0.0", "1:bfloat16:0.0", "2:bfloat16:0.0", "3:bfloat16:0.0", "1:bfloat16:1.0")
"""ZeRO stage, precision, clip."""

COLLECTIVES = {
    "0": {"allreduce": 1},
    "1": {"allreduce": 2, "allgather_base": 1},
    "2": {"allreduce": 2, "allgather_base": 1},
    "3": {"allreduce": 1, "allgather_base": 1, "reduce_scatter_base": 1},
}
"""Of a step, the agreement's apart. Stages 1 and 2: gradients of the trunk and the head that ran, their norm, new weights."""

THEIRS = {
    "0:bfloat16:0.0": {},
    "1:bfloat16:0.0": {},
    "2:bfloat16:0.0": {},
    "3:bfloat16:0.0": {"deepspeed/runtime/utils.py:is_invalid_grad_norm": 1},
    "1:bfloat16:1.0": {"deepspeed/runtime/utils.py:is_invalid_grad_norm": 1},
}
"""Reads of a step by DeepSpeed 0.19.8: where it takes the norm, it looks whether that is finite."""

RECORDED = {"3": 2}
"""Steps at the start of a run in which stage 3 compares its traces between the ranks, and sends and reads more."""

ON_A_CPU_ONLY = {
    "engine/model/flat.py:add_rows",  # a GPU sorts and sums without finding the distinct ids
    "kernels/soft_label_bce.py:_check",  # of the native kernel, which reads through bare pointers
}
"""Reads in branches that no GPU takes."""


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, list[Entry]]]]:
    """By case and rank: what was seen in each entry of each phase."""
    folder = tmp_path_factory.mktemp("data")
    configure(folder)
    two_ranks.run("tests.engine.host_reads", folder, folder / "seen.json", *CASES)
    found: dict[str, list[dict[str, list[Entry]]]] = json.loads((folder / "seen.json").read_text())
    return found


def _reads(entry: Entry, theirs: bool) -> dict[str, int]:
    return dict(Counter(s["who"] for s in entry if s["kind"] == "read" and s["who"].startswith("deepspeed") == theirs))


@pytest.mark.parametrize("case", CASES)
def test_collectives_of_a_step(seen: dict[str, list[dict[str, list[Entry]]]], case: str) -> None:
    stage = case[0]
    for rank in seen[case]:
        steps = rank["step"]
        assert len(steps) == ITERATIONS * len(ROWS["tasks"])
        for step in steps[RECORDED.get(stage, 0) :]:
            found = Counter(s["kind"] for s in step if s["kind"] != "read")
            assert found == COLLECTIVES[stage]
            assert found.total() + 1 <= 8, "with the agreement's"
    assert seen[case][0]["step"] == seen[case][1]["step"] or stage == "3", "both ranks do the same"


@pytest.mark.parametrize("case", CASES)
def test_one_agreement_a_step(seen: dict[str, list[dict[str, list[Entry]]]], case: str) -> None:
    """Stop, failed, finite flag, plan hash and all else: one all-reduce of eight integers on the side group."""
    for rank in seen[case]:
        assert len(rank["boundary"]) >= len(rank["step"])
        for boundary in rank["boundary"]:
            assert [(s["kind"], s["who"], s["bytes"], s["group"]) for s in boundary] == [
                ("allreduce", "engine/agreement.py:exchange", 8 * 8, "side")
            ]
        for step in rank["step"]:
            assert not any(s["group"] == "side" for s in step)
        assert not any(s["kind"] != "read" for entry in rank[""] for s in entry), "nothing is sent between steps"


@pytest.mark.parametrize("case", CASES)
def test_our_code_reads_nothing_outside_log_steps(seen: dict[str, list[dict[str, list[Entry]]]], case: str) -> None:
    for rank in seen[case]:
        for phase in ("step", "boundary", ""):
            for entry in rank[phase]:
                assert _reads(entry, theirs=False).keys() <= ON_A_CPU_ONLY, phase
        assert all(_reads(log, theirs=False) == {"engine/loop.py:_read_results": 2} for log in rank["log"])
        assert len(rank["log"]) == 2


@pytest.mark.parametrize("case", CASES)
def test_what_deepspeed_reads(seen: dict[str, list[dict[str, list[Entry]]]], case: str) -> None:
    for rank in seen[case]:
        for step in rank["step"][RECORDED.get(case[0], 0) :]:
            assert _reads(step, theirs=True) == THEIRS[case]
