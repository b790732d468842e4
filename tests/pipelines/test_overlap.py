"""Which test images other data sets train on: counted by hand, on published files, and in a world that knows."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipelines.datasets import load_task
from pipelines.errors import BadInput
from pipelines.held_out import listed
from pipelines.overlap import Survey, read_links, survey
from pipelines.removal import load_list
from pipelines.runs import read_run
from pipelines.sheet import inspect_sheet
from pipelines.wordpiece import WordPiece
from pipelines.world.plan import source_of
from pipelines.world.statements import nlvr2_images
from tests.pipelines import small_sheet, small_world
from tests.reference import reference


def surveyed(path: Path) -> Survey:
    sheet, _ = inspect_sheet(path, [])
    assert sheet is not None
    readers = read_run(path).readers
    return survey(sheet, readers, [name for name in sheet.sets if name in readers])


def edit(path: Path, change: Callable[[Any], object]) -> Path:
    content = yaml.safe_load(path.read_text())
    change(content)
    path.write_text(yaml.safe_dump(content))
    return path


def shares(found: Survey) -> dict[tuple[str, str], float]:
    """What is above 0."""
    return {(row, column): share for row, cells in found.matrix().items() for column, share in cells.items() if share}


def test_the_matrix_of_a_few_files_counted_by_hand(tmp_path: Path) -> None:
    found = surveyed(small_sheet.build(tmp_path))
    assert shares(found) == {
        ("coco_retrieval", "guesswhat_pointing"): 50,  # 6 of 6, 7; COCO's 70 is not Visual Genome's
        ("coco_retrieval", "visual_genome_qa"): 50,  # 7, which is Visual Genome's 70
        ("guesswhat_pointing", "coco_retrieval"): 50,  # 2 of 2, 10; Visual Genome's 2 is another image
        ("gqa", "visual_genome_qa"): 100,  # 1, 71
        ("gqa", "coco_retrieval"): 50,  # 71 is COCO's 5, validated on; COCO's 1 is another image
        ("nlvr2", "nlvr2"): 100,  # the diagonal counts too
    }
    assert set(found.matrix()["visual_genome_qa"].values()) == {None}, "it has no test split"
    assert found.held_out == {
        "coco": {"2", "5", "6", "7", "10"}, "visual_genome": {"1", "70", "71"},
        "nlvr2": {"test-1-0-img0", "test-1-0-img1"},
    }  # fmt: skip
    assert found.absent == ()


def test_without_links_linked_images_are_two(tmp_path: Path) -> None:
    found = surveyed(edit(small_sheet.build(tmp_path), lambda c: c.pop("links")))
    assert ("coco_retrieval", "visual_genome_qa") not in shares(found)
    assert shares(found)["gqa", "visual_genome_qa"] == 100


def test_sets_without_source_share_by_their_store(tmp_path: Path) -> None:
    def forget(content: Any) -> None:
        del content["links"]
        for name, entry in content["sets"].items():
            del entry["source"]
            entry["features"] = f"{'vg' if name in ('gqa', 'visual_genome_qa') else name}.lmdb"

    found = surveyed(edit(small_sheet.build(tmp_path), forget))
    assert set(shares(found)) == {("gqa", "visual_genome_qa"), ("nlvr2", "nlvr2")}

    edit(tmp_path / "sheet.yaml", lambda c: c["sets"]["gqa"].update(source="visual_genome"))
    assert shares(surveyed(tmp_path / "sheet.yaml"))["gqa", "visual_genome_qa"] == 100, "the name goes with the store"


def test_what_is_not_there_is_left_out_and_told(tmp_path: Path) -> None:
    sheet = small_sheet.build(tmp_path)
    for name, split in (("coco_retrieval", "test"), ("guesswhat_pointing", "val"), ("nlvr2", "train")):
        (tmp_path / small_sheet.file_name(name, split)).unlink()
    found = surveyed(sheet)
    assert found.absent == ("coco_retrieval.test", "guesswhat_pointing.val", "nlvr2.train")
    assert set(shares(found)) == {
        ("guesswhat_pointing", "coco_retrieval"), ("gqa", "visual_genome_qa"), ("gqa", "coco_retrieval"),
    }  # fmt: skip


BAD_LINKS = {
    "truncated": ('[{"image_id": 1, "coco', "malformed or truncated JSON"),
    "no list": ('{"image_id": 1}', "expected a list|a list"),
    "no id": ('[{"coco_id": 7}]', "no key 'image_id'"),
    "another type": ('[{"image_id": 1, "coco_id": [7]}]', "'coco_id' must be a text or a whole number"),
}


@pytest.mark.parametrize("case", BAD_LINKS)
def test_damaged_links_are_refused(tmp_path: Path, case: str) -> None:
    content, message = BAD_LINKS[case]
    sheet = small_sheet.build(tmp_path)
    (tmp_path / "image_data.json").write_text(content)
    with pytest.raises(BadInput, match=rf"image_data\.json.*({message})"):
        surveyed(sheet)


def test_absent_links_and_links_of_nobody_are_refused(tmp_path: Path) -> None:
    sheet = small_sheet.build(tmp_path)
    (tmp_path / "image_data.json").unlink()
    with pytest.raises(BadInput, match=r"sheet\.yaml: links: no such file: .*image_data\.json \(fetch"):
        surveyed(sheet)
    edit(sheet, lambda c: [entry.update(source="coco") for entry in c["sets"].values()])
    assert inspect_sheet(sheet, [])[1] == [], "a part of a larger sheet"
    edit(sheet, lambda c: [entry.pop("source") for entry in c["sets"].values()])
    _, problems = inspect_sheet(sheet, [])
    assert [str(problem) for problem in problems] == [
        f"{sheet}: links: no data set has the source visual_genome "
        "(give Visual Genome's sets the source visual_genome, or leave links out)"
    ]


# --- published files --------------------------------------------------------------------------------------------------


def captions_of(folder: Path, images: list[str]) -> dict[str, Any]:
    """Arguments of the captions reader for images of which only a list is there."""
    path = folder / f"{len(list(folder.iterdir()))}.jsonl"
    path.write_text("".join(json.dumps({"sentences": ["x"], "img_path": image}) + "\n" for image in images))
    return {"captions": [str(path)]}


def names(relative: str) -> list[str]:
    return [line.split()[0] for line in reference(relative).read_text().splitlines()]


def published(folder: Path, sets: dict[str, dict[str, Any]], **keys: object) -> Survey:
    content = {name: {"features": "none.lmdb", **entry} for name, entry in sets.items()}
    sheet = folder / "sheet.yaml"
    sheet.write_text(yaml.safe_dump({"format": 1, "vocabulary": "none.txt", "sets": content, **keys}))
    return surveyed(sheet)


def counted(found: Survey, row: str, column: str) -> int:
    share = found.matrix()[row][column]
    assert share is not None
    return round(share * len(found.tests[row]) / 100)


def test_refcoco_images_in_vqa(tmp_path: Path) -> None:
    boxes = json.loads(reference("data/refcoco/refcoco_unc_val_gt_boxes_1500img.json").read_text())
    refs = [
        {"ref_id": n, "ann_id": n, "image_id": image["image_id"], "split": "val",
         "sentences": [{"sent_id": n, "raw": "x"}]} for n, image in enumerate(boxes)
    ]  # fmt: skip
    instances = {"annotations": [{"id": n, "bbox": [0, 0, 9, 9]} for n in range(len(refs))]}
    (tmp_path / "refs.json").write_text(json.dumps(refs))
    (tmp_path / "instances.json").write_text(json.dumps(instances))
    questions = [str(reference(f"data/vqav2/subset60k/vqa_questions_{split}.json.gz")) for split in ("train", "valid")]
    refcoco = {"refs": "refs.json", "instances": "instances.json", "split": "val"}
    for used, expected in ((questions[:1], 590), (questions, 673)):
        vqa = {"train": {"questions": used[:1]}, "val": {"questions": used[-1:]}}
        found = published(tmp_path, {"vqa": vqa, "refcoco": {"train": refcoco, "val": refcoco, "test": refcoco}})
        assert len(found.tests["refcoco"]) == 1500
        assert counted(found, "refcoco", "vqa") == expected
        assert counted(found, "refcoco", "refcoco") == 1500, "the diagonal: it trains on them here"


def test_karpathy_test_images_in_captions_val2017(tmp_path: Path) -> None:
    official = {"captions": [str(reference("data/coco_retrieval/captions_val2017.json"))]}
    test = captions_of(tmp_path, names("data/coco_retrieval/splits/karpathy_test_images.txt"))
    found = published(tmp_path, {"coco_retrieval": {"train": official, "val": official, "test": test}})
    assert len(found.tests["coco_retrieval"]) == 5000
    assert counted(found, "coco_retrieval", "coco_retrieval") == 593


def test_flickr30k_splits(tmp_path: Path) -> None:
    folder = reference("data/flickr30k")
    entities, snli_ve = (
        captions_of(tmp_path, names(path))
        for path in ("data/flickr30k/splits/test.txt", "data/snli_ve/flickr30k_test.lst")
    )
    train = captions_of(tmp_path, names("data/flickr30k/multi30k_train_captions/train_images.txt"))
    valid = {"captions": [str(folder / "valid_ann.jsonl")]}
    for used, expected in ((train, 903), (valid, 34)):
        found = published(tmp_path, {
            "coco_retrieval": {"train": snli_ve, "val": snli_ve, "test": entities},
            "flickr30k_retrieval": {"train": used, "val": used},
        })  # fmt: skip
        assert len(found.tests["coco_retrieval"]) == 1000
        assert counted(found, "coco_retrieval", "coco_retrieval") == 1000, "Entities' test list is SNLI-VE's"
        assert counted(found, "coco_retrieval", "flickr30k_retrieval") == expected


def test_real_links_fold_visual_genome_into_coco(tmp_path: Path) -> None:
    """Photos of Visual Genome that are COCO's too, tested on by VG QA; which of them do VQA's questions show?"""
    assert read_links(reference("data/visual_genome/vg_image_data_26img.json")) == {}, "26 photos, none of COCO's"
    with gzip.open(reference("data/visual_genome/emma_vg_gqa_coco.jsonl.gz"), "rt") as lines:
        photos = [json.loads(line)["dataset"] for line in lines]
    pairs = {p["Visual Genome"]["id"]: p["COCO"]["id"] for p in photos if {"Visual Genome", "COCO"} <= p.keys()}
    questions = reference("data/vqav2/subset60k/vqa_questions_train.json.gz")
    with gzip.open(questions, "rt") as file:
        asked = {str(question["image_id"]) for question in json.load(file)["questions"]}
    both = [genome for genome, coco in pairs.items() if coco in asked]
    assert 0 < len(both) < len(pairs)

    records = [{"image_id": int(genome), "coco_id": int(coco)} for genome, coco in pairs.items()]
    (tmp_path / "image_data.json").write_text(json.dumps(records))
    asks = [{"id": int(genome), "qas": [{"question": "?", "answer": "a", "qa_id": genome}]} for genome in pairs]
    (tmp_path / "qa.json").write_text(json.dumps(asks))
    vqa, genome_qa = {"questions": [str(questions)]}, {"questions": ["qa.json"]}
    found = published(tmp_path, {
        "vqa": {"source": "coco", "train": vqa, "val": vqa},
        "visual_genome_qa": {"source": "visual_genome", "train": genome_qa, "val": genome_qa, "test": genome_qa},
    }, links="image_data.json")  # fmt: skip
    assert len(found.tests["visual_genome_qa"]) == len(set(pairs.values()))
    assert counted(found, "visual_genome_qa", "vqa") == len({pairs[genome] for genome in both})
    assert found.held_out["visual_genome"] == pairs.keys()
    assert found.held_out["coco"] == set(pairs.values())


# --- the embedded world -----------------------------------------------------------------------------------------------


def scenes_of(name: str, images: set[str]) -> set[int]:
    """The numbers of the scenes that these images show: the same number, the same picture, whatever it is called."""
    store = next(iter(small_world.sheet().entry(name).stores().values())).stem
    plan = small_world.plan()
    numbers: Any = nlvr2_images(plan) if store == "nlvr2" else {str(k): v for k, v in plan.sources[store].items()}
    return {numbers[image] for image in images}


def shown(name: str, *splits: str) -> set[str]:
    return {image for split in splits for e in small_world.examples(name, split) for image in e.images}


def test_the_world_overlaps_as_it_was_built() -> None:
    """The pictures of the plan's splits that got an annotation, compared as scenes: no ids, no links, no readers' keys."""
    plan, found = small_world.plan(), surveyed(small_world.world() / "sheet.yaml")
    test: dict[str, set[int]] = {}
    rest: dict[str, set[int]] = {}
    for name, splits in plan.splits.items():
        numbers = plan.sources[source_of(name)]
        annotated = scenes_of(name, shown(name, *small_world.SPLITS))
        for part, wanted in ((test, True), (rest, False)):
            drawn = {numbers[image] for split in splits if ("test" in split) is wanted for image in splits[split]}
            part[name] = drawn & annotated
    for row in plan.splits:
        for column in plan.splits:
            expected = 100 * len(test[row] & rest[column]) / len(test[row])
            assert found.matrix()[row][column] == pytest.approx(expected), (row, column)
    assert len(shares(found)) > 20


def test_the_worlds_own_list_leaves_no_test_image() -> None:
    """Through the loader that training uses, compared as scenes."""
    sheet, run = small_world.sheet(), read_run(small_world.world() / "sheet.yaml")
    held = listed(sheet, run.readers)
    assert held is not None
    tokenizer = WordPiece.load(sheet.vocabulary)
    specs = [spec for spec in run.specs if sheet.entry(spec.name).test is not None]
    tested = {number for spec in specs for number in scenes_of(spec.name, shown(spec.name, "test"))}
    counts = load_list(small_world.world() / "removed.json").sets
    for spec in specs:
        for split in ("train", "val"):
            keys = held.keys(spec.name, split)
            data = load_task(spec, sheet, split, tokenizer, removed=keys)
            left = {data.store.keys()[row] for row in data.image_rows.ravel().tolist()}
            assert not scenes_of(spec.name, left) & tested, (spec.name, split)
            examples = small_world.examples(spec.name, split)
            kept = [e.id for e in examples if not scenes_of(spec.name, set(e.images)) & tested]
            assert data.ids.tolist() == kept, "nothing else is left out"
            assert data.removed_examples == len(examples) - len(kept) == counts[spec.name][split].removed_examples
        whole = load_task(spec, sheet, "test", tokenizer, removed=held.keys(spec.name, "test"))
        assert len(whole) == len(small_world.examples(spec.name, "test")), "test splits stay as they are"
