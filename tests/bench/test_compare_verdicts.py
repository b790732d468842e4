"""What a comparison says of made-up times: how often it cries wolf, what it finds, and how wide its intervals are."""

from __future__ import annotations

import math

import numpy as np
import pytest

from bench.compare.verdicts import (
    ALARM,
    FASTER,
    NOISY,
    OP,
    SAME,
    SLOWER,
    STEP,
    TASK,
    Estimate,
    Key,
    average,
    difference,
    judge,
    of_starts,
    of_visits,
)
from engine.student import quantile

GATE = 0.03
STARTS, TASKS, OPS = 8, 12, 11
LUCK, NOISE, VISITS = 0.006, 0.03, 4


def simulated(random: np.random.Generator, slower: float = 0.0) -> dict[Key, Estimate]:
    """A comparison: luck of each start, common to its rows and of each row; noise of each visit with neighbours' bursts.

    `slower`: the share of HEAD's step that was planted into the first op.
    """
    common = random.normal(0, LUCK, (STARTS, 1))
    luck = common + random.normal(0, LUCK, (STARTS, TASKS + OPS))
    noise = NOISE * random.standard_t(3, (STARTS, TASKS + OPS, VISITS))
    values = np.median(luck[..., None] + noise, -1)
    values[:, :TASKS] += math.log(1 + slower)
    values[:, TASKS] += 10 * slower
    found = {(STEP, STEP): of_starts(values[:, :TASKS].mean(1))}
    names = [(TASK, str(n)) for n in range(TASKS)] + [(OP, str(n)) for n in range(OPS)]
    return found | {key: of_starts(column) for key, column in zip(names, values.T, strict=True)}


def test_equal_code_is_rarely_told_apart() -> None:
    """Over all rows together, in two comparisons of a hundred at most; and the intervals shown hold 1 in 95 of 100."""
    random = np.random.default_rng(0)
    comparisons = [judge(simulated(random), GATE) for _ in range(3000)]
    alarms = sum(any(row.verdict in (SLOWER, FASTER) for row in rows) for rows in comparisons)
    assert alarms / 3000 <= 1.3 * ALARM
    outside = np.mean([not row.low < 1 < row.high for rows in comparisons for row in rows])
    assert 0.035 < outside < 0.06, "medians of a few heavy-tailed visits are lighter than normal"
    assert not any(row.fails(GATE) for rows in comparisons for row in rows if row.kind == STEP)


def test_a_twentieth_is_always_found_and_its_op_named() -> None:
    random = np.random.default_rng(1)
    comparisons = [judge(simulated(random, slower=0.05), GATE) for _ in range(500)]
    assert all(rows[0].verdict == SLOWER and rows[0].fails(GATE) for rows in comparisons)
    named = [row for rows in comparisons for row in rows if (row.kind, row.name) == (OP, "0")]
    assert all(row.fails(GATE) for row in named)


def test_luck_of_processes_is_not_a_difference_though_pairs_within_them_agree() -> None:
    """Three starts whose visits all agree within themselves, and not with each other."""
    random = np.random.default_rng(2)
    base = [1 + 0.001 * random.standard_normal(100) for _ in range(3)]
    visits = [[(1.0, luck * time) for time in start] for luck, start in zip((1.02, 0.99, 1.0), base, strict=True)]
    (row,) = judge({(TASK, "a"): of_starts(of_visits(visits))}, GATE)
    assert row.low < 1 < row.high and row.verdict == NOISY


def test_a_start_is_the_median_of_its_visits() -> None:
    assert of_visits([[(1.0, 1.1), (2.0, 2.2), (1.0, 50.0)], [(1.0, 1.0)]]) == pytest.approx([math.log(1.1), 0])


@pytest.mark.parametrize(
    ("mean", "error", "verdict", "fails"),
    [
        (0.05, 0.002, SLOWER, True),
        (0.02, 0.002, SLOWER, False),
        (-0.05, 0.002, FASTER, False),
        (0.0, 0.002, SAME, False),
        (0.006, 0.002, SAME, False),  # its 95 % interval excludes 1, that of the verdict does not
        (0.05, 0.03, NOISY, False),
        (0.0, 0.03, NOISY, False),
    ],
)
def test_verdicts(mean: float, error: float, verdict: str, fails: bool) -> None:
    (row,) = judge({(STEP, STEP): Estimate(mean, error, 7)}, GATE)
    assert (row.verdict, row.fails(GATE)) == (verdict, fails)
    assert row.ratio == pytest.approx(math.exp(mean))
    half = quantile(0.95, 7) * error
    assert (row.low, row.high) == pytest.approx((math.exp(mean - half), math.exp(mean + half)))
    assert row.judged_low < row.low < row.high < row.judged_high


def test_many_rows_need_more_evidence_than_few() -> None:
    estimate = Estimate(0.02, 0.004, 7)
    alone = judge({(TASK, "a"): estimate}, GATE)[0]
    crowd = judge({(TASK, str(n)): estimate for n in range(100)}, GATE)[0]
    assert (alone.low, alone.high) == (crowd.low, crowd.high)
    assert crowd.judged_low < alone.judged_low


def test_where_is_easier_to_say_than_whether() -> None:
    """The same op, beside a step that is slower for sure and beside one that is not."""
    op = {(OP, str(n)): Estimate(0.3, 0.03, 3) for n in range(20)}
    beside = {mean: judge({(STEP, STEP): Estimate(mean, 0.001, 3), **op}, GATE)[1] for mean in (0.0, 0.05)}
    assert (beside[0.0].verdict, beside[0.05].verdict) == (NOISY, SLOWER)
    assert beside[0.0].low == beside[0.05].low


def test_samples_that_are_no_pairs_are_welchs() -> None:
    """The interval's half width by hand; unknown where a side has one value only."""
    found = difference(head=[0.1, 0.2, 0.3], base=[0.0, 0.1, 0.0, 0.1])
    variances = 0.01 / 3, (4 * 0.05**2 / 3) / 4
    assert found.mean == pytest.approx(0.15) and found.error == pytest.approx(math.sqrt(sum(variances)))
    freedom = sum(variances) ** 2 / (variances[0] ** 2 / 2 + variances[1] ** 2 / 3)
    assert found.freedom == int(freedom)
    assert difference([0.1], [0.0, 0.1]).interval(0.95) == (0.0, math.inf)
    both = average([found, found])
    assert both.mean == pytest.approx(0.15) and both.error == pytest.approx(found.error / math.sqrt(2))


@pytest.mark.parametrize(
    ("level", "freedom", "expected"),
    [(0.95, 1, 12.706), (0.95, 2, 4.303), (0.95, 7, 2.365), (0.99, 9, 3.250), (0.999, 5, 6.869), (0.5, 30, 0.683)],
)
def test_quantiles_of_student(level: float, freedom: int, expected: float) -> None:
    """Of a printed table."""
    assert quantile(level, freedom) == pytest.approx(expected, abs=6e-4)


def test_quantiles_are_those_of_drawn_values() -> None:
    drawn = np.abs(np.random.default_rng(3).standard_t(6, 400_000))
    assert np.mean(drawn < quantile(0.99, 6)) == pytest.approx(0.99, abs=1e-3)
    with pytest.raises(ValueError, match="0 degrees"):
        quantile(0.95, 0)
