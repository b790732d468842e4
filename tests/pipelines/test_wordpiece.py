"""WordPiece: ids by hand, cutting and wrapping, and the real lengths of the published texts."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from pipelines.errors import BadInput
from pipelines.examples import Example
from pipelines.readers import captions, gqa, nlvr2, snli_ve, visual_genome, visual_genome_regions, vqa
from pipelines.wordpiece import WordPiece
from tests.reference import reference


@pytest.fixture(scope="module")
def bert() -> WordPiece:
    return WordPiece.load(reference("data/vocab/bert-base-uncased-vocab.txt"))


def rows(tokenizer: WordPiece, texts: list[str], max_tokens: int = 64) -> list[list[int]]:
    ids, offsets = tokenizer.encode_batch(texts, max_tokens)
    assert ids.dtype == np.int32
    assert offsets.dtype == np.int64
    return [ids[begin:end].tolist() for begin, end in pairwise(offsets)]


def test_special_tokens_and_size(bert: WordPiece) -> None:
    assert (bert.pad, bert.unk, bert.cls, bert.sep, bert.mask) == (0, 100, 101, 102, 103)
    assert len(bert) == 30_522


@pytest.mark.parametrize(
    ("text", "ids"),
    [
        ("Hello, world!", [7592, 1010, 2088, 999]),
        ("unaffable", [14477, 20961, 3468]),
        ("Café NAÏVE", [7668, 15743]),
        ("don't", [2123, 1005, 1056]),
        ("", []),
        ("  \t\n", []),
        ("[MASK] dog", [103, 3899]),
        ("x" * 101, [100]),
        ("\u4e2d\u56fd", [1746, 1799]),
        ("dog\x00\ufffd", [3899]),
    ],
)
def test_ids_by_hand(bert: WordPiece, text: str, ids: list[int]) -> None:
    assert rows(bert, [text]) == [[101, *ids, 102]]


def test_texts_are_cut_before_they_are_wrapped(bert: WordPiece) -> None:
    assert rows(bert, ["a b c d e", "a", ""], max_tokens=4) == [[101, 1037, 1038, 102], [101, 1037, 102], [101, 102]]
    assert rows(bert, ["a b"], max_tokens=2) == [[101, 102]]
    assert rows(bert, []) == []


def test_chunks_do_not_show(bert: WordPiece) -> None:
    texts = ["a dog", "unaffable"] * 10_000
    ids, offsets = bert.encode_batch(texts, 10)
    assert offsets[-1] == len(ids) == 10_000 * (4 + 5)
    assert ids[-5:].tolist() == [101, 14477, 20961, 3468, 102]


def test_decode(bert: WordPiece) -> None:
    ids, _ = bert.encode_batch(["Is the man unaffable?"], 64)
    assert bert.decode(ids) == "is the man unaffable ?"
    assert bert.decode([101, 103, 102, 0, 0]) == "[MASK]"


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [
        (["[PAD]", "[UNK]", "[CLS]", "a"], r"no special token \[SEP\], \[MASK\]"),
        (["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "a"], "1 tokens stand twice"),
    ],
)
def test_bad_vocabularies(tmp_path: Path, tokens: list[str], expected: str) -> None:
    path = tmp_path / "vocab.txt"
    path.write_text("\n".join(tokens) + "\n")
    with pytest.raises(BadInput, match=expected) as caught:
        WordPiece.load(path)
    assert str(path) in str(caught.value)


def test_a_small_vocabulary_of_its_own(tmp_path: Path) -> None:
    path = tmp_path / "vocab.txt"
    path.write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\nred\n##der\n")
    assert rows(WordPiece.load(path), ["Redder blue red"]) == [[2, 5, 6, 1, 5, 3]]


def published_texts() -> dict[str, tuple[int, float, Iterator[Example]]]:
    """Data set -> published token limit, mean length with [CLS], [SEP] and the task token, examples."""
    root = reference("data")
    subset = [root / f"vqav2/subset60k/vqa_questions_{split}.json.gz" for split in ("train", "valid")]
    phrases = [root / "visual_genome/vg_regions_27img.json"]
    return {
        "vqa": (23, 10.5, vqa.read(questions=subset)),
        "gqa": (26, 12.8, gqa.read(questions=[root / "gqa/testdev.json"])),
        "vg": (26, 9.7, visual_genome.read(questions=[root / "visual_genome/hf_5img/question_answers.json"])),
        "coco": (30, 14.8, captions.read(captions=[root / "coco_retrieval/captions_val2017.json"])),
        "flickr": (30, 17.0, captions.read(captions=[root / "flickr30k/valid_ann.jsonl"])),
        "regions": (20, 8.5, visual_genome_regions.read(regions=phrases)),
        "nlvr2": (40, 19.8, nlvr2.read(statements=[root / f"nlvr2/{name}.json" for name in ("dev", "test1")])),
        "snli_ve": (56, 11.4, snli_ve.read(pairs=[root / "snli_ve/esnlive_dev.csv"])),
    }


def test_mean_lengths_of_real_texts(bert: WordPiece) -> None:
    for name, (max_tokens, mean, examples) in published_texts().items():
        ids, offsets = bert.encode_batch([example.text for example in examples], max_tokens)
        assert len(ids) / (len(offsets) - 1) + 1 == pytest.approx(mean, rel=0.02), name
        assert np.diff(offsets).max() <= max_tokens
