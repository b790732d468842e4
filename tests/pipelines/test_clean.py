"""`python -m pipelines.clean`, the removal list that it writes, and what loading leaves out by it."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipelines.check import main as check
from pipelines.clean import main
from pipelines.errors import BadInput
from pipelines.held_out import HeldOut, held_out, listed
from pipelines.overlap_figure import percent
from pipelines.removal import load_list
from pipelines.runs import read_run
from pipelines.sheet import Sheet, inspect_sheet
from tests.pipelines import small, small_sheet, small_world
from tests.reference import ROOT


@pytest.fixture
def sheet(tmp_path: Path) -> Path:
    return small_sheet.build(tmp_path)


def edit(path: Path, change: Callable[[Any], object]) -> Path:
    content = yaml.safe_load(path.read_text())
    change(content)
    path.write_text(yaml.safe_dump(content))
    return path


def opened(path: Path) -> tuple[Sheet, dict[str, str]]:
    sheet, _ = inspect_sheet(path, [])
    assert sheet is not None
    return sheet, dict(read_run(path).readers)


def test_what_was_removed_is_written_down(sheet: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(sheet)]) == 0
    removed = load_list(sheet.with_name("removed.json"))
    assert {name: {s: part.removed_images for s, part in parts.items()} for name, parts in removed.sets.items()} == {
        "coco_retrieval": {"train": ("2",), "val": ("5",)},  # 5: GQA tests on it, as Visual Genome's 71
        "guesswhat_pointing": {"train": ("6",), "val": ()},
        "visual_genome_qa": {"train": ("1", "70"), "val": ("71",)},
        "gqa": {"train": (), "val": ()},
        "nlvr2": {"train": ("test-1-0-img0", "test-1-0-img1"), "val": ()},
    }
    of_train = {
        name: (parts["train"].examples, parts["train"].removed_examples) for name, parts in removed.sets.items()
    }
    assert of_train == {
        "coco_retrieval": (8, 2), "guesswhat_pointing": (4, 2), "visual_genome_qa": (6, 4), "gqa": (4, 0), "nlvr2": (6, 2),
    }  # fmt: skip
    assert (removed.training.examples, removed.training.removed_examples) == (28, 10)
    assert set(removed.tests) == {"coco_retrieval", "guesswhat_pointing", "gqa", "nlvr2"}
    path, known = next(iter(removed.tests["gqa"].files.items()))
    assert (path, known.bytes) == ("gqa_test.json", sheet.with_name("gqa_test.json").stat().st_size)
    output = capsys.readouterr().out
    assert "35.7 % of all; mean over data sets 35.0 %" in " ".join(output.split())
    assert "the paper: about 11 %" in " ".join(output.split())
    assert f"wrote {sheet.with_name('removed.json')}\n" in output


def test_the_matrix_has_the_papers_orientation(sheet: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(sheet), "--sets", "gqa", "visual_genome_qa", "coco_retrieval"]) == 0
    cells = {line.split()[2]: line.replace("│", " ").split()[2:] for line in capsys.readouterr().out.splitlines()
             if re.match(r"│ [A-Z] ", line)}  # fmt: skip
    assert cells == {"coco_retrieval": ["0", "0", "50"], "gqa": ["50", "0", "100"], "visual_genome_qa": ["–"] * 3}
    assert not sheet.with_name("removed.json").exists(), "a part of the sets makes no list"


def test_cleaning_again_changes_nothing(sheet: Path) -> None:
    assert main([str(sheet)]) == 0
    first = sheet.with_name("removed.json").read_bytes()
    assert main([str(sheet)]) == 0
    assert sheet.with_name("removed.json").read_bytes() == first


def test_check_says_what_is_unclean_and_writes_nothing(sheet: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(sheet), "--check"]) == 1
    output = capsys.readouterr().out
    assert "unclean: 50 % of the test images of coco_retrieval are in train or val of visual_genome_qa\n" in output
    assert output.endswith("no removal list: unclean\n")
    assert not sheet.with_name("removed.json").exists()

    assert main([str(sheet)]) == 0
    assert main([str(sheet), "--check"]) == 0
    assert capsys.readouterr().out.endswith("no test image is in any train or val split\n")

    small_sheet.write(sheet.parent, "gqa", "train", ["3", "1"])
    assert main([str(sheet), "--check"]) == 0, "a train file that changes cannot bring a test image back"
    capsys.readouterr()
    small_sheet.write(sheet.parent, "gqa", "test", ["3"])
    assert main([str(sheet), "--check"]) == 1
    output = capsys.readouterr().out
    assert f"removed.json: stale: {sheet.with_name('gqa_test.json')} has changed" in output
    assert "unclean: 100 % of the test images of gqa are in train or val of gqa\n" in output


def test_a_sheet_that_names_no_list_is_told_how(sheet: Path, capsys: pytest.CaptureFixture[str]) -> None:
    edit(sheet, lambda c: c.pop("removed"))
    assert main([str(sheet)]) == 0
    assert capsys.readouterr().out.endswith(f"training obeys it once {sheet} says\nremoved: sheet.removed.json\n")
    edit(sheet, lambda c: c.update(removed="sheet.removed.json"))
    assert listed(*opened(sheet)) is not None


def test_what_cannot_be_known_is_said(sheet: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sheet.with_name("gqa_test.json").unlink()
    edit(sheet, lambda c: c.pop("links"))
    edit(sheet, lambda c: c["sets"].update(mine={"features": "x", "train": {}, "val": {}, "test": {}}))
    (sheet.parent / "run.yaml").write_text(yaml.safe_dump({"data": str(sheet)}))
    assert main([str(sheet.parent / "run.yaml")]) == 0
    notes = capsys.readouterr().err.splitlines()
    assert [note.partition(":")[0] + note.partition(":")[2].partition(":")[0] for note in notes] == [
        "note gqa.test", "note mine", "note visual_genome",
    ]  # fmt: skip


def test_a_sheet_of_which_nothing_is_there_makes_no_list(sheet: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for file in (*sheet.parent.glob("*_*.jsonl"), *sheet.parent.glob("*_t*.json"), *sheet.parent.glob("*_val.json")):
        file.unlink()
    assert main([str(sheet)]) == 2
    assert "no annotation file of its data sets is there" in capsys.readouterr().err
    assert not sheet.with_name("removed.json").exists()


@pytest.mark.parametrize("suffix", [".png", ".svg"])
def test_the_picture(sheet: Path, suffix: str) -> None:
    picture = sheet.with_name(f"overlap{suffix}")
    assert main([str(sheet), "--sets", "coco_retrieval", "gqa", "--plot", str(picture)]) == 0
    start = picture.read_bytes()[:300]
    assert start.startswith(b"\x89PNG") if suffix == ".png" else b"<svg" in start


def test_whole_per_cent_never_hide_a_leak() -> None:
    assert [percent(share) for share in (None, 0, 0.02, 0.5, 42.4, 99.7, 100)] == [
        "–",
        "0",
        "<1",
        "0",
        "42",
        ">99",
        "100",
    ]


BAD_ARGUMENTS = {
    "a set that is none": (["--sets", "gqq"], "no data set 'gqq'"),
    "a picture that is none": (["--plot", "overlap.txt"], "end its name in .png, .svg, .pdf"),
    "a folder that is none": (["--plot", "nowhere/x.png"], "no such folder: nowhere"),
    "a list that cannot be written": (["--out", "vocab.txt/x.json"], "cannot be written"),
}


@pytest.mark.parametrize("case", BAD_ARGUMENTS)
def test_bad_arguments(case: str, sheet: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments, message = BAD_ARGUMENTS[case]
    arguments = [str(sheet.with_name("vocab.txt") / "x.json") if "vocab" in word else word for word in arguments]
    assert main([str(sheet), *arguments]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and message in line


def test_the_command_prints_no_traceback(sheet: Path) -> None:
    path = sheet.with_name("coco_retrieval_test.jsonl")
    path.write_text(path.read_text()[:-20])
    command = [sys.executable, "-m", "pipelines.clean", str(sheet)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"error: {path}:4: ")


# --- a list that does not hold ----------------------------------------------------------------------------------------


def another_test_file(folder: Path) -> None:
    small_sheet.write(folder, "coco_retrieval", "test", ["6", "7", "3"])


def another_argument(folder: Path) -> None:
    shutil.copy(folder / "gqa_test.json", folder / "copy.json")
    edit(folder / "sheet.yaml", lambda c: c["sets"]["gqa"]["test"].update(questions=["copy.json"]))


def another_source(folder: Path) -> None:
    edit(folder / "sheet.yaml", lambda c: c["sets"]["guesswhat_pointing"].update(source="photos"))


def another_train_source(folder: Path) -> None:
    edit(folder / "sheet.yaml", lambda c: c["sets"]["visual_genome_qa"].update(source="genome"))


def another_link(folder: Path) -> None:
    links = [{"image_id": 70, "coco_id": 8}]
    (folder / "image_data.json").write_text(json.dumps(links))


def no_links(folder: Path) -> None:
    edit(folder / "sheet.yaml", lambda c: c.pop("links"))


def another_test_split(folder: Path) -> None:
    edit(folder / "sheet.yaml", lambda c: c["sets"]["visual_genome_qa"].update(test={"questions": ["gqa_test.json"]}))


STALE = {
    "a test file that changed": (another_test_file, r"coco_retrieval_test\.jsonl has changed"),
    "a test split read from elsewhere": (another_argument, r"sets\.gqa\.test of the sheet has changed"),
    "another source": (another_source, r"the source of guesswhat_pointing was coco"),
    "another source of a set that tests on nothing": (
        another_train_source,
        r"the source of visual_genome_qa was visual",
    ),
    "links that changed": (another_link, r"image_data\.json has changed"),
    "links that went": (no_links, "made with other links"),
    "a test split that came": (another_test_split, "made without the test split of visual_genome_qa"),
}


@pytest.mark.parametrize("case", STALE)
def test_a_stale_list_is_refused(case: str, sheet: Path) -> None:
    change, reason = STALE[case]
    assert main([str(sheet)]) == 0
    change(sheet.parent)
    with pytest.raises(
        BadInput, match=rf"removed\.json: the removal list is stale: .*{reason}.* \(make it again: python"
    ):
        listed(*opened(sheet))


def test_files_that_are_not_there_do_not_make_it_stale(sheet: Path) -> None:
    assert main([str(sheet)]) == 0
    before = listed(*opened(sheet))
    for name in ("gqa_test.json", "coco_retrieval_test.jsonl", "image_data.json", "gqa_train.json"):
        sheet.with_name(name).unlink()
    after = listed(*opened(sheet))
    assert before is not None and after is not None
    assert after.by_source == before.by_source


DAMAGE: dict[str, tuple[Callable[[str], str], str]] = {
    "truncated": (lambda text: text[: len(text) // 2], "malformed or truncated JSON"),
    "an image taken out": (lambda text: text.replace('"6",\n   "7"', '"6"'), "damaged or changed by hand"),
    "another format": (lambda text: text.replace('"format": 1', '"format": 2'), "format: no removal list"),
    "a key too many": (lambda text: text.replace('"format": 1', '"format": 1, "x": 1'), "x: no removal list"),
    "a list": (lambda text: "[]", "no removal list"),
    "another file": (lambda text: "format: 1", "malformed or truncated JSON"),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_a_damaged_list_is_refused(case: str, sheet: Path, capsys: pytest.CaptureFixture[str]) -> None:
    damage, message = DAMAGE[case]
    assert main([str(sheet)]) == 0
    path = sheet.with_name("removed.json")
    changed = damage(path.read_text())
    assert changed != path.read_text()
    path.write_text(changed)
    with pytest.raises(BadInput, match=rf"removed\.json.*{message}"):
        listed(*opened(sheet))
    capsys.readouterr()
    assert main([str(sheet), "--check"]) == 2
    assert message in capsys.readouterr().err
    assert main([str(sheet)]) == 0, "and is made again over the damaged one"
    listed(*opened(sheet))


# --- what a run may use -----------------------------------------------------------------------------------------------


def test_without_a_list_the_test_splits_that_are_there_are_read(sheet: Path) -> None:
    sheet.with_name("nlvr2_test.jsonl").unlink()
    loaded, readers = opened(sheet)
    said: list[str] = []
    held = held_out(loaded, readers, ["gqa"], said.append)
    assert held.path is None
    assert held.keys("visual_genome_qa", "train") == {"1", "70", "71"}
    assert held.keys("guesswhat_pointing", "val") == {"2", "5", "6", "7", "10"}
    assert held.keys("guesswhat_pointing", "test") == held.keys("nlvr2", "train") == frozenset()
    assert [line.rpartition(": ")[2] for line in said] == ["comparing with the test images of 3 data sets", "nlvr2"]


def test_a_test_split_that_was_never_there_is_said(sheet: Path) -> None:
    test = sheet.with_name("nlvr2_test.jsonl")
    test.rename(sheet.with_name("later"))
    assert main([str(sheet)]) == 0
    said: list[str] = []
    assert held_out(*opened(sheet), ["gqa"], said.append).path == sheet.with_name("removed.json")
    assert said == ["test splits that are not there, so their images cannot be kept out of training: nlvr2"]
    sheet.with_name("later").rename(test)
    with pytest.raises(BadInput, match="made without the test split of nlvr2"):
        held_out(*opened(sheet), ["gqa"], said.append)


def test_both_images_of_a_pair_count(tmp_path: Path) -> None:
    path = small.build(tmp_path)
    examples = small.EXAMPLES["pairs"]
    data = small.load(path, "pairs", removed=frozenset({"3", "none of its images"}))
    assert data.ids.tolist() == [example.id for example in examples if "3" not in example.images]
    left, right = (sum(example.images[side] == "3" for example in examples) for side in (0, 1))
    assert left and right
    assert (data.removed_examples, data.removed_images) == (left + right, ("3",))


def test_removed_examples_need_no_features(tmp_path: Path) -> None:
    path = small.build(tmp_path)
    first = small.EXAMPLES["captions"][0]
    small.EXAMPLES["captions"][0] = dataclasses.replace(first, images=("far away",))
    assert len(small.load(path, "captions", removed=frozenset({"far away"}))) == 39


def test_a_split_of_test_images_alone_is_refused(tmp_path: Path) -> None:
    path = small.build(tmp_path)
    with pytest.raises(BadInput, match=r"sets\.captions\.train: all of its 40 examples show test images"):
        small.load(path, "captions", removed=frozenset(small.IMAGES))


def test_settle_names_what_tests_on_the_images(tmp_path: Path) -> None:
    data = small.load(small.build(tmp_path), "captions", removed=frozenset({"3", "4"}))
    sheet, _ = inspect_sheet(tmp_path / "sheet.yaml", [])
    assert sheet is not None
    source = sheet.source("captions")
    tests = {"pairs": frozenset({(source, "3"), (source, "4")}), "answers": frozenset({(source, "3")}),
             "phrases": frozenset({("elsewhere", "3")})}  # fmt: skip
    with pytest.raises(BadInput, match=r"show test images, of pairs \(2 images\), answers \(1 images\) \(python -m"):
        HeldOut(sheet, None, {source: frozenset({"3", "4"})}, tests=tests).settle(data)
    HeldOut(sheet, tmp_path / "removed.json").settle(data)


def test_check_counts_what_is_removed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    world = small_world.world()
    assert check([str(world / "sheet.yaml"), "--tasks", "vqa", "--skip-records"]) == 0
    rows = [line.replace("│", " ").split() for line in capsys.readouterr().out.splitlines() if "train" in line]
    part = load_list(world / "removed.json").sets["vqa"]["train"]
    assert rows[0][2:5] == [str(part.examples), str(part.images), str(part.removed_examples)]

    stale = tmp_path / "stale"
    shutil.copytree(world, stale)
    test = stale / "vqa" / "v2_OpenEnded_mscoco_test2015_questions.json"
    test.write_text(test.read_text() + "\n")
    assert check([str(stale / "sheet.yaml"), "--tasks", "vqa", "--skip-records"]) == 2
    assert f"error: {stale / 'removed.json'}: the removal list is stale: {test} has changed" in capsys.readouterr().err
