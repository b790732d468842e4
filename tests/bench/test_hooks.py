"""The two layouts that `bench.hooks` compares are the model's, and every hook is counted once."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from bench.hook_layouts import HEAD, NARROW, Standing, flat, published
from bench.hook_watch import HookWatch
from bench.hooks import main
from engine.model.config import ModelConfig
from engine.model.published import PUBLISHED_HEADS
from engine.model.vilbert import ViLBERT


@pytest.mark.parametrize("config", [ModelConfig(), NARROW], ids=["full", "narrow"])
def test_the_layouts_are_those_of_the_model(config: ModelConfig) -> None:
    theirs, ours = published(config), flat(config)
    with torch.device("meta"):
        model = ViLBERT(config, PUBLISHED_HEADS, pretraining=True)
    assert theirs.tensors == 559
    assert ours.tensors == len(list(model.parameters()))
    assert ours.values == sum(parameter.numel() for parameter in model.parameters())
    running = list(model.trunk.parameters()) + list(model.heads[HEAD].parameters())
    assert ours.running_tensors == len(running)
    shapes = [shape for name in theirs.running for shape in theirs.shapes[name].values()]
    assert sum(torch.Size(shape).numel() for shape in shapes) == sum(parameter.numel() for parameter in running)


def test_a_step_gives_each_running_parameter_a_gradient() -> None:
    for layout in (flat(NARROW), published(NARROW)):
        module = Standing(layout, torch.bfloat16)
        module(torch.ones((), requires_grad=True)).backward()
        assert sum(parameter.grad is not None for parameter in module.parameters()) == layout.running_tensors


def test_hooks_are_counted_by_kind_and_timed_once() -> None:
    linear, watch = nn.Linear(2, 2), HookWatch()
    before = Tensor.register_hook

    def inner(parameter: Tensor) -> None:
        sum(range(200_000))

    with watch:
        for parameter in linear.parameters():
            parameter.register_post_accumulate_grad_hook(inner)
        linear.register_forward_hook(lambda module, given, out: out.register_hook(lambda gradient: None) and None)
        linear(torch.ones(1, 2)).sum().backward()
    assert Tensor.register_hook is before
    assert watch.fired == {"register_post_accumulate_grad_hook": 2, "register_forward_hook": 1, "register_hook": 1}
    assert len(watch.tensors) == 2 and watch.seconds.thread > 0.001 and watch.seconds.wall > 0.001
    watch.reset()
    linear(torch.ones(1, 2)).sum().backward()  # a hook that was registered then still counts
    assert watch.fired["register_post_accumulate_grad_hook"] == 2


@pytest.mark.parametrize("wrong", [["--stages", "4"], ["--stages", "x"], ["--steps", "0"], ["--layouts", "round"]])
def test_what_cannot_be_measured_is_refused(wrong: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(wrong) == 2
    assert "error: " in capsys.readouterr().err


@pytest.mark.slow
def test_two_ranks_count_both_layouts(tmp_path: Path) -> None:
    assert main(["--stages", "1,3", "--steps", "1", "--json", str(tmp_path / "hooks.json")]) == 0
    found = json.loads((tmp_path / "hooks.json").read_text())["stages"]
    assert found["1"]["published"]["tensors_with_hooks"] == 559 > 8 * found["1"]["flat"]["tensors_with_hooks"]
    for stage in found.values():
        for row in stage.values():
            assert not row["reads_by_us"]
        assert sum(stage["flat"]["collectives"].values()) <= 7
        assert stage["published"]["hooks_fired"] > 5 * stage["flat"]["hooks_fired"]
