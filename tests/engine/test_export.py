"""An exported folder is the same model, also where the data have gone, and a damaged one is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer

from engine.asking import ask
from engine.evaluate import main as evaluate
from engine.export import main
from engine.images import Pictures, stored
from engine.predict import main as predict
from engine.report.__main__ import main as report
from engine.trained import load_trained
from pipelines.errors import BadInput
from tests.engine.small_run import ROWS
from tests.pipelines.small import ANSWERS, EXAMPLES


@pytest.fixture(scope="module")
def run(undisturbed: Callable[[str], Path]) -> Path:
    return undisturbed("float32")


@pytest.fixture(scope="module")
def exported(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("export") / "model"
    assert main([str(run), str(folder)]) == 0
    return folder


def test_equal_logits_with_the_data_and_without(run: Path, exported: Path, small_data: Path) -> None:
    whole, alone = load_trained(run), load_trained(exported)
    for task in ROWS["tasks"]:
        batch = next(whole.batches(whole.data(task, "val")))
        assert torch.equal(whole.logits(batch), alone.logits(batch))
    with_data = load_trained(exported, overrides=[f"data={small_data / 'sheet.yaml'}"])
    data = with_data.data("answers", "val")
    assert torch.equal(
        with_data.logits(next(with_data.batches(data))), whole.logits(next(whole.batches(whole.data("answers", "val"))))
    )


def test_it_answers_without_its_data(run: Path, exported: Path) -> None:
    whole, alone = load_trained(run), load_trained(exported)
    example = EXAMPLES["answers"][0]
    pictures = stored(whole, "answers", example.images)
    assert ask(alone, "answers", [example.text], Pictures(pictures.store, pictures.keys)) == ask(
        whole, "answers", [example.text], pictures
    )
    for ask_for_data in (lambda: stored(alone, "answers", ["1"]), lambda: alone.data("answers", "val")):
        with pytest.raises(BadInput, match="data=SHEET"):
            ask_for_data()


def test_the_files(exported: Path, run: Path) -> None:
    config = json.loads((exported / "config.json").read_text())
    assert config["hidden_size"] == 16 and config["stopgo"]["tasks"]["pairs"]["images"] == 2
    assert json.loads((exported / "labels.json").read_text()) == {"answer_head": ANSWERS, "pair_head": ["0", "1"]}
    newest = max((run / "checkpoints").iterdir())
    ours, theirs = load_file(exported / "model.safetensors"), load_file(newest / "weights.safetensors")
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)
    tokenizer, text = Tokenizer.from_file(str(exported / "tokenizer.json")), "What is RED?"
    ids, _ = load_trained(run).tokenizer.encode_batch([text], 99)
    assert tokenizer.encode(text).ids == ids.tolist()


def test_the_model_card_has_the_scores_of_the_journal(exported: Path, run: Path) -> None:
    rows = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    card = (exported / "README.md").read_text()
    assert "after iteration 12; these weights are its `iteration-0000012`" in " ".join(card.split())
    for row in (row for row in rows if row["event"] == "result"):
        line = next(line for line in card.splitlines() if line.startswith(f"| {row['task']} |") and "accuracy" in line)
        assert [cell.strip() for cell in line.split("|")[3:7]] == [
            f"{100 * row[key]:.1f}" for key in ("score", "best", "majority", "blind")
        ]


@pytest.mark.parametrize("name", ["model.safetensors", "labels.json", "run.yaml", "config.json", "vocab.txt"])
def test_a_damaged_folder_is_refused(exported: Path, tmp_path: Path, name: str) -> None:
    folder = tmp_path / "copy"
    folder.mkdir()
    for file in exported.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    damaged = bytearray((folder / name).read_bytes())
    damaged[len(damaged) // 2 if name != "config.json" else 0] ^= 1
    (folder / name).write_bytes(damaged)
    with pytest.raises(BadInput, match=name):
        load_trained(folder)


def test_the_commands_say_what_is_wrong(exported: Path, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(run), str(exported)]) == 2
    assert "exists already" in capsys.readouterr().err
    assert predict([str(exported), "--task", "answers", "--image", "1", "--text", "red"]) == 2
    assert "data=SHEET.yaml" in capsys.readouterr().err


@pytest.mark.parametrize(("command", "named"), [(evaluate, "data=SHEET.yaml"), (report, "no journal")])
def test_what_an_exported_folder_lacks_is_named(
    command: Callable[[list[str]], int], named: str, exported: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command([str(exported)]) == 2
    assert named in capsys.readouterr().err


def test_overrides_may_follow_options(run: Path, tmp_path: Path) -> None:
    """As the documentation writes them, and as argparse alone would not take them."""
    asked = [str(run), "--task", "answers", "--image", EXAMPLES["answers"][0].images[0], "--text", "red", "threads=1"]
    assert predict(asked) == 0
    assert report([str(run), "--no-pictures", "-o", str(tmp_path / "page.html"), "threads=1"]) == 0


def test_an_empty_folder_is_no_file_of_weights(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert evaluate([str(tmp_path)]) == 2
    assert "neither a run folder" in capsys.readouterr().err
