"""The measurement of mining, on a few images."""

from __future__ import annotations

import json

import pytest

from bench.mining import main


def test_the_command_is_measured_as_users_run_it(capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["--images", "60", "--regions", "1", "--by", "captions"]) == 0
    *said, measured = capfd.readouterr().out.splitlines()
    assert said[0] == "captions, by captions: 60 images x 59 neighbours"
    numbers = json.loads(measured)
    # A child's mark begins at the size of the process that starts it, which is pytest's here.
    assert 0.1 < numbers["peak_rss_gb"] < 2
    assert numbers["seconds"] > 0.1
    assert numbers["conditions"]["threads"]
