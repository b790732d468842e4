"""DeepSpeed's JSON and the run's YAML: what is taken, what is refused, and what may change when a run goes on."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from engine import deepspeed_config, figures
from engine.config import load
from engine.journal import read_rows
from engine.train import main
from pipelines.errors import BadInput
from tests.engine.on_ranks import needs_deepspeed
from tests.engine.small_run import configure

RUN = ["device=cpu", "max_iterations=2", "validation.on_last=false"]


def merged(settings: dict[str, object], precision: str = "float32", clip: float = 0.0) -> dict[str, object]:
    return deepspeed_config.merged(settings, precision=precision, clip=clip, world_size=2)


@pytest.fixture(autouse=True)
def no_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing takes longer than these runs."""
    for name in ("dsg_timeline", "curves", "scores"):
        monkeypatch.setattr(figures, name, lambda folder: folder)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    configure(folder)
    return folder


@pytest.mark.parametrize(
    ("settings", "theirs", "ours"),
    [
        ({"train_batch_size": 8}, "deepspeed: train_batch_size: 8", "task_overrides.TASK.batch"),
        ({"train_micro_batch_size_per_gpu": 4}, "deepspeed: train_micro_batch_size_per_gpu: 4", "task_overrides.TASK.batch"),
        ({"gradient_accumulation_steps": 2}, "deepspeed: gradient_accumulation_steps: 2", "task_overrides.TASK.accumulation"),
        ({"gradient_clipping": 1.0}, "deepspeed: gradient_clipping: 1.0", "optimizer.clip of the run is 0.0"),
        ({"bf16": {"enabled": True}}, "deepspeed: bf16.enabled: true", "precision of the run is float32"),
        ({"fp16": {"enabled": True}}, "deepspeed: fp16.enabled: true", "precision of the run is float32"),
        ({"optimizer": {"type": "Adam"}}, "deepspeed: optimizer", "the optimizer is the run's: optimizer.*"),
        ({"scheduler": {"type": "WarmupLR"}}, "deepspeed: scheduler", "warmup.* and decay.*"),
        ({"zero_optimization": {"stage": 7}}, "deepspeed: zero_optimization.stage: 7", "stages 0 to 3"),
        ({"zero_optimization": {"stage": "two"}}, 'deepspeed: zero_optimization.stage: "two"', "stages 0 to 3"),
        ({"zero_optimization": {"stage": True}}, "deepspeed: zero_optimization.stage: true", "stages 0 to 3"),
        ({"zero_optimization": True}, "deepspeed: zero_optimization: true", "an object is wanted"),
        ({"bf16": True}, "deepspeed: bf16: true", "an object is wanted"),
    ],
)  # fmt: skip
def test_what_contradicts_the_run_is_refused_with_both_places(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], settings: dict[str, object], theirs: str, ours: str
) -> None:
    """By the command line, before anything is written."""
    (tmp_path / "ds.json").write_text(json.dumps(settings))
    arguments = ["--config", str(data / "run.yaml"), f"output={tmp_path / 'run'}", *RUN]
    assert main([*arguments, "--deepspeed_config", str(tmp_path / "ds.json")]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and said.count("\n") == 1
    assert theirs in said and ours in said
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("zero9", r"zero9: no such preset \(give a .json file, or one of zero0, zero1, zero2, zero2_offload, zero3\)"),
        ("absent.json", r"absent.json: no such file"),
        ("broken.json", r"broken.json: not a readable JSON file"),
        ("list.json", r"list.json: an object is wanted"),
        ("binary.json", r"binary.json: not a readable JSON file"),
    ],
)
def test_a_configuration_that_cannot_be_read_is_named(data: Path, tmp_path: Path, source: str, message: str) -> None:
    (tmp_path / "broken.json").write_text('{"zero_optimization": ')
    (tmp_path / "list.json").write_text("[1]")
    (tmp_path / "binary.json").write_bytes(b"\xff\xfe\x00")
    name = str(tmp_path / source) if source.endswith(".json") else source
    with pytest.raises(BadInput, match=message):
        deepspeed_config.read(name)
    with pytest.raises(BadInput, match=message):
        load(data / "run.yaml", [f"deepspeed={name}"])


def test_what_says_the_same_or_auto_is_taken() -> None:
    """DeepSpeed is given the run's own values, and what the JSON alone knows."""
    found = merged(
        {
            "train_batch_size": "auto", "optimizer": "auto", "gradient_clipping": 0.5, "bf16": {"enabled": "auto"},
            "zero_optimization": {"stage": 2, "reduce_bucket_size": "auto", "allgather_bucket_size": 7},
        },
        precision="bfloat16", clip=0.5,
    )  # fmt: skip
    assert found["gradient_clipping"] == 0.5 and found["bf16"] == {"check_grad_overflow": False, "enabled": True}
    assert found["fp16"] == {"enabled": False}
    assert found["train_batch_size"] == 2 and found["train_micro_batch_size_per_gpu"] == 1
    zero = found["zero_optimization"]
    assert isinstance(zero, dict) and zero["stage"] == 2 and zero["allgather_bucket_size"] == 7
    assert "auto" not in json.dumps(found) and "optimizer" not in found


@pytest.mark.parametrize("stage", range(4))
def test_deepspeed_does_not_clip_on_its_own(stage: int) -> None:
    """Its default is 1.0; ours is said, also where it is 0. At stage 0 our optimizer clips."""
    assert merged({"zero_optimization": {"stage": stage}})["gradient_clipping"] == 0.0
    assert merged({"zero_optimization": {"stage": stage}}, clip=2.0)["gradient_clipping"] == (2.0 if stage else 0.0)


def test_float16_wants_a_stage_that_scales_its_loss() -> None:
    assert merged({"zero_optimization": {"stage": 1}}, precision="float16")["fp16"] == {"enabled": True}
    with pytest.raises(BadInput, match="zero_optimization.stage: 0, where nobody scales the loss"):
        merged({}, precision="float16")


@needs_deepspeed
def test_a_key_that_deepspeed_does_not_know_is_named(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--config", str(data / "run.yaml"), f"output={tmp_path / 'run'}", *RUN]
    assert main([*arguments, "deepspeed.zero_optimization.stagee=1"]) == 2
    assert "error: deepspeed: DeepSpeedZeroConfig: stagee: Extra inputs" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@needs_deepspeed
@pytest.mark.parametrize(
    "form",
    [
        ["--deepspeed_config", "FILE"], ["seed=3", "--deepspeed-config=FILE"], ["--deepspeed", "--deepspeed_config", "zero2"],
        ["deepspeed=FILE"],
    ],
)  # fmt: skip
def test_the_forms_that_users_and_launchers_know_are_taken(data: Path, tmp_path: Path, form: list[str]) -> None:
    """DeepSpeed's launcher puts --local_rank before everything else."""
    (tmp_path / "ds.json").write_text('{"zero_optimization": {"stage": 2}}')
    form = [part.replace("FILE", str(tmp_path / "ds.json")) for part in form]
    arguments = ["--local_rank=0", "--config", str(data / "run.yaml"), *form, f"output={tmp_path / 'run'}", *RUN]
    assert main(arguments) == 0
    told = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert told["deepspeed"] == {"zero_optimization": {"stage": 2}}


def stopped(data: Path, folder: Path) -> list[str]:
    """A run of two iterations, by its arguments."""
    arguments = ["--config", str(data / "run.yaml"), f"output={folder}", *RUN]
    assert main(arguments) == 0
    return arguments


CHANGES = {
    "logging": "logging.every=1",
    "checkpoint": "checkpoint.keep=7",
    "threads": "threads=1",
    "data_threads": "data_threads=2",
    "ranks": "ranks.timeout_s=77",
    "backend": "backend=plain",
}


@pytest.mark.parametrize("key", [*CHANGES, pytest.param("deepspeed", marks=needs_deepspeed)])
def test_keys_that_change_no_number_may_change(data: Path, tmp_path: Path, key: str) -> None:
    stopped(data, tmp_path / "run")
    assert main(["--resume", str(tmp_path / "run"), CHANGES.get(key, "deepspeed=zero3")]) == 0
    assert read_rows(tmp_path / "run" / "events.jsonl")[-1]["event"] == "end"


@pytest.mark.parametrize(
    "change",
    ["seed=1", "max_iterations=3", "precision=bfloat16", "optimizer.clip=1", "task_overrides.answers.accumulation=2"],
)
def test_keys_that_change_numbers_are_refused(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], change: str
) -> None:
    stopped(data, tmp_path / "run")
    before = sorted((path, path.stat().st_mtime_ns) for path in (tmp_path / "run").rglob("*"))
    assert main(["--resume", str(tmp_path / "run"), change]) == 2
    said = capsys.readouterr().err
    assert f"error: {change}: a resumed run keeps its configuration" in said and "these may change: output" in said
    assert sorted((path, path.stat().st_mtime_ns) for path in (tmp_path / "run").rglob("*")) == before


def test_autoresume_starts_and_then_goes_on(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One command line for a queue: a new run, then the same one; without it a used folder is refused."""
    arguments = ["--config", str(data / "run.yaml"), f"output={tmp_path / 'run'}", *RUN]
    assert main([*arguments, "--autoresume"]) == 0
    assert main([*arguments, "--autoresume"]) == 0
    kinds = [row["event"] for row in read_rows(tmp_path / "run" / "events.jsonl")]
    assert kinds.count("start") == 1 and kinds.count("resume") == 1
    assert main(arguments) == 2 and "already holds a run" in capsys.readouterr().err
    assert main([*arguments, "--autoresume", "seed=5"]) == 2
    assert "differs from the configuration" in capsys.readouterr().err
