"""What a user can get wrong: one clear line, exit code 2, no traceback, and nothing on disk changed."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from engine import saving
from engine.assembly import assemble
from engine.config import load
from engine.cursor import Cursor
from engine.train import main
from pipelines.check import main as check
from pipelines.store.lmdb_file import LmdbFile
from pipelines.store.metadata import METADATA_KEY
from pipelines.store.reader import FeatureStore
from pipelines.world import ensure
from tests.pipelines.test_store_damage import with_metadata
from tests.reference import ROOT

QUESTIONS = "vqa/v2_OpenEnded_mscoco_train2014_questions.json"
ANNOTATIONS = "vqa/v2_mscoco_train2014_annotations.json"
ANSWERS = "vqa/trainval_label2ans.json"
CAPTIONS = "coco_retrieval/all_data_final_train_2014.jsonline"
STORE = "features/coco.lmdb"


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data, a run configuration and weights in which nothing is wrong."""
    folder = tmp_path_factory.mktemp("sound")
    sheet = yaml.safe_load(ensure(folder / "world", size="small").read_text())
    for name in ("vocab.txt", "removed.json", "vqa", "coco_retrieval", STORE):
        target = folder / name
        target.parent.mkdir(exist_ok=True)
        source = folder / "world" / name
        shutil.copytree(source, target) if source.is_dir() else shutil.copy(source, target)
    shutil.rmtree(folder / "world")
    (folder / "sheet.yaml").write_text(yaml.safe_dump(sheet))  # names ten data sets that are not there: no matter
    run = {
        "name": "bad", "model": "tiny", "data": str(folder / "sheet.yaml"), "tasks": ["vqa", "coco_retrieval"],
        "max_iterations": 1, "logging": {"console": "quiet"}, "output": str(folder / "run"),
    }  # fmt: skip
    (folder / "run.yaml").write_text(yaml.safe_dump(run))
    parts = assemble(load(folder / "run.yaml", []))
    saving.save(folder / "weights", parts.model, parts.stepper, Cursor(), keep=1)
    (folder / "weights" / "iteration-0000000").rename(folder / "checkpoint")
    (folder / "weights").rmdir()
    return folder


@pytest.fixture
def folder(sound: Path, tmp_path: Path) -> Path:
    """A copy to break."""
    shutil.copytree(sound, tmp_path, dirs_exist_ok=True)
    run = (tmp_path / "run.yaml").read_text()
    (tmp_path / "run.yaml").write_text(run.replace(str(sound), str(tmp_path)))
    return tmp_path


def listing(folder: Path) -> dict[str, str]:
    """Every file and folder, with what is in it."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "folder"
        for path in sorted(folder.rglob("*"))
    }


def refused(
    command: Callable[[list[str]], int], arguments: list[str], folder: Path, capsys: pytest.CaptureFixture[str]
) -> str:
    """The line that a command ends with."""
    before = listing(folder)
    capsys.readouterr()
    assert command(arguments) == 2
    lines = capsys.readouterr().err.splitlines()
    assert lines and all(line.startswith("error: ") for line in lines), lines
    assert listing(folder) == before, "something on disk has changed"
    if command is main:
        assert len(lines) == 1
    return "\n".join(lines)


def cut(path: Path, share: float = 0.5) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])


def replace(path: Path, old: str, new: str) -> None:
    content = path.read_text()
    assert old in content
    path.write_text(content.replace(old, new, 1))


def change_sheet(folder: Path, change: Callable[[dict], object]) -> None:
    sheet = yaml.safe_load((folder / "sheet.yaml").read_text())
    change(sheet["sets"])
    (folder / "sheet.yaml").write_text(yaml.safe_dump(sheet))


def another_image(folder: Path) -> None:
    questions = json.loads((folder / QUESTIONS).read_text())
    questions["questions"][5]["image_id"] = 999_999
    (folder / QUESTIONS).write_text(json.dumps(questions))


def another_shape(folder: Path) -> None:
    counts = FeatureStore(folder / STORE).counts.copy()
    counts[3] += 1
    with_metadata(folder / STORE, counts=counts)
    (folder / STORE / "lock.mdb").unlink(missing_ok=True)


def damage_the_tree(folder: Path) -> None:
    """Overwrite the page that LMDB's current root stands on."""
    data = folder / STORE / "data.mdb"
    content = bytearray(data.read_bytes())
    newest = max((0, 4096), key=lambda page: int.from_bytes(content[page + 144 : page + 152], "little"))
    root = int.from_bytes(content[newest + 128 : newest + 136], "little")
    content[root * 4096 + 8 : root * 4096 + 40] = b"\xff" * 32
    data.write_bytes(content)


def damage_every_record(folder: Path) -> None:
    file = LmdbFile(folder / STORE)
    content = bytearray((folder / STORE / "data.mdb").read_bytes())
    for key, offset, size in zip(file.keys, file.offsets.tolist(), file.sizes.tolist(), strict=True):
        if key != METADATA_KEY:
            content[offset + size // 2] ^= 1
    (folder / STORE / "data.mdb").write_bytes(content)


DATA = {
    "a missing annotation file": (lambda folder: (folder / ANNOTATIONS).unlink(), ANNOTATIONS, "no such file"),
    "a truncated annotation file": (lambda folder: cut(folder / QUESTIONS), QUESTIONS, ""),
    "an empty annotation file": (lambda folder: (folder / QUESTIONS).write_text(""), QUESTIONS, ""),
    "truncated JSON lines": (lambda folder: cut(folder / CAPTIONS, 0.503), CAPTIONS, "line"),
    "an image without features": (another_image, "sets.vqa.train", "convert or extract the missing images"),
    "a record of another shape": (another_shape, STORE, "regions need"),
    "a truncated store": (lambda folder: cut(folder / STORE / "data.mdb"), STORE, "truncated"),
    "a damaged store": (damage_the_tree, STORE, ""),
    "damaged records": (damage_every_record, STORE, "damaged record (checksum)"),
    "a store that is none": (lambda folder: (folder / STORE / "data.mdb").write_text("hello"), STORE, ""),
    "a missing store": (lambda folder: shutil.rmtree(folder / STORE), "sets.vqa.features", "no such file"),
    "a missing vocabulary": (lambda folder: (folder / "vocab.txt").unlink(), "vocabulary", "no such file"),
    "an answer list that is none": (lambda folder: (folder / ANSWERS).write_text("{"), ANSWERS, ""),
    "an unknown key": (
        lambda folder: change_sheet(folder, lambda sets: sets["vqa"].update(feature="x")),
        "sets.vqa.feature",
        "did you mean features?",
    ),
    "an unknown reader argument": (
        lambda folder: change_sheet(folder, lambda sets: sets["vqa"]["train"].update(question="x")),
        "sets.vqa.train.question",
        "did you mean questions?",
    ),
    "a missing data set": (
        lambda folder: change_sheet(folder, lambda sets: sets.pop("vqa")),
        "sheet.yaml: sets",
        "no data set 'vqa'",
    ),
}


@pytest.mark.parametrize("case", DATA)
def test_bad_data(case: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Found by a run and by the check that does not train."""
    damage, where, what = DATA[case]
    damage(folder)
    for command, arguments in ((main, ["--config", str(folder / "run.yaml")]), (check, [str(folder / "run.yaml")])):
        message = refused(command, arguments, folder, capsys)
        assert where in message and what in message


def test_sound_data_pass(folder: Path) -> None:
    assert check([str(folder / "run.yaml")]) == 0
    assert main(["--config", str(folder / "run.yaml")]) == 0


def test_a_split_without_answers_cannot_be_validated_on(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    change_sheet(folder, lambda sets: sets["vqa"]["val"].pop("annotations"))
    message = refused(main, ["--config", str(folder / "run.yaml")], folder, capsys)
    assert "sets.vqa.val: its annotations hold no answers" in message


def test_a_damaged_record_of_a_large_store_ends_the_run_when_it_is_read(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run does not read tens of gigabytes at its start; `pipelines.check` does."""
    monkeypatch.setattr("engine.assembly.VERIFIED_AT_START", 0)
    damage_every_record(folder)
    assert STORE in refused(check, [str(folder / "run.yaml")], folder, capsys)
    assert main(["--config", str(folder / "run.yaml")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and STORE in line and "image" in line


def drop_key(folder: Path) -> None:
    weights = load_file(folder / "checkpoint" / "weights.safetensors")
    del weights["bert.t_pooler.dense.weight"]
    save_file(weights, folder / "weights.safetensors")


def shorten_answers(folder: Path) -> None:
    answers = json.loads((folder / ANSWERS).read_text())
    (folder / ANSWERS).write_text(json.dumps(answers[:-3]))


def forget_head(folder: Path) -> None:
    weights = load_file(folder / "checkpoint" / "weights.safetensors")
    for key in weights:
        if key.startswith("vil_logit."):
            weights[key] = torch.zeros_like(weights[key])
    save_file(weights, folder / "weights.safetensors")


WEIGHTS = {
    "a missing key": (drop_key, "weights.safetensors", "1 missing keys: bert.t_pooler.dense.weight"),
    "a head that was never trained": (forget_head, "weights.safetensors", "never trained keys: vil_logit.bias"),
    "another answer vocabulary": (shorten_answers, "checkpoint", "vil_prediction.logit_fc.3"),
    "a flipped byte": (
        lambda folder: replace(folder / "checkpoint" / "cursor.json", "0", "1"),
        "checkpoint",
        "cursor.json: is not what the manifest says",
    ),
    "a truncated file": (
        lambda folder: shutil.copy(folder / "run.yaml", folder / "weights.safetensors"),
        "weights.safetensors",
        "not a readable checkpoint",
    ),
    "no such file": (lambda folder: None, "weights.safetensors", "no such file or folder"),
}


@pytest.mark.parametrize("case", WEIGHTS)
def test_bad_initial_weights(case: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    damage, name, what = WEIGHTS[case]
    damage(folder)
    message = refused(main, ["--config", str(folder / "run.yaml"), f"initial_weights={folder / name}"], folder, capsys)
    assert str(folder / name) in message and what in message


def test_a_head_of_another_size_can_start_anew(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shorten_answers(folder)
    arguments = [
        "--config",
        str(folder / "run.yaml"),
        f"initial_weights={folder / 'checkpoint'}",
        "logging.console=plain",
    ]
    assert main([*arguments, "fresh_weights=[vil_prediction]"]) == 0
    assert "; new: vil_prediction\n" in capsys.readouterr().out


CONFIGURATIONS = {
    "a typo in an override": (["stopgo.gpa=3"], "stopgo.gpa", "gap"),
    "a typo on top": (["max_iteration=3"], "max_iteration", "max_iterations"),
    "a value out of range": (["stopgo.gap=0"], "stopgo.gap", "greater than or equal to 1"),
    "not a key": (["checkpoint"], "checkpoint", "key=value"),
    "an unknown task": (["tasks=[vqa, vqav2]"], "tasks", "no task vqav2"),
    "a preset that is none": (["model=huge"], "huge", ""),
    "a row that is none": (["task_rows=[nowhere.yaml]"], "nowhere.yaml", ""),
    "another feature width": (["model.v_feature_size=7"], "model.v_feature_size is 7", ""),
    "a small word table": (["model.vocab_size=9"], "model.vocab_size", "entries"),
}


@pytest.mark.parametrize("case", CONFIGURATIONS)
def test_bad_configuration(case: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    overrides, where, what = CONFIGURATIONS[case]
    message = refused(main, ["--config", str(folder / "run.yaml"), *overrides], folder, capsys)
    assert where in message and what in message


def test_a_typo_in_the_file_is_named_with_file_and_key(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = folder / "run.yaml"
    run.write_text(run.read_text() + "stopgo: {gpa: 3}\n")
    assert refused(main, ["--config", str(run)], folder, capsys).startswith(f"error: {run}: stopgo.gpa: ")
    assert "no such file" in refused(main, ["--config", str(folder / "none.yaml")], folder, capsys)


def test_a_used_folder_is_refused_before_the_data_are_read(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "run").mkdir()
    (folder / "run" / "metrics.jsonl").write_text("")
    (folder / QUESTIONS).unlink()
    assert "already holds a run" in refused(main, ["--config", str(folder / "run.yaml")], folder, capsys)


def test_what_cannot_be_resumed(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "not a run folder" in refused(main, ["--resume", str(folder)], folder, capsys)
    assert "not a run folder" in refused(main, ["--resume", str(folder / "nowhere")], folder, capsys)
    assert main(["--config", str(folder / "run.yaml")]) == 0
    run = folder / "run"
    message = refused(main, ["--resume", str(run), "max_iterations=9"], folder, capsys)
    assert "max_iterations=9" in message and "keeps its configuration" in message
    with_other_seed = (run / "config.yaml").read_text().replace("\nseed: 0", "\nseed: 1")
    (run / "config.yaml").write_text(with_other_seed)
    message = refused(main, ["--resume", str(run)], folder, capsys)
    assert str(run / "config.yaml") in message and "differs from the configuration" in message
    (run / "config.yaml").write_text(with_other_seed.replace("\nseed: 1", "\nseed: 0"))
    (run / "events.jsonl").unlink()
    assert "events.jsonl: no such file" in refused(main, ["--resume", str(run)], folder, capsys)
    cut(run / "checkpoints" / "iteration-0000001" / "weights.safetensors")
    message = refused(main, ["--resume", str(run)], folder, capsys)
    assert "no usable checkpoint" in message and "weights.safetensors: is not what the manifest says" in message


@pytest.mark.parametrize("module", ["engine.train", "pipelines.check"])
def test_the_commands_print_no_traceback(module: str, folder: Path) -> None:
    cut(folder / QUESTIONS)
    arguments = ["--config"] if module == "engine.train" else []
    command = [sys.executable, "-m", module, *arguments, str(folder / "run.yaml")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ") and QUESTIONS in line
