"""The plan of an iteration: round-robin, gap, validation times, curriculum phases."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.rotation import due_for_validation, next_phase, phases, plan
from engine.stopgo import Decision
from engine.tasks import load_table

GO, STOP = Decision.GO, Decision.STOP
TASKS = ("vqa", "gqa", "nlvr2")
TWELVE = load_table().default_tasks()


def test_stopped_tasks_run_on_multiples_of_the_gap() -> None:
    decisions = {"vqa": STOP, "gqa": GO, "nlvr2": STOP}
    plans = [plan(iteration, TASKS, decisions, 4) for iteration in range(1, 10)]
    assert plans == [("gqa",)] * 3 + [TASKS] + [("gqa",)] * 3 + [TASKS] + [("gqa",)]


def test_without_decisions_every_task_goes() -> None:
    assert all(plan(iteration, TASKS, {}, 4) == TASKS for iteration in range(1, 20))


def test_an_iteration_may_be_empty() -> None:
    assert plan(3, TASKS, dict.fromkeys(TASKS, STOP), 4) == ()


@given(st.integers(1, 10**6), st.lists(st.booleans(), min_size=3, max_size=3), st.integers(1, 16))
def test_the_plan_keeps_order_and_every_going_task(iteration: int, going: list[bool], gap: int) -> None:
    decisions = {task: GO if go else STOP for task, go in zip(TASKS, going, strict=True)}
    tasks = plan(iteration, TASKS, decisions, gap)
    assert tasks == tuple(task for task in TASKS if task in tasks)
    assert {task for task in TASKS if decisions[task] is GO} <= set(tasks)
    assert (set(TASKS) == set(tasks)) or iteration % gap != 0


def test_validation_once_per_epoch_and_after_the_last_iteration() -> None:
    assert [i for i in range(1, 24) if due_for_validation(i, 5, 23)] == [5, 10, 15, 20, 23]
    assert [i for i in range(1, 24) if due_for_validation(i, 5, 23, on_last=False)] == [5, 10, 15, 20]
    assert not any(due_for_validation(i, 100, 23, on_last=False) for i in range(1, 24))


def test_iterations_count_from_one() -> None:
    with pytest.raises(ValueError, match="from 1"):
        plan(0, TASKS, {}, 4)
    with pytest.raises(ValueError, match="from 1"):
        due_for_validation(0, 5, 10)


def test_phases_of_the_paper() -> None:
    everything = tuple(task.name for task in TWELVE)
    assert phases(TWELVE, "none") == (everything,)
    easy_first = phases(TWELVE, "curriculum")
    assert easy_first == (("refcoco", "refcoco_plus", "refcocog", "visual7w", "guesswhat_pointing"), everything)
    assert phases(TWELVE, "anti_curriculum") == (("vqa", "visual_genome_qa", "gqa"), everything)


def test_phases_as_configured() -> None:
    chosen = phases(TWELVE, "curriculum", [["G4"], ["G4", "G2"], ["G9"]])
    assert chosen[0] == ("nlvr2", "snli_ve")
    assert chosen[1] == ("coco_retrieval", "flickr30k_retrieval", "nlvr2", "snli_ve")
    assert len(chosen) == 3  # no task is in G9


def test_a_phase_of_fixed_length() -> None:
    steps = (("a",), ("a", "b"), ("a", "b", "c"))
    phase, history = 0, []
    for iteration in range(1, 8):
        history.append(phase)
        phase = next_phase(phase, iteration, steps, {}, 2)
    assert history == [0, 0, 1, 1, 2, 2, 2]


def test_a_phase_until_its_tasks_have_stopped() -> None:
    steps = (("a", "b"), ("a", "b", "c"))
    assert next_phase(0, 7, steps, {"a": STOP, "b": GO}, "until_stopped") == 0
    assert next_phase(0, 8, steps, {"a": STOP, "b": STOP}, "until_stopped") == 1
    assert next_phase(1, 9, steps, {"a": GO, "b": GO}, "until_stopped") == 1  # never back
