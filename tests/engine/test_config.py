"""Run configurations: presets, inheritance, overrides, and one line per error that names source and key path."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from engine.config import RunConfig, config_hash, describe, load, load_tasks, resolved
from pipelines.errors import BadInput
from pipelines.world.plan import SCALES

RUNS = Path(__file__).resolve().parents[2] / "configs" / "runs"
WORLD = RUNS / "world.yaml"


def write(folder: Path, text: str, name: str = "run.yaml") -> Path:
    (folder / name).write_text(text)
    return folder / name


def message(path: Path, *overrides: str) -> str:
    with pytest.raises(BadInput) as error:
        load(path, list(overrides))
    return str(error.value)


@pytest.mark.parametrize("path", sorted(RUNS.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_run_loads_and_its_resolved_form_reads_back_equal(path: Path, tmp_path: Path) -> None:
    config = load(path)
    again = load(write(tmp_path, resolved(config)))
    assert again == config
    assert config_hash(again) == config_hash(config)
    assert config.name == path.stem


def test_the_default_run_is_tiny_and_trains_the_twelve() -> None:
    config = load(WORLD)
    assert len(load_tasks(config)[1]) == 12
    assert config.model.hidden_size < 200
    assert config.folder == "runs/world"


def test_the_published_run() -> None:
    config = load(RUNS / "twelve_in_one.yaml")
    rows = load_tasks(config)[1]
    assert (config.model.num_hidden_layers, config.model.v_num_hidden_layers, config.model.n_bridges) == (12, 6, 6)
    assert (config.optimizer.eps, config.optimizer.weight_decay, config.optimizer.head_lr) == (1e-6, 0.01, 1e-4)
    assert (config.stopgo.gap, config.stopgo.stop_threshold, config.stopgo.go_threshold) == (4, 0.001, 0.005)
    assert [row.batch for row in rows if row.name in ("vqa", "refcoco", "nlvr2")] == [128, 256, 64]


def test_world_sizes_are_those_that_can_be_built() -> None:
    assert [load(WORLD, [f"world.size={size}"]).world.size for size in SCALES] == list(SCALES)
    assert "world.size: Input should be" in message(WORLD, "world.size=huge")


def test_numbers_that_yaml_1_1_reads_as_text(tmp_path: Path) -> None:
    assert yaml.safe_load("4e-5") == "4e-5"
    run = write(tmp_path, f"extends: {WORLD}\noptimizer: {{base_lr: 4e-5, head_lr: 1E-4}}\n")
    optimizer = load(run, ["optimizer.eps=1e-8"]).optimizer
    assert (optimizer.base_lr, optimizer.head_lr, optimizer.eps) == (4e-5, 1e-4, 1e-8)


def test_extends_merges_sections_and_overrides_come_last(tmp_path: Path) -> None:
    write(tmp_path, f"extends: {WORLD}\nseed: 1\nstopgo: {{gap: 8, controller: paper}}\n", "base.yaml")
    child = write(tmp_path, "extends: base.yaml\nstopgo: {gap: 16}\nname: child\n", "child.yaml")
    config = load(child, ["seed=7", "stopgo.patience=3", "tasks=[gqa, vqa]", "task_overrides.gqa.batch=4"])
    assert (config.name, config.seed) == ("child", 7)
    assert (config.stopgo.gap, config.stopgo.controller, config.stopgo.patience) == (16, "paper", 3)
    rows = load_tasks(config)[1]
    assert [(row.name, row.batch) for row in rows] == [("gqa", 4), ("vqa", 32)]


def test_a_model_is_a_preset_a_file_or_keys(tmp_path: Path) -> None:
    tiny = load(WORLD).model
    file = write(tmp_path, yaml.safe_dump(tiny.model_dump(mode="json")), "model.yaml")
    assert load(WORLD, [f"model={file}"]).model == tiny
    assert load(WORLD, ["model=vilbert_6l_6c"]).model.hidden_size == 768
    assert load(WORLD, ["model.hidden_dropout_prob=0"]).model == tiny.model_copy(update={"hidden_dropout_prob": 0.0})
    inline = write(tmp_path, "name: x\nmax_iterations: 3\nmodel: {hidden_size: 96}\n")
    assert load(inline).model.hidden_size == 96
    assert "presets: tiny" in message(WORLD, "model=huge")


def test_a_task_outside_the_default_may_be_named() -> None:
    config = load(WORLD, ["tasks=[flickr30k_grounding]"])
    assert [row.name for row in load_tasks(config)[1]] == ["flickr30k_grounding"]


def test_task_rows_from_another_file(tmp_path: Path) -> None:
    row = "{title: Counting, number: 5, group: G1, head: vil_prediction, reader: 'my.readers:read', batch: 8, lr: 6e-5,"
    row += " max_tokens: 16, max_regions: 37, loss: soft_labels, metric: soft_accuracy}"
    file = write(tmp_path, f"tasks:\n  counting: {row}\n", "counting.yaml")
    config = load(WORLD, [f"task_rows=[{file}]", "tasks=[counting, vqa]"])
    assert [task.name for task in load_tasks(config)[1]] == ["counting", "vqa"]
    assert "no such file" in message(WORLD, "task_rows=[none.yaml]")


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("optimizer.wieght_decay=0", "optimizer.wieght_decay: unknown key; did you mean weight_decay?"),
        ("optimiser.eps=1", "optimiser: unknown key; did you mean optimizer?"),
        ("task_overrides.vqa.bacth=3", "task_overrides.vqa.bacth: unknown key; did you mean batch?"),
        ("task_overrides.vqq.batch=3", "task_overrides: no task vqq"),
        ("tasks=[vqa, vqq]", "tasks: no task vqq (there are vqa, "),
        ("tasks=[]", "tasks [] must name at least one task"),
        ("tasks=[vqa, vqa]", "none twice"),
        ("max_iterations=0", "max_iterations: Input should be greater than or equal to 1"),
        ("max_iterations=ten", "max_iterations: Input should be a valid integer"),
        ("optimizer=3", "optimizer: needs a mapping of keys: betas"),
        ("format=2", "format: Input should be 1"),
        ("stopgo.enabled=maybe", "stopgo.enabled: Input should be a valid boolean"),
        ("decay.kind=steps", "boundaries are needed by kind steps"),
        ("decay={kind: steps, boundaries: [5, 5]}", "must ascend"),
        ("model.hidden_size=97", "hidden_size 97 is no multiple"),
        ("model.task_rows=3", "task gqa has number 15, but the task-token table has 3 rows"),
        ("model.max_position_embeddings=20", "positions are fewer than max_tokens"),
        ("curriculum={kind: curriculum, groups: [[G7]]}", "curriculum.groups: no group G7"),
        (
            "masking.words=0.2",
            "masking.words: no task of this run hides words or regions: nobody would read it (leave it out",
        ),
        ("seed", "not of the form key=value"),
        ("seed=[", "no valid YAML"),
    ],
)
def test_wrong_overrides_name_themselves_the_key_and_the_mend(override: str, expected: str) -> None:
    text = message(WORLD, override)
    assert expected in text
    assert "\n" not in text
    assert "override " in text or "tiny.yaml" in text or "world.yaml" in text


def test_wrong_keys_of_files_name_the_file_that_has_them(tmp_path: Path) -> None:
    write(tmp_path, f"extends: {WORLD}\nstopgo: {{gpa: 8}}\nmodel: {{hidden_sise: 3}}\n", "base.yaml")
    child = write(tmp_path, "extends: base.yaml\nseeed: 1\nthreads: none\n", "child.yaml")
    lines = message(child).splitlines()
    assert len(lines) == 4
    found = "\n".join(lines)
    assert f"{tmp_path}/base.yaml: stopgo.gpa: unknown key; did you mean gap?" in found
    assert f"{tmp_path}/base.yaml: model.hidden_sise: unknown key; did you mean hidden_size?" in found
    assert f"{tmp_path}/child.yaml: seeed: unknown key; did you mean seed?" in found
    assert f"{tmp_path}/child.yaml: threads: Input should be a valid integer" in found


def test_a_required_key_is_named(tmp_path: Path) -> None:
    assert "run.yaml: max_iterations: this key is required" in message(write(tmp_path, "name: x\nmodel: tiny\n"))


def test_files_that_are_no_configuration(tmp_path: Path) -> None:
    assert "no such file" in message(tmp_path / "none.yaml")
    assert "no valid YAML in line 3" in message(write(tmp_path, "a: 1\nb: [\n"))
    assert "not a mapping" in message(write(tmp_path, "[1, 2]"))
    assert "'a' is given twice" in message(write(tmp_path, "a: 1\na: 2\n"))
    assert "no valid YAML" in message(write(tmp_path, "a: !!python/object/apply:os.system [ls]\n"))
    assert "in turn" in message(write(tmp_path, "extends: run.yaml\n"))
    assert "extends: not the name of a file" in message(write(tmp_path, "extends: 3\n"))


def test_stop_go_off_needs_a_curriculum_with_a_length() -> None:
    off = ["stopgo.enabled=false", "curriculum.kind=curriculum"]
    assert "curriculum.iterations must be a number" in message(WORLD, *off)
    assert load(WORLD, [*off, "curriculum.iterations=20"]).curriculum.iterations == 20
    assert "no task of this run is in its groups" in message(WORLD, "curriculum.kind=curriculum", "tasks=[vqa]")


def test_the_hash_covers_what_changes_numbers() -> None:
    base = config_hash(load(WORLD))
    for same in ("output=elsewhere", "logging.console=quiet", "checkpoint.every=3"):
        assert config_hash(load(WORLD, [same])) == base
    for other in ("seed=3", "blind=true", "task_overrides.vqa.batch=7", "model.hidden_dropout_prob=0.2"):
        assert config_hash(load(WORLD, [other])) != base


def test_configurations_are_frozen_and_every_key_is_documented() -> None:
    config = load(WORLD)
    with pytest.raises(ValueError, match="frozen"):
        config.seed = 3  # type: ignore[misc]
    schema = RunConfig.model_json_schema()
    undocumented = [
        f"{name}.{key}"
        for name, section in [("RunConfig", schema), *schema["$defs"].items()]
        for key, field in section["properties"].items()
        if "description" not in field and "$ref" not in field
    ]
    assert undocumented == []


def test_every_key_is_described() -> None:
    rows = describe()
    assert ("stopgo.gap", "default 4") in [(key, default) for key, default, _ in rows]
    assert ("max_iterations", "required") in [(key, default) for key, default, _ in rows]
    assert not [key for key, _, text in rows if not text]
