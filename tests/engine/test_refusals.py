"""What is damaged or hostile is refused, counted: 23 of 23 damaged checkpoints of two ranks, 3 of 3 hostile pickles."""

from __future__ import annotations

import os
import pickle
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import lmdb
import pytest

from engine.checkpoint import checkpoints, newest_valid
from engine.train import main
from pipelines.convert.__main__ import main as convert
from pipelines.errors import BadInput
from pipelines.readers import refer
from tests.engine.launch import TORCHRUN, started
from tests.engine.small_run import configure
from tests.recorded import record

FLIPS, TRUNCATIONS = 20, 3


@pytest.fixture(scope="module")
def run_of_two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of two ranks, with two checkpoints."""
    data = tmp_path_factory.mktemp("data")
    configure(data)
    arguments = ["--config", str(data / "run.yaml"), f"output={data / 'run'}", "max_iterations=4", "checkpoint.every=2"]
    with started(TORCHRUN, arguments, data / "run") as run:
        assert run.wait(180) == 0, run.output()
    return data / "run"


def flipped(whole: bytes, draw: random.Random) -> bytes:
    """With one byte changed, though not from one white space of a JSON file to another."""
    while True:
        place, other = draw.randrange(len(whole)), draw.randrange(1, 256)
        new = bytes([whole[place] ^ other])
        if not (whole[place : place + 1].isspace() and new.isspace()):
            return whole[:place] + new + whole[place + 1 :]


def test_damaged_checkpoints_are_refused_23_of_23(run_of_two: Path) -> None:
    newest, older = checkpoints(run_of_two / "checkpoints")
    files, draw = sorted(newest.iterdir()), random.Random(3)
    assert [file.name for file in files] == [
        "cursor.json", "manifest.json", "optimizer-00000-of-00002.safetensors", "optimizer-00001-of-00002.safetensors",
        "weights.safetensors",
    ]  # fmt: skip
    damages: list[tuple[Path, Callable[[bytes], bytes]]] = [
        *((files[number % len(files)], lambda whole: flipped(whole, draw)) for number in range(FLIPS)),
        *((file, lambda whole: whole[: draw.randrange(len(whole))]) for file in files[-TRUNCATIONS:]),
    ]
    refused = 0
    for file, damage in damages:
        whole = file.read_bytes()
        file.write_bytes(damage(whole))
        used, lines = newest_valid(run_of_two / "checkpoints")
        refused += used == older and len(lines) == 1 and str(newest) in lines[0]
        file.write_bytes(whole)
    assert refused == len(damages) == 23
    assert newest_valid(run_of_two / "checkpoints") == (newest, [])
    record("faults", "damaged checkpoints of two ranks", {"refused": refused, "of": len(damages)})


def test_a_resume_says_what_it_refused_and_takes_the_one_before(
    run_of_two: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(run_of_two, tmp_path / "run")
    newest, older = checkpoints(tmp_path / "run" / "checkpoints")
    file = newest / "optimizer-00001-of-00002.safetensors"
    file.write_bytes(flipped(file.read_bytes(), random.Random(5)))
    assert main(["--resume", str(tmp_path / "run"), "logging.console=plain"]) == 0
    said = capsys.readouterr()
    text = "".join((said.out + said.err).split())  # the console wraps its lines
    assert f"checkpointrefused:{file}:isnotwhatthemanifestsays" in text
    assert f"continuingfrom{older}" in text


class Canary:
    """Makes a file when it is unpickled carelessly."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str, int]]:
        return os.open, (str(self.path), os.O_CREAT | os.O_WRONLY)


def test_hostile_pickles_are_refused_3_of_3(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    canary, configuration = tmp_path / "canary", tmp_path / "run.yaml"
    configure(tmp_path)
    hostile = pickle.dumps([{"ref_id": 1}, Canary(canary)], protocol=2)

    def as_initial_weights() -> str:
        (tmp_path / "pytorch_model.bin").write_bytes(hostile)
        initial = f"initial_weights={tmp_path / 'pytorch_model.bin'}"
        assert main(["--config", str(configuration), initial]) == 2
        return capsys.readouterr().err

    def as_a_feature_record() -> str:
        with lmdb.open(str(tmp_path / "old"), map_size=1 << 20) as environment, environment.begin(write=True) as writer:
            writer.put(b"7", hostile)
        assert convert(["vilbert-lmdb", str(tmp_path / "old"), str(tmp_path / "new")]) == 2
        return capsys.readouterr().err

    def as_an_annotation_cache() -> str:
        (tmp_path / "refs(umd).p").write_bytes(hostile)
        (tmp_path / "instances.json").write_text('{"annotations": []}')
        with pytest.raises(BadInput) as caught:
            list(refer.read(split="train", refs=tmp_path / "refs(umd).p", instances=tmp_path / "instances.json"))
        return str(caught.value)

    refused = 0
    for attempt in (as_initial_weights, as_a_feature_record, as_an_annotation_cache):
        said = attempt()
        refused += ("asks for" in said or "wants to run" in said) and not canary.exists()
    assert refused == 3
    os.close(pickle.loads(hostile)[1])  # noqa: S301 - the test's own bytes
    assert canary.exists(), "the canary must be able to sing"
    record("faults", "hostile pickles", {"refused": refused, "of": 3})
