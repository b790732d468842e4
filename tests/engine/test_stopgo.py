"""Both controllers give the published states, survive a JSON round trip anywhere, and refuse what is no score."""

from __future__ import annotations

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.config import StopGo
from engine.stopgo import (
    CONTROLLERS,
    BadScore,
    Controller,
    Decision,
    PaperController,
    ReferenceController,
    new_controller,
    restore,
)
from tests.reference import reference

KINDS = pytest.mark.parametrize("kind", sorted(CONTROLLERS))
SCORES = st.lists(st.floats(0, 1, allow_nan=False), max_size=40)
GOLDEN = {"reference": "golden/controller.json", "paper": "golden/controller_paper.json"}


def states(controller: Controller, scores: list[float]) -> list[str]:
    return [str(controller.update(score)) for score in scores]


def paper_states(scores: list[float], patience: int = 2) -> list[str]:
    """The rule of the paper's controller, recomputed from the whole history at each step."""
    state, changed, result = "go", 0, []
    for n in range(1, len(scores) + 1):
        seen = scores[:n]
        before, last = seen[:-patience], seen[-patience:]
        if state == "go":
            if n - changed >= patience and before and all(s <= 1.001 * max(before) for s in last):
                state, changed = "stop", n
        elif seen[-1] < 0.995 * max(seen):
            state, changed = "go", n
        result.append(state)
    return result


@KINDS
def test_every_state_of_the_golden_traces(kind: str) -> None:
    traces = json.loads(reference(GOLDEN[kind]).read_text())["traces"]
    assert len(traces) > 200
    for trace in traces:
        expected = ["go" if go else "stop" for go in trace["go"]]
        assert states(new_controller(StopGo(controller=kind)), trace["scores"]) == expected


@KINDS
def test_golden_states_through_a_json_round_trip_at_every_point(kind: str) -> None:
    for trace in json.loads(reference(GOLDEN[kind]).read_text())["traces"]:
        controller: Controller = new_controller(StopGo(controller=kind))
        for score, go in zip(trace["scores"], trace["go"], strict=True):
            controller = restore(json.loads(json.dumps(controller.state_dict(), allow_nan=False)))
            assert (controller.update(score) is Decision.GO) == bool(go)


def test_reference_stops_after_two_evaluations_without_gain_and_cools_down() -> None:
    controller = ReferenceController()
    assert states(controller, [0.5, 0.5, 0.5]) == ["go", "go", "stop"]
    assert states(controller, [0.4]) == ["go"]  # woken by a fall of more than 0.5 %
    assert states(controller, [0.4, 0.4, 0.4]) == ["go", "go", "stop"]  # one evaluation of cooldown, then two


def test_reference_lets_small_gains_add_up() -> None:
    assert set(states(ReferenceController(), [0.5 * 1.0009**n for n in range(50)])) == {"go"}


@given(SCORES)
def test_paper_equals_its_rule_over_the_whole_history(scores: list[float]) -> None:
    assert states(PaperController(), scores) == paper_states(scores)


@KINDS
@given(SCORES, SCORES)
def test_a_restored_controller_continues_alike(kind: str, before: list[float], after: list[float]) -> None:
    controller = CONTROLLERS[kind]()
    states(controller, before)
    state = json.loads(json.dumps(controller.state_dict(), allow_nan=False))
    restored = restore(state)
    assert restored.state_dict() == controller.state_dict() == state
    assert states(restored, after) == states(controller, after)
    assert state == json.loads(json.dumps(state))  # the restored one does not write into it


@KINDS
@given(SCORES.filter(bool))
def test_rising_scores_never_stop_a_task(kind: str, steps: list[float]) -> None:
    score, scores = 0.01, []
    for step in steps:
        score *= 1.002 + step
        scores.append(score)
    assert set(states(CONTROLLERS[kind](), scores)) == {"go"}


@KINDS
@given(SCORES, st.sampled_from([math.nan, math.inf, -math.inf, -0.1]))
def test_a_bad_score_is_refused_and_changes_nothing(kind: str, scores: list[float], bad: float) -> None:
    controller = CONTROLLERS[kind]()
    states(controller, scores)
    before = controller.state_dict()
    with pytest.raises(BadScore, match="no validation score"):
        controller.update(bad)
    assert controller.state_dict() == before


@KINDS
def test_settings_reach_the_controller(kind: str) -> None:
    patient = new_controller(StopGo(controller=kind, patience=4, stop_threshold=0.1, go_threshold=0.2))
    assert states(patient, [0.5, 0.54, 0.5, 0.5]) == ["go"] * 4
    assert states(patient, [0.5, 0.45, 0.30]) == ["stop", "stop", "go"]


def test_a_foreign_state_is_refused() -> None:
    state = ReferenceController().state_dict()
    for wrong in ({}, {**state, "controller": "other"}, {**state, "controller": "paper"}, {**state, "extra": 1}):
        with pytest.raises(ValueError, match="no state of"):
            restore(wrong)
    with pytest.raises(ValueError, match="paper"):
        PaperController.from_state(state)
