"""Readers on the real annotation files: every file, the reader that reads it, and how many records it gives."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest

from pipelines.examples import Choice, Example, Label, Region, SoftAnswers
from pipelines.files import lines, open_json
from pipelines.readers import (
    captions,
    conceptual_captions,
    entities,
    gqa,
    guesswhat,
    nlvr2,
    refer,
    shared_photos,
    snli_ve,
    visual_genome,
    visual_genome_regions,
    vqa,
)
from tests.reference import reference

VQA = "vqav2/subset60k/vqa_questions_{0}.json.gz", "vqav2/subset60k/vqa_annotations_{0}.json.gz"
VQA_SMALL = (
    "vqav2/official_format_small/v2_OpenEnded_mscoco_{0}2014_questions.json",
    "vqav2/official_format_small/v2_mscoco_{0}2014_annotations.json",
)
MULTI30K = [f"flickr30k/multi30k_train_captions/train.{column}.en.gz" for column in range(1, 6)]


def answered(questions: Path, annotations: Path) -> Iterator[Example]:
    return vqa.read(questions=[questions], annotations=[annotations])


def unanswered(questions: Path) -> Iterator[Example]:
    return vqa.read(questions=[questions])


def of_split(refs: Path, instances: Path, *, split: str) -> Iterator[Example]:
    return refer.read(refs=refs, instances=instances, split=split)


def parallel(*paths: Path) -> Iterator[Example]:
    return captions.read_parallel(captions=paths[:-1], images=paths[-1])


def karpathy(path: Path, images: Path) -> Iterator[Example]:
    keys = {line.split()[1] for _, line in lines(images)}
    return (example for example in captions.read(captions=[path]) if example.images[0] in keys)


def one(reader: Callable[..., Iterator[Example]], key: str) -> Callable[[Path], Iterator[Example]]:
    """The reader as a function of one path, which it takes as a list under `key`."""
    return lambda path: reader(**{key: [path]})


def json_records(path: Path, *, keys: tuple[str, ...] = ()) -> list[object]:
    """Published JSON that is no annotation of the twelve data sets: one item per record under `keys`."""
    content = open_json(path)
    for key in keys:
        content = content[key]
    return list(content)


def line_count(path: Path) -> list[str]:
    """Lists, one entry a line."""
    return [line for _, line in lines(path)]


REFCOCOG = "refcoco/refcocog/refs(umd).p", "refcoco/refcocog/instances.json"

CASES: list[tuple[tuple[str, ...], Callable[..., object], int]] = [
    (tuple(name.format("train") for name in VQA), answered, 48_061),
    (tuple(name.format("valid") for name in VQA), answered, 8_977),
    (tuple(name.format("train") for name in VQA_SMALL), answered, 53),
    (tuple(name.format("val") for name in VQA_SMALL), answered, 3),
    (("vqav2/official_format_small/v2_OpenEnded_mscoco_test2015_questions.json",), unanswered, 5),
    (("vqav2/official_format_small/v2_OpenEnded_mscoco_test-dev2015_questions.json",), unanswered, 5),
    (("vqav2/allennlp_fixture/questions.json", "vqav2/allennlp_fixture/annotations.json"), answered, 3),
    (("visual_genome/hf_5img/question_answers.json",), one(visual_genome.read, "questions"), 721),
    (("visual_genome/allennlp_fixture/question_answers.json",), one(visual_genome.read, "questions"), 8),
    (("visual_genome/hf_5img/region_descriptions.json",), one(visual_genome_regions.read, "regions"), 1_278),
    (("visual_genome/vg_regions_27img.json",), one(visual_genome_regions.read, "regions"), 4_161),
    (("visual_genome/emma_vg_gqa_coco.jsonl.gz",), one(shared_photos.read_captions, "photos"), 162),
    (("visual_genome/emma_vg_gqa_coco.jsonl.gz",), one(shared_photos.read_questions, "photos"), 78),
    (("visual_genome/emma_vg_gqa_coco.jsonl.gz",), one(shared_photos.read_regions, "photos"), 19_229),
    (("features_vinvl_emma/annotations.json",), one(shared_photos.read_captions, "photos"), 60),
    (("features_vinvl_emma/annotations.json",), one(shared_photos.read_questions, "photos"), 91),
    (("features_vinvl_emma/annotations.json",), one(shared_photos.read_regions, "photos"), 684),
    (("gqa/testdev.json",), one(gqa.read, "questions"), 11_088),
    (("gqa/testdev_balanced_questions.json",), one(gqa.read, "questions"), 1_712),
    (("gqa/xgqa_few_shot_en/dev.json",), one(gqa.read, "questions"), 1_422),
    (("gqa/emma_fixture/gqa_questions.json",), one(gqa.read, "questions"), 9),
    (("gqa/allennlp_fixture/questions.json",), one(gqa.read, "questions"), 1),
    (("gqa/allennlp_fixture/question_dir",), one(gqa.read, "questions"), 2),
    (("gqa/allennlp_fixture/question_dir/questions0.json",), one(gqa.read, "questions"), 1),
    (("gqa/allennlp_fixture/question_dir/questions1.json",), one(gqa.read, "questions"), 1),
    (("coco_retrieval/captions_val2017.json",), one(captions.read, "captions"), 25_014),
    (("coco_retrieval/coco_mini/captions_train2017.json",), one(captions.read, "captions"), 400),
    (("coco_retrieval/coco_mini/captions_val2017.json",), one(captions.read, "captions"), 395),
    (("coco_retrieval/emma_fixture/coco_captions_train.json",), one(captions.read, "captions"), 49),
    (("coco_retrieval/emma_fixture/coco_captions_valid.json",), one(captions.read, "captions"), 4),
    (("coco_retrieval/caps_boxes_coco2014_val_80.jsonl",), one(captions.read, "captions"), 401),
    (("coco_retrieval/captions_val2017.json", "coco_retrieval/splits/karpathy_test_images.txt"), karpathy, 2_966),
    (("coco_retrieval/captions_val2017.json", "coco_retrieval/splits/karpathy_val_images.txt"), karpathy, 3_042),
    (("flickr30k/valid_ann.jsonl",), one(captions.read, "captions"), 5_070),
    ((*MULTI30K, "flickr30k/multi30k_train_captions/train_images.txt"), parallel, 145_000),
    (
        ("conceptual_captions/Validation_GCC-1.1.0-Validation.tsv",),
        lambda p: conceptual_captions.read(captions=p),
        15_833,
    ),
    (("conceptual_captions/hf_sample/GCC-training.tsv",), lambda p: conceptual_captions.read(captions=p), 5),
    (
        ("conceptual_captions/hf_sample/Image_Labels_Subset_Train_GCC-Labels-training.tsv",),
        lambda p: conceptual_captions.read(captions=p),
        6,
    ),
    (REFCOCOG, partial(of_split, split="train"), 9),
    (REFCOCOG, partial(of_split, split="val"), 10),
    (REFCOCOG, partial(of_split, split="test"), 9),
    (("guesswhat/compguesswhat.train.jsonl.gz",), one(guesswhat.read, "games"), 6),
    (("guesswhat/compguesswhat.valid.jsonl.gz",), one(guesswhat.read, "games"), 6),
    (("guesswhat/guesswhat_train_100_human_games.jsonl",), one(guesswhat.read, "games"), 100),
    (("nlvr2/dev.json",), one(nlvr2.read, "statements"), 6_982),
    (("nlvr2/test1.json",), one(nlvr2.read, "statements"), 6_967),
    (("nlvr2/allennlp_fixture/tiny-dev.json",), one(nlvr2.read, "statements"), 8),
    (("nlvr1/dev.json",), one(nlvr2.read_nlvr1, "statements"), 989),
    (("nlvr1/test.json",), one(nlvr2.read_nlvr1, "statements"), 990),
    (("snli_ve/esnlive_dev.csv",), one(snli_ve.read, "pairs"), 14_339),
    (("snli_ve/allennlp_fixture/sample_pairs.jsonl",), one(snli_ve.read, "pairs"), 16),
    (("snli_ve/cpuknows_sample/sample_data.jsonl",), one(snli_ve.read, "pairs"), 5),
    (("snli_ve/xvnli_en/train_1.jsonl",), one(snli_ve.read, "pairs"), 3),
    # What the folders hold beside annotations: answer lists, boxes, scene graphs, split lists.
    (("vqav2/labels/trainval_ans2label.json",), json_records, 3_129),
    (("vqav2/labels/trainval_label2ans.json",), json_records, 3_129),
    (("vqav2/labels/uniter_ans2label.json",), json_records, 3_129),
    (("gqa/trainval_ans2label.json",), json_records, 1_842),
    (("gqa/trainval_label2ans.json",), json_records, 1_842),
    (("gqa/emma_fixture/gqa_scene_graph.json",), json_records, 3),
    (("coco_retrieval/coco_mini/instances_train2017.json",), partial(json_records, keys=("annotations",)), 739),
    (("coco_retrieval/coco_mini/instances_val2017.json",), partial(json_records, keys=("annotations",)), 624),
    (("refcoco/refcoco_test_expressions_5000.json",), json_records, 5_000),
    (("refcoco/refcoco_unc_val_gt_boxes_1500img.json",), json_records, 1_500),
    (("refcoco/refer_api_sample_predictions_testA.json",), partial(json_records, keys=("predictions",)), 1_984),
    (("features_vinvl_emma/vinvl_x152c4_classmap.json",), json_records, 9),
    (("visual_genome/hf_5img/attributes.json",), json_records, 5),
    (("visual_genome/hf_5img/image_data.json",), json_records, 5),
    (("visual_genome/hf_5img/objects.json",), json_records, 5),
    (("visual_genome/hf_5img/relationships.json",), json_records, 5),
    (("visual_genome/vg_image_data_26img.json",), json_records, 26),
    (("visual_genome/splits/test.txt",), line_count, 5_000),
    (("visual_genome/splits/val.txt",), line_count, 5_000),
    (("coco_retrieval/splits/test1k_ids.txt",), line_count, 1_000),
    (("conceptual_captions/volta_valid_ids.txt",), line_count, 14_463),
    (("flickr30k/entities_fixture/4945942737.txt",), line_count, 5),
    (("flickr30k/splits/train.txt",), line_count, 29_783),
    (("flickr30k/splits/val.txt",), line_count, 1_000),
    (("flickr30k/splits/test.txt",), line_count, 1_000),
    (("snli_ve/flickr30k_test.lst",), line_count, 1_000),
    (("snli_ve/flickr30k_train_val.lst",), line_count, 30_783),
    (("vqav2/labels/mscoco_question_types.txt",), line_count, 65),
]

READ_ELSEWHERE = {"README.md", "trainval_ans2label.pkl", "trainval_label2ans.pkl", "data.mdb"}
"""Tested with answers and feature stores."""


@pytest.mark.parametrize(("files", "reader", "count"), CASES, ids=[f"{files[0]}-{n}" for files, _, n in CASES])
def test_record_counts(files: tuple[str, ...], reader: Callable[..., Iterator[object]], count: int) -> None:
    records = list(reader(*(reference(f"data/{name}") for name in files)))
    assert len(records) == count
    if isinstance(records[0], Example):
        examples = [record for record in records if isinstance(record, Example)]
        assert len({example.id for example in examples}) == count, "ids must be unique"
        assert all(example.text.strip() and all(example.images) for example in examples)


def test_every_annotation_file_is_counted() -> None:
    root = reference("data")
    counted = {root / name for files, _, _ in CASES for name in files}
    formats = {".json", ".jsonl", ".gz", ".tsv", ".csv", ".txt", ".lst", ".p", ".pkl"}
    found = {path for path in root.rglob("*") if path.suffix in formats and path.name not in READ_ELSEWHERE}
    features = {path for path in found if path.parent.name in ("vocab", "features_butd_caffe")}
    assert found - features - counted == set()


def pick(examples: Iterator[Example], example_id: str) -> Example:
    return next(example for example in examples if example.id == example_id)


def test_vqa_fields() -> None:
    questions, annotations = (reference(f"data/{name.format('train')}") for name in VQA)
    example = pick(answered(questions, annotations), "228478002")
    assert example.text == "What English meal is this likely for?"
    assert example.images == ("228478",)
    assert example.group == "other"
    assert isinstance(example.target, SoftAnswers)
    assert example.target.answers == ("brunch", "tea", "tea time", "breakfast", "teatime", "lunch", "reception")
    assert example.target.scores == (0.6, 0.6, 0.3, 0.6, 0.3, 0.3, 0.3)


def test_vqa_parts_follow_the_question_ids_of_the_last_file() -> None:
    files = [reference(f"data/{VQA_SMALL[0].format(split)}") for split in ("val", "train")]
    everything = [int(example.id) for example in vqa.read(questions=files)]
    head = [int(example.id) for example in vqa.read(questions=files, part="head", last=10)]
    tail = [int(example.id) for example in vqa.read(questions=files, part="tail", last=10)]
    assert head + tail == everything
    assert everything[3:] == sorted(everything[3:])
    assert len(tail) == 10
    assert min(tail) > max(head[3:])


def test_gqa_forms_agree() -> None:
    processed = {e.id: e for e in gqa.read(questions=[reference("data/gqa/testdev.json")])}
    official = list(gqa.read(questions=[reference("data/gqa/testdev_balanced_questions.json")]))
    for example in official:
        twin = processed[example.id]
        assert (twin.text, twin.images, twin.target) == (example.text, example.images, example.target)
    assert processed["201307251"].target == SoftAnswers(("no",), (1.0,))
    assert processed["201307251"].images == ("n161313",)
    assert {example.group for example in official} == {"verify", "query", "choose", "logical", "compare"}


def test_visual_genome_answers_are_normalised() -> None:
    examples = list(visual_genome.read(questions=[reference("data/visual_genome/hf_5img/question_answers.json")]))
    clock = pick(iter(examples), "986768")
    assert (clock.text, clock.images) == ("What color is the clock?", ("1",))
    assert clock.target == SoftAnswers(("green",), (1.0,))


def test_captions_of_a_karpathy_list_need_all_its_images(tmp_path: Path) -> None:
    file = reference("data/coco_retrieval/captions_val2017.json")
    listed = tmp_path / "two.txt"
    listed.write_text("val2014/COCO_val2014_000000179765.jpg 179765\n000000190236.jpg\n")
    kept = list(captions.read(captions=[file], images=listed))
    assert Counter(example.images for example in kept) == {("179765",): 5, ("190236",): 5}
    assert kept[0].id == "179765/38"
    assert kept[0].text == "A black Honda motorcycle parked in front of a garage."


def test_parallel_captions_fields() -> None:
    files = [reference(f"data/{name}") for name in MULTI30K]
    images = reference("data/flickr30k/multi30k_train_captions/train_images.txt")
    example = pick(captions.read_parallel(captions=files, images=images), "10002456/4")
    assert example.text == "Three men on a large rig."
    assert example.images == ("10002456",)


def test_refer_fields() -> None:
    refs, instances = (reference(f"data/{name}") for name in REFCOCOG)
    example = pick(refer.read(refs=refs, instances=instances, split="train"), "40373/91982")
    assert example.text == "a woman wearing black dress"
    assert example.images == ("122469",), "file_name ends in the annotation's number, not the image's"
    assert example.group == "train"
    assert isinstance(example.target, Region)
    assert example.target.boxes[0] == pytest.approx((2.04, 78.25, 331.27, 483.85))


def test_guesswhat_fields() -> None:
    example = next(guesswhat.read(games=[reference("data/guesswhat/compguesswhat.train.jsonl.gz")]))
    assert example.text.startswith("start is it on the back coutertop? answer No stop start is it on the island? ")
    assert example.text.endswith("start does it cook things? answer Yes stop ")
    assert (example.id, example.images, example.group) == ("2447", ("157190",), "success")
    assert isinstance(example.target, Choice)
    assert len(example.target.candidates) == 20
    assert example.target.choices == tuple(range(20))
    assert example.target.answer == 9, "object 1641241 has the tenth smallest id"


def test_guesswhat_without_objects_has_no_target() -> None:
    games = guesswhat.read(games=[reference("data/guesswhat/guesswhat_train_100_human_games.jsonl")])
    assert {example.target for example in games} == {None}


def test_nlvr2_fields() -> None:
    examples = list(nlvr2.read(statements=[reference("data/nlvr2/dev.json")]))
    assert examples[0].id == "dev-850-0-0"
    assert examples[0].images == ("dev-850-0-img0", "dev-850-0-img1")
    assert examples[0].target == Label(0)
    assert examples[1].target == Label(1)
    assert examples[0].group == examples[1].group == "dev-850-0"
    texts = {example.group: example.text for example in examples}
    assert all(texts[example.group] == example.text for example in examples), "a group is one sentence"


def test_snli_ve_fields() -> None:
    examples = list(snli_ve.read(pairs=[reference("data/snli_ve/esnlive_dev.csv")]))
    assert examples[0].id == "4465359505.jpg#2r1c"
    assert examples[0].images == ("4465359505",)
    assert examples[0].text == "The old man is chopping down a tree in his yard."
    classes = Counter(example.target for example in examples)
    assert classes == {Label(0): 5_643, Label(1): 3_442, Label(2): 5_254}
    spellings = [
        next(snli_ve.read(pairs=[reference(f"data/snli_ve/{name}")])).images[0]
        for name in (
            "allennlp_fixture/sample_pairs.jsonl",
            "cpuknows_sample/sample_data.jsonl",
            "xvnli_en/train_1.jsonl",
        )
    ]
    assert spellings == ["2248275918", "555378351", "2487069642"]


def test_regions_are_scaled_to_the_photo_of_the_features() -> None:
    regions = list(shared_photos.read_regions(photos=[reference("data/features_vinvl_emma/annotations.json")]))
    scaled = pick(iter(regions), "403250/0")  # drawn on 500 x 333, features from 640 x 427
    assert isinstance(scaled.target, Region)
    x, y = 640 / 500, 427 / 333
    assert scaled.target.boxes[0] == pytest.approx((40 * x, 62 * y, 207 * x, 311 * y))
    kept = pick(iter(regions), "2409386/0")
    assert kept.target == Region(((87.0, 38.0, 298.0, 243.0),))


def test_entities_phrases_of_a_real_sentence_file(tmp_path: Path) -> None:
    sentences = reference("data/flickr30k/entities_fixture")
    (tmp_path / "4945942737.xml").write_text(
        "<annotation><object><name>221796</name><bndbox><xmin>1</xmin><ymin>11</ymin><xmax>51</xmax><ymax>61</ymax>"
        "</bndbox></object><object><name>221796</name><name>221797</name><bndbox><xmin>5</xmin><ymin>6</ymin>"
        "<xmax>7</xmax><ymax>8</ymax></bndbox></object><object><name>221799</name><nobndbox>1</nobndbox></object>"
        "</annotation>"
    )
    examples = list(entities.read(sentences=sentences, annotations=tmp_path))
    assert examples[0] == Example(
        id="4945942737/0/0",
        text="A girl",
        images=("4945942737",),
        target=Region(((0.0, 10.0, 50.0, 60.0), (4.0, 5.0, 6.0, 7.0))),
        group="people",
    )
    assert {example.text for example in examples if example.group == "clothing"} >= {"black"}
    assert all("edge" not in example.text for example in examples), "no box, no example"
