"""One DeepSpeed configuration from the user's JSON and the run's own keys. Imports neither torch nor deepspeed.

What a run says (batch, precision, clipping, optimizer) has one owner, the run's YAML; the JSON keeps what is DeepSpeed's:
ZeRO, offload, communication. A JSON that says the other thing is refused, with both places named.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipelines.errors import BadInput

PRESETS = Path(__file__).resolve().parent.parent / "configs" / "deepspeed"
AUTO = "auto"
"""What other libraries let a JSON say where they fill in a value themselves: here it is the same as leaving it out."""

_OURS: dict[str, str] = {
    "train_batch_size": "batch is a key of each task (task_overrides.TASK.batch), and DeepSpeed knows only one",
    "train_micro_batch_size_per_gpu": "batch is a key of each task (task_overrides.TASK.batch), and DeepSpeed knows only one",
    "gradient_accumulation_steps": "accumulation is a key of each task (task_overrides.TASK.accumulation)",
    "optimizer": "the optimizer is the run's: optimizer.*",
    "scheduler": "the schedule is the run's: warmup.* and decay.*",
    "curriculum_learning": "the curriculum is the run's: curriculum.*",
    "data_efficiency": "batches are the run's",
}
"""Keys that a JSON cannot have, and who has them."""


def read(source: str | Path) -> dict[str, Any]:
    """The JSON of a file, or of a preset in configs/deepspeed. Raises BadInput naming the file."""
    path = Path(source)
    if path.suffix != ".json":
        path = PRESETS / f"{source}.json"
        if not path.is_file():
            names = ", ".join(sorted(file.stem for file in PRESETS.glob("*.json")))
            raise BadInput(f"deepspeed: {source}", "no such preset", f"give a .json file, or one of {names}")
    try:
        found = json.loads(path.read_text())
    except FileNotFoundError:
        raise BadInput(path, "no such file", "check the path") from None
    except (OSError, ValueError) as error:
        raise BadInput(path, f"not a readable JSON file: {error}") from None
    if not isinstance(found, dict):
        raise BadInput(path, "an object is wanted here")
    return found


def stage_of(settings: Mapping[str, Any]) -> int:
    """The ZeRO stage that a JSON names; 0 where it names none."""
    return int(settings.get("zero_optimization", {}).get("stage", 0))


def offloads(settings: Mapping[str, Any]) -> bool:
    """Whether the optimizer's state leaves the device."""
    device = settings.get("zero_optimization", {}).get("offload_optimizer", {}).get("device", "none")
    return str(device) != "none"


def merged(
    settings: Mapping[str, Any], *, precision: str, clip: float, world_size: int, device: str = "cpu"
) -> dict[str, Any]:
    """What DeepSpeed is given: the user's JSON and the run's own values. Raises BadInput for a contradiction.

    `precision` and `clip`: the run's. The three batch keys that DeepSpeed insists on are those of one sample a rank, for our
    batches differ from task to task.
    """
    settings = _without_auto(settings)
    for key, who in _OURS.items():
        if key in settings:
            raise BadInput(f"deepspeed: {key}", f"{json.dumps(settings[key])}, but {who}", "leave it out of the JSON")
    for key in ("zero_optimization", "bf16", "fp16"):
        if not isinstance(settings.get(key, {}), Mapping):
            raise BadInput(f"deepspeed: {key}", f"{json.dumps(settings[key])}, but an object is wanted here")
    stage = _at(settings, "zero_optimization.stage") or 0
    if type(stage) is not int or stage not in range(4):
        raise BadInput("deepspeed: zero_optimization.stage", f"{json.dumps(stage)}, ZeRO has stages 0 to 3")
    wanted: dict[str, tuple[Any, str]] = {
        "gradient_clipping": (clip, f"optimizer.clip of the run is {clip}"),
        "bf16.enabled": (precision == "bfloat16", f"precision of the run is {precision}"),
        "fp16.enabled": (precision == "float16", f"precision of the run is {precision}"),
    }
    for path, (ours, why) in wanted.items():
        theirs = _at(settings, path)
        if theirs is not None and theirs != ours:
            raise BadInput(
                f"deepspeed: {path}", f"{json.dumps(theirs)}, but {why}", "let both say the same, or the run alone"
            )
    # At stage 0 there is nothing to shard: our optimizer keeps its own float32 masters and clips, and DeepSpeed need not know.
    wraps = stage > 0
    if precision == "float16" and not wraps:
        raise BadInput("deepspeed: zero_optimization.stage", "0, where nobody scales the loss that float16 needs scaled",
                       "stage 1, or precision: bfloat16")  # fmt: skip
    result = dict(settings)
    result |= {
        "train_batch_size": world_size,
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": clip if wraps else 0.0,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "bf16": {
            "check_grad_overflow": False,
            **settings.get("bf16", {}),
            "enabled": wraps and precision == "bfloat16",
        },
        "fp16": {**settings.get("fp16", {}), "enabled": precision == "float16"},
        "zero_optimization": {
            **_zero_defaults(stage, clip, offloads(settings), device),
            **settings.get("zero_optimization", {}),
        },
    }
    result.setdefault("steps_per_print", None)
    return result


def _zero_defaults(stage: int, clip: float, offload: bool, device: str) -> dict[str, Any]:
    """What we would write where a JSON is silent: on GPUs four or five buckets, reduced while backward goes on; on a CPU, which
    could not do both at once, one for all gradients; and no norm that the host waits for."""
    overlaps = device == "cuda"
    defaults: dict[str, Any] = {
        "contiguous_gradients": True,
        "overlap_comm": overlaps,
        "reduce_bucket_size": 60_000_000 if overlaps else 500_000_000,
    }
    if stage in (1, 2) and not clip and not offload:
        defaults["compute_grad_norm"] = False  # ours stays on the device
    if stage == 3:
        defaults["stage3_param_persistence_threshold"] = (
            0  # the model is one leaf: small parameters come with the large
        )
    return defaults


def _without_auto(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that say something."""
    return {
        key: _without_auto(value) if isinstance(value, Mapping) else value
        for key, value in settings.items()
        if value != AUTO
    }


def _at(settings: Mapping[str, Any], path: str) -> Any:
    value: Any = settings
    for key in path.split("."):
        value = value.get(key) if isinstance(value, Mapping) else None
    return value
