"""The page says what the journal and the model say, fetches and runs nothing, and shows hostile texts as texts."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from engine.asking import batch_of
from engine.images import stored
from engine.journal import EVENTS_FILE, read_rows
from engine.losses import loss_and_score
from engine.model.bridge import Bridge
from engine.report.__main__ import main
from engine.report.attention import last_bridge
from engine.report.cards import Gallery, card
from engine.report.gallery import Settings, answered, look, task_cards
from engine.report.pictures import Album
from engine.trained import Trained, load_trained
from pipelines.errors import BadInput
from tests.engine.html_page import Page, check
from tests.engine.small_run import TASKS
from tests.engine.test_figures import made_up_run
from tests.pipelines.small import EXAMPLES, HEIGHT, IMAGES, WIDTH

HOSTILE = "<script>alert(1)</script><img src=x onerror='alert(2)'>\"'&"
BROWSER = ("--headless", "--no-sandbox", "--disable-gpu")
CHROMIUM = next(
    (found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), None
)


@pytest.fixture(scope="module")
def run(undisturbed: Callable[[str], Path]) -> Path:
    return undisturbed("float32")


@pytest.fixture(scope="module")
def trained(run: Path) -> Trained:
    return load_trained(run)


def report(folder: Path, output: Path, *more: str) -> str:
    assert main([str(folder), "-o", str(output / "page.html"), *more]) == 0
    return (output / "page.html").read_text()


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A picture file of every image but the last."""
    folder = tmp_path_factory.mktemp("pictures") / "detected"
    folder.mkdir()
    for place, key in enumerate(IMAGES[:-1]):
        Image.new("RGB", (4 * WIDTH, 4 * HEIGHT), (20 * place, 90, 160)).save(folder / f"{key}.png")
    return folder.parent


@pytest.fixture(scope="module")
def page(run: Path, pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Page:
    return check(report(run, tmp_path_factory.mktemp("page"), "--images", str(pictures)))


def test_the_result_table_is_the_journals(page: Page, run: Path) -> None:
    for row in (row for row in read_rows(run / EVENTS_FILE) if row["event"] == "result"):
        cells = [f"{100 * row[key]:.1f}" for key in ("score", "best", "majority", "blind")]
        assert [row["task"], cells[0], "", *cells[1:]] in page.rows()


def test_every_part_is_there(page: Page) -> None:
    ids = {element.attributes.get("id") for element in page.elements}
    assert {"results", "pictures", "looks", "dsg", "curves", "throughput", "data", "run"} <= ids
    assert {f"task-{name}" for name in ("answers", "captions", "phrases", "pointing", "pairs")} <= ids
    assert len(page.of_class("panel")) == TASKS and page.of_class("loss") and page.of_class("validation")
    assert "max_iterations: 12" in page.text and "configuration hash" in page.text


def test_a_picture_is_embedded_once_and_what_has_no_file_is_grey(page: Page) -> None:
    stored_pictures = page.all("image")
    assert len({e.attributes["href"] for e in stored_pictures}) == len(stored_pictures) <= len(IMAGES) - 1
    shown = [e.attributes["href"] for e in page.all("use")]
    assert len(shown) > len(stored_pictures)
    assert {f"#{e.attributes['id']}" for e in stored_pictures} == set(shown)
    assert page.of_class("blank")


def test_cards_show_boxes_bars_and_the_true_image(page: Page) -> None:
    boxes = [
        e.attributes["class"].split()[1] for e in page.of_class("box") if "x" in e.attributes and len(e.attributes) == 5
    ]
    assert {"true", "other"} <= set(boxes) and {"right", "wrong"} & set(boxes)
    assert page.of_class("bars") and page.of_class("look")
    assert any("true" in e.attributes["class"].split() for e in page.of_class("view"))


@pytest.mark.parametrize("task", ["answers", "phrases", "pointing", "pairs"])
def test_right_on_a_card_is_right_in_the_score(trained: Trained, task: str) -> None:
    data = trained.data(task, "val")
    scores = torch.cat([loss_and_score(trained.logits(batch), batch)[1] for batch in trained.batches(data)])
    gallery, row = Gallery(trained, Album(None)), trained.row(task)
    cards = [card(gallery, row, example) for example in answered(trained, row, "val")]
    assert [card.example.id for card in cards] == data.ids.tolist()
    assert [card.right for card in cards] == (scores >= 0.5).tolist()
    assert any(card.right for card in cards) and not all(card.right for card in cards)


def test_a_caption_is_searched_among_other_images(trained: Trained) -> None:
    row, example = trained.row("captions"), EXAMPLES["captions"][0]
    others = tuple(key for key in IMAGES if key not in example.images)
    made = card(Gallery(trained, Album(None), {"captions": others}), row, example)
    (place,) = re.findall(r"comes (\d+)\w\w of 12", made.said)
    ranks = [int(view.caption.split(".")[0]) for view in made.views]
    assert ranks[:5] == [1, 2, 3, 4, 5] and [view.role == "true" for view in made.views].count(True) == 1
    true = next(view for view in made.views if view.role == "true")
    assert true.shown.key == example.images[0] and true.caption.startswith(f"{place}.")
    assert made.right == (place == "1")


def test_right_and_wrong_ones_are_shown(trained: Trained) -> None:
    for task in task_cards(trained, Album(None), Settings(asked=30, right=2, wrong=3), lambda *_: None):
        right = sum(card.right for card in task.cards)
        assert len(task.cards) == 5 and task.asked == 30
        assert right == min(task.right, max(2, 5 - (30 - task.right)))


def test_attention_makes_what_the_bridge_makes(trained: Trained) -> None:
    bridge = trained.model.trunk.bridges[-1]
    assert isinstance(bridge, Bridge)
    w = {name: field.detach() for name, field in bridge.fields().items()}
    for task in ("answers", "phrases", "pointing"):
        example = EXAMPLES[task][1]
        batch = batch_of(trained, task, [example.text], stored(trained, task, example.images))
        looks = last_bridge(trained, batch)
        heads, rows, regions = looks.weights.shape
        assert (heads, rows, regions) == (2, batch.token_ids.numel(), len(batch.boxes))
        value = F.linear(looks.image, w["image_qkv"], w["image_qkv_bias"]).chunk(3, 1)[2].view(regions, heads, -1)
        context = torch.einsum("ntr,rnd->tnd", looks.weights, value).reshape(rows, -1)
        x = F.linear(context, w["text_out"], w["text_out_bias"]) + looks.text
        x = F.layer_norm(x, x.shape[1:], w["text_bridge_weight"], w["text_bridge_shift"], 1e-12)
        inner = F.gelu(F.linear(x, w["text_up"], w["text_up_bias"]))
        y = F.linear(inner, w["text_down"], w["text_down_bias"]) + x
        y = F.layer_norm(y, y.shape[1:], w["text_weight"], w["text_shift"], 1e-12)
        torch.testing.assert_close(y, looks.output, rtol=1e-5, atol=1e-5)


def test_a_look_shades_the_regions_of_its_image(trained: Trained) -> None:
    example = EXAMPLES["pointing"][0]
    found = look(trained, Album(None), trained.row("pointing"), example)
    pictures = stored(trained, "pointing", example.images)
    assert pictures.candidates is not None
    annotated = [tuple(box) for box in pictures.candidates.record(example.images[0]).boxes.tolist()]
    for view in found.views:
        assert {box.xyxy for box in view.boxes} >= set(annotated)
        assert [box.weight for box in view.boxes] == sorted((box.weight for box in view.boxes), reverse=True)
        assert all(0 <= box.weight <= 1 for box in view.boxes)


def test_hostile_texts_are_texts(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for task in ("answers", "captions"):
        monkeypatch.setitem(
            EXAMPLES, task, [replace(e, text=HOSTILE, id=f"{HOSTILE}{e.id}", group=HOSTILE) for e in EXAMPLES[task]]
        )
    folder = tmp_path / "run"
    shutil.copytree(run, folder)
    events = (folder / EVENTS_FILE).read_text()
    hostile = json.dumps(HOSTILE)[1:-1]
    (folder / EVENTS_FILE).write_text(
        events.replace('"name": "small"', f'"name": "{hostile}"').replace('"title": "pairs"', f'"title": "{hostile}"')
    )
    with (folder / "config.yaml").open("a") as file:
        file.write(f"# {HOSTILE}\n")
    html = report(folder, tmp_path)
    page = check(html)
    assert "<script" not in html and "<img" not in html
    assert page.all("h1")[0].text == HOSTILE
    assert [e.text for e in page.of_class("text")].count(HOSTILE) >= 8
    assert HOSTILE in page.all("pre")[0].text


def test_a_run_whose_data_have_gone_keeps_its_journal(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(run, folder, ignore=shutil.ignore_patterns("checkpoints"))
    (folder / "checkpoints").mkdir()
    page = check(report(folder, tmp_path))
    assert "No pictures: " in page.text and "no usable checkpoint" in page.text and page.of_class("panel")
    assert "no usable checkpoint" in capsys.readouterr().err


def test_a_run_under_way(tmp_path: Path) -> None:
    page = check(report(made_up_run(tmp_path, results=False), tmp_path, "--no-pictures"))
    assert "under way" in page.text and "has not come to its results" in page.text
    assert len(page.of_class("panel")) == 12 and page.of_class("stopped")


@pytest.fixture
def experiment(tmp_path: Path, run: Path) -> Path:
    folder = tmp_path / "experiment"
    for name in ("tables", "figures", "runs"):
        (folder / name).mkdir(parents=True)
    (folder / "results.json").write_text("[]")
    table = {"title": f"Table 2 {HOSTILE}", "note": f"A note.\n{HOSTILE}", "columns": ["system", "score", "n"],
             "rows": [[HOSTILE, 69.081, 3], ["AT", None, 12345], ["ST", "67.0 ± 0.8", 1]]}  # fmt: skip
    (folder / "tables" / "two.json").write_text(json.dumps(table))
    svg = '<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"><script>alert(1)</script></svg>'
    (folder / "figures" / "one.svg").write_text(svg)
    (folder / "figures" / "one.json").write_text(json.dumps({"title": "Figure 4", "caption": HOSTILE}))
    shutil.copytree(run, folder / "runs" / "all-seed0")
    made_up = folder / "runs" / "unfinished-seed0"
    made_up.mkdir()
    made_up_run(made_up, results=False)
    return folder


def test_an_experiment(experiment: Path, tmp_path: Path) -> None:
    html = report(experiment, tmp_path)
    page = check(html)
    assert "<script" not in html
    rows = page.rows()
    assert [HOSTILE, "69.08", "3"] in rows and ["AT", "–", "12,345"] in rows and ["ST", "67.0 ± 0.8", "1"] in rows
    assert [e.text for e in page.all("h3")][:2] == [f"Table 2 {HOSTILE}", "Figure 4"]
    (figure,) = page.all("img")
    assert figure.attributes["src"].startswith("data:image/svg+xml;base64,") and HOSTILE in figure.attributes["alt"]
    assert ["all-seed0", "finished", "5", "12"] in [row[:4] for row in rows]
    assert ["unfinished-seed0", "under way", "12"] in [row[:3] for row in rows]
    assert page.of_class("card") and "Of the run all-seed0" in page.text


@pytest.mark.parametrize(
    ("name", "content", "named"),
    [
        ("tables/two.json", "{", "tables/two.json: malformed"),
        ("tables/two.json", '{"title": "t", "rows": []}', "tables/two.json: columns: field required"),
        ("tables/two.json", '{"title": "t", "columns": ["a"], "rows": [[{}]]}', "tables/two.json: rows.0.0"),
        ("figures/one.json", "[]", "figures/one.json"),
        ("runs/all-seed0/events.jsonl", "[]\n", "events.jsonl: line 1"),
    ],
)
def test_a_damaged_experiment(
    experiment: Path, name: str, content: str, named: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (experiment / name).write_text(content)
    assert main([str(experiment)]) == 2
    assert named in capsys.readouterr().err
    assert not (experiment / "report.html").exists()


@pytest.mark.parametrize(
    ("more", "named"),
    [
        (("--images", "nowhere"), "--images nowhere: no such folder"),
        (("--asked", "0"), "--asked: 0 is too small"),
        (("-o", "nowhere/page.html"), "no such folder: nowhere"),
        (("data=nowhere.yaml",), "no such data sheet"),
    ],
)
def test_what_cannot_be_made(run: Path, more: tuple[str, ...], named: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(run), *more]) == 2
    assert named in capsys.readouterr().err


@pytest.mark.parametrize(
    ("file", "before", "after", "named"),
    [
        ("events.jsonl", '"score": ', '"scored": ', "'score' is missing"),
        ("events.jsonl", '"title": "pairs"', '"title": 3', "'title' is missing or of another kind"),
        ("events.jsonl", '"event": "validation", ', "", "'event' is missing"),
        ("events.jsonl", '"event": "validation", "task": "pairs"', '"event": "validation", "task": "x"', "no task of the run"),
        ("metrics.jsonl", '"loss": ', '"loss": "much", "lost": ', "'loss' is missing"),
    ],
)  # fmt: skip
def test_a_journal_of_something_else(
    run: Path, tmp_path: Path, file: str, before: str, after: str, named: str, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("events.jsonl", "metrics.jsonl"):
        content = (run / name).read_text()
        assert before in content or name != file
        (tmp_path / name).write_text(content.replace(before, after) if name == file else content)
    assert main([str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert named in error and error.startswith("error: ") and error.count("\n") == 1


def test_a_folder_that_is_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path / "nowhere")]) == 2
    assert main([str(tmp_path)]) == 2
    assert "no such folder" in capsys.readouterr().err


def test_a_picture_that_does_not_decode_is_named(trained: Trained, tmp_path: Path) -> None:
    (tmp_path / "1.png").write_bytes(b"no picture")
    album, store = Album(tmp_path), stored(trained, "phrases", ["1"]).store
    with pytest.raises(BadInput, match="1.png"):
        album.number(album.show(store, "1"))
    assert album.number(album.show(store, "2")) is None


def test_another_image_of_the_same_number_is_not_shown(trained: Trained, tmp_path: Path) -> None:
    store = stored(trained, "phrases", ["1"]).store
    (tmp_path / "other").mkdir()
    Image.new("RGB", (WIDTH, HEIGHT)).save(tmp_path / "other" / "1.png")  # in the folder of another store
    Image.new("RGB", (HEIGHT, WIDTH)).save(tmp_path / "2.png")  # of another shape
    Image.new("RGB", (2 * WIDTH, 2 * HEIGHT)).save(tmp_path / "3.png")
    album = Album(tmp_path)
    assert [album.number(album.show(store, key)) for key in ("1", "2", "3", "3")] == [None, None, 0, 0]


@pytest.mark.slow
def test_a_browser_has_nothing_to_complain_about(run: Path, experiment: Path, pictures: Path, tmp_path: Path) -> None:
    if CHROMIUM is None:
        pytest.skip("no chromium here: apt-get install chromium")
    for number, (folder, more) in enumerate([(run, ["--images", str(pictures)]), (experiment, [])]):
        html = report(folder, tmp_path, *more)
        wide = html.replace("</main>", '<p style="width: 900px">x</p></main>')
        assert overflow(wide, 375, tmp_path, tmp_path / f"profile-{number}") > 400
        (tmp_path / "canary.html").write_text(html.replace("</main>", '<p style="color: red">x</p></main>'))
        assert not complaints(tmp_path / "page.html", tmp_path / f"profile-{number}")
        assert overflow(html, 375, tmp_path, tmp_path / f"profile-{number}") == 0
        assert "Content Security Policy" in complaints(tmp_path / "canary.html", tmp_path / f"profile-{number}")


def overflow(html: str, width: int, folder: Path, profile: Path) -> int:
    """How many pixels the page is wider than a phone: a copy without the policy measures itself, in a frame of that width."""
    measure = "const e = document.documentElement; parent.postMessage(e.scrollWidth - e.clientWidth, '*')"
    inner = re.sub("<meta http-equiv[^>]*>", "", html).replace("</body>", f"<script>{measure}</script></body>")
    (folder / "inner.html").write_text(inner)
    frame = f"<iframe src=inner.html style='width:{width}px;height:600px'></iframe>"
    listen = "<script>onmessage = message => document.title = 'wider by ' + message.data</script>"
    (folder / "outer.html").write_text(f"<title></title>{listen}{frame}")
    command = [*BROWSER, f"--user-data-dir={profile}", "--virtual-time-budget=5000", "--dump-dom"]
    done = subprocess.run(
        [str(CHROMIUM), *command, (folder / "outer.html").as_uri()],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    (found,) = re.findall(r"wider by (\d+)", done.stdout.partition("</title>")[0])
    return int(found)


def complaints(page: Path, profile: Path) -> str:
    """What the browser's console says of a page, at a computer's width and at a phone's; and that both are drawn."""
    said = ""
    for width in (1280, 390):
        shot = page.with_name(f"{width}.png")
        command = [
            str(CHROMIUM), *BROWSER, "--hide-scrollbars", f"--user-data-dir={profile}",
            "--enable-logging=stderr", "--v=0", f"--window-size={width},2000", f"--screenshot={shot}", page.as_uri(),
        ]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
        said += "\n".join(line for line in done.stderr.splitlines() if "CONSOLE" in line)
        with Image.open(shot) as image:
            assert len(image.convert("RGB").getcolors(1 << 24) or []) > 50
    return said
