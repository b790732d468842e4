"""The rules of what holds a step back, on made-up accounts."""

from __future__ import annotations

from dataclasses import replace

import pytest

from engine.bottleneck import RULES, About, Shares, findings, verdict

FED = Shares(data=0.0, copy=0.01, host=0.08, bandwidth=0.2, gemm=0.6, reduce=0.0, optimizer=0.1)
CPU, GPU = About("cpu", seconds=0.5, launches=900), About("cuda", seconds=0.02, launches=2100, kernel_seconds=0.004)


@pytest.mark.parametrize(
    ("shares", "about", "name", "mend"),
    [
        (replace(FED, data=0.4), CPU, "data-bound", "data_threads"),
        (replace(FED, copy=0.3), GPU, "copy-bound", "resident_features"),
        (replace(FED, host=0.7), GPU, "host-bound", "cuda_graphs=true"),
        (replace(FED, host=0.7), replace(GPU, graphs=True), "host-bound", "only the update"),
        (replace(FED, host=0.7), CPU, "host-bound", "larger batches"),
        (replace(FED, bandwidth=0.6), CPU, "bandwidth-bound", "ceiling"),
        (replace(FED, reduce=0.4), GPU, "reduce-bound", "accumulation"),
        (replace(FED, optimizer=0.5), CPU, "optimizer-bound", "accumulation"),
        (FED, CPU, "GEMM-bound", "precision"),
    ],
)
def test_one_share_too_large(shares: Shares, about: About, name: str, mend: str) -> None:
    found = verdict(shares, about)
    assert found is not None and found.name == name
    assert mend in found.mend


def test_every_kind_of_rule_is_tested_above() -> None:
    assert {rule.name for rule in RULES} == {
        "data-bound", "copy-bound", "host-bound", "bandwidth-bound", "reduce-bound", "optimizer-bound",
    }  # fmt: skip


def test_the_words() -> None:
    found = verdict(replace(FED, host=0.8), GPU)
    assert str(found).startswith(
        "host-bound: 2,100 launches for 4 ms of work; the device waits 80 % of the step for the host; "
    )
    unknown = verdict(replace(FED, host=0.8), About("cpu"))
    assert unknown is not None and unknown.says == "80 % of the step lies between kernels (Python, autograd, small ops)"


def test_the_largest_gain_comes_first() -> None:
    """An update of 30 % could give 15, waiting of 20 % could give 18."""
    found = findings(Shares(data=0.2, optimizer=0.3), CPU)
    assert [one.name for one in found] == ["data-bound", "optimizer-bound"]
    assert [one.gain for one in found] == pytest.approx([0.18, 0.15])


def test_what_was_not_measured_is_not_spoken_of() -> None:
    assert verdict(Shares(), CPU) is None
    assert verdict(Shares(data=0.01), CPU) is None
    assert findings(Shares(data=0.06), CPU) == [], "4 % to be gained is not worth a word"
