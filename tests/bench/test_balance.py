"""The rows of a batch over ranks, from the lengths that were measured."""

from __future__ import annotations

import numpy as np

from bench.balance import main, simulate, spread


def test_spread_is_the_largest_over_the_mean() -> None:
    rows = np.array([1, 2, 3, 6])
    assert spread(rows, [np.array([0, 1]), np.array([2, 3])]) == 9 / 6
    assert spread(rows, [np.array([3]), np.array([0, 1, 2])]) == 1


def test_dealing_balances_better_than_the_samplers_order() -> None:
    found = simulate(8, 20)
    assert len(found) == 12
    for name, row in found.items():
        assert 1 <= row["mean"] <= row["worst"] < 1.05, name
        assert row["mean"] <= row["in_order"] + 2e-3, name


def test_it_prints_a_row_a_task(capsys) -> None:
    assert main(["--batches", "2"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 13
