"""Decoding, turning, resizing and normalising, by both decoders, against PIL's own operations."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from pipelines.errors import BadInput
from pipelines.extract.dali import DaliDecoder, make_decoder
from pipelines.extract.detectors import Preprocessing
from pipelines.extract.pixels import BadImage, Decoded, PlainDecoder, pil_warnings
from tests.pipelines.photos import encoded, photo

RULE = Preprocessing(200, 333, mean=(123.675, 116.28, 103.53), std=(58.395, 57.12, 57.375))
PHOTO = photo(0, 163, 121)


def oriented(value: int, form: str = "JPEG") -> bytes:
    exif = Image.Exif()
    exif[0x112] = value
    return encoded(PHOTO, form, exif=exif.tobytes())


def sixteen_bits() -> Image.Image:
    return Image.fromarray(np.arange(60 * 80, dtype=np.uint16).reshape(60, 80))


GOOD: dict[str, bytes] = {
    "4:2:0": encoded(PHOTO, quality=90),
    "4:2:2": encoded(PHOTO, subsampling=1),
    "4:4:4": encoded(PHOTO, quality=92, subsampling=0),
    "progressive": encoded(PHOTO, progressive=True),
    "RGB inside a JPEG": encoded(PHOTO, keep_rgb=True),
    "gray": encoded(PHOTO.convert("L")),
    "CMYK": encoded(PHOTO.convert("CMYK")),
    "bytes behind the end": encoded(PHOTO) + b"x" * 5000,
    "damaged EXIF": encoded(PHOTO, exif=b"Exif\0\0II*\0" + b"\xff" * 20),
    **{f"orientation {value}": oriented(value) for value in range(10)},
    "orientation of a PNG": oriented(6, "PNG"),
    "PNG": encoded(PHOTO, "PNG"),
    "PNG with alpha": encoded(Image.merge("RGBA", (*PHOTO.split(), PHOTO.convert("L"))), "PNG"),
    "gray PNG with alpha": encoded(PHOTO.convert("LA"), "PNG"),
    "palette": encoded(PHOTO.convert("P"), "PNG"),
    "one bit": encoded(PHOTO.convert("1"), "PNG"),
    "WebP": encoded(PHOTO, "WEBP"),
    "BMP": encoded(PHOTO, "BMP"),
    "TIFF": encoded(PHOTO, "TIFF"),
    "GIF": encoded(PHOTO, "GIF"),
}

_JPEG, _PNG = encoded(PHOTO), encoded(PHOTO, "PNG")
BAD: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "an empty file"),
    "text": (b"these are words\n" * 40, "none of JPEG, PNG"),
    "half a JPEG": (_JPEG[: len(_JPEG) // 2], "does not decode .*truncated"),
    "a JPEG without its end": (_JPEG[:-2], "does not decode .*truncated"),
    "a JPEG's first bytes": (_JPEG[:20], "none of JPEG, PNG|does not decode|header"),
    "half a PNG": (_PNG[: len(_PNG) // 2], "does not decode"),
    "16 bits": (encoded(sixteen_bits(), "PNG"), r"more than 8 bits .*I;16.*convert it to 8 bits"),
    "floats": (encoded(Image.fromarray(np.ones((9, 9), np.float32)), "TIFF"), "more than 8 bits"),
}


def huge(width: int, height: int) -> bytes:
    """A JPEG that declares these dimensions: a bomb in a few hundred bytes."""
    content = bytearray(encoded(Image.new("L", (8, 8))))
    place = content.index(b"\xff\xc0") + 5
    content[place : place + 4] = height.to_bytes(2, "big") + width.to_bytes(2, "big")
    return bytes(content)


BAD["100 million pixels"] = (huge(10_000, 10_000), "declares more than 89 million pixels")
BAD["4 billion pixels"] = (huge(65_000, 65_000), "declares more than 89 million pixels")


def silent(line: str) -> None:
    raise AssertionError(f"nothing should be said: {line}")


def decoders(rule: Preprocessing | None) -> list[PlainDecoder]:
    """Every decoder that is installed here."""
    plain = PlainDecoder(rule)
    return [plain, DaliDecoder(rule, "cpu", 4, silent)] if dali_works() else [plain]


def dali_works() -> bool:
    return isinstance(make_decoder("auto", None, "cpu", 1, lambda line: None), DaliDecoder)


def decoded(decoder: PlainDecoder, files: list[Path]) -> list[Decoded]:
    with pil_warnings():
        found = decoder.decode(files)
    assert all(isinstance(entry, Decoded) for entry in found), found
    return [entry for entry in found if isinstance(entry, Decoded)]


def write(folder: Path, contents: dict[str, bytes]) -> list[Path]:
    files = []
    for name, content in contents.items():
        files.append(folder / f"{name.replace(' ', '-')}.jpg")  # whatever it is: content tells, names do not
        files[-1].write_bytes(content)
    return files


@pytest.mark.parametrize("case", GOOD)
def test_pixels_are_those_of_pil_upright(tmp_path: Path, case: str) -> None:
    file = write(tmp_path, {case: GOOD[case]})[0]
    with pil_warnings(), Image.open(file) as image:
        expected = np.asarray(image.convert("RGB"))
        if case != "damaged EXIF":
            expected = np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
    for decoder in decoders(None):
        found = decoded(decoder, [file])[0]
        assert found.image.dtype == torch.uint8 and (found.height, found.width) == expected.shape[:2]
        np.testing.assert_array_equal(found.image.numpy(), expected, err_msg=decoder.name)


@pytest.mark.parametrize("size", [(400, 300), (150, 90), (300, 70), (90, 500)])
def test_resizing_and_normalising_are_pils_bilinear_within_a_level(tmp_path: Path, size: tuple[int, int]) -> None:
    picture = photo(1, *size)
    file = write(tmp_path, {"a": encoded(picture)})[0]
    scale = min(200 / min(size), 333 / max(size))
    wanted = (round(size[0] * scale), round(size[1] * scale))
    with Image.open(file) as image:
        expected = np.asarray(image.resize(wanted, Image.Resampling.BILINEAR), np.float32)
    for decoder in decoders(RULE):
        found = decoded(decoder, [file])[0]
        assert found.image.dtype == torch.float32 and found.image.shape == (3, wanted[1], wanted[0])
        assert (found.width, found.height) == size
        levels = found.image.permute(1, 2, 0).numpy() * np.array(RULE.std) + np.array(RULE.mean)
        inner = slice(None) if decoder.name == "PIL" else slice(1, -1)
        difference = np.abs(levels - expected)[inner, inner]
        assert difference.max() < 1.1, "PIL rounds to whole levels twice"


def test_both_decoders_give_one_batch_the_same(tmp_path: Path) -> None:
    """Decoded: to the bit. Resized: to 1e-4 of a standard deviation, 0.006 levels, for sums have another order. But where
    an image is made smaller DALI repeats its border, torch and PIL leave it out: this shows in the outermost pixels."""
    pytest.importorskip("nvidia.dali", reason="nvidia.dali is not installed (make setup-dali)")
    files = write(tmp_path, {**GOOD, **{f"photo {n}": encoded(photo(n, 90 + 31 * n, 200 - 17 * n)) for n in range(9)}})
    for rule, allowed in ((None, 0.0), (Preprocessing(mean=RULE.mean, std=RULE.std), 1e-6), (RULE, 1e-4)):
        plain, dali = PlainDecoder(rule), DaliDecoder(rule, "cpu", len(files), silent)
        for ours, theirs in zip(decoded(dali, files), decoded(plain, files), strict=True):
            assert ours[1:] == theirs[1:]
            assert ours.image.shape == theirs.image.shape and ours.image.dtype == theirs.image.dtype
            difference = (ours.image.float() - theirs.image.float()).abs()
            smaller = rule is not None and min(rule.size(*ours[1:])) < min(ours[1:])
            assert (difference[:, 1:-1, 1:-1] if smaller else difference).max() <= allowed
            assert difference.max() < 0.5


@pytest.mark.parametrize("case", BAD)
def test_a_bad_image_is_named_and_the_others_of_its_batch_are_decoded(tmp_path: Path, case: str) -> None:
    content, message = BAD[case]
    good = {"one": encoded(photo(1)), "two": encoded(photo(2))}
    first, second = write(tmp_path, good)
    bad = write(tmp_path, {"bad": content})[0]
    for decoder in decoders(None):
        for _ in range(2):  # the second time: a decoder survives what it met
            with pil_warnings():
                found = decoder.decode([first, bad, second])
            assert isinstance(found[1], BadImage) and found[1].where == str(bad)
            with pytest.raises(BadImage, match=message):
                raise found[1]
            for entry, file in ((found[0], first), (found[2], second)):
                assert isinstance(entry, Decoded)
                np.testing.assert_array_equal(entry.image.numpy(), np.asarray(Image.open(file)))


def test_a_failure_of_dali_on_good_images_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dali = pytest.importorskip("nvidia.dali", reason="nvidia.dali is not installed (make setup-dali)")
    said: list[str] = []
    decoder = DaliDecoder(None, "cpu", 1, said.append)
    file = write(tmp_path, {"good": _JPEG})[0]

    def fail(self: object) -> None:
        raise RuntimeError("Critical error in pipeline:\nout of something")

    with monkeypatch.context() as patch:
        patch.setattr(dali.Pipeline, "run", fail)
        first = decoded(decoder, [file])[0]
    assert said == [f"DALI failed on the batch of {file}, which PIL decoded: out of something"]
    second = decoded(decoder, [file])[0]
    assert len(said) == 1 and torch.equal(first.image, second.image)


def test_a_jpeg_cut_and_closed_is_filled_up_alike(tmp_path: Path) -> None:
    """libjpeg takes it for whole and fills up with gray: neither decoder can tell."""
    file = write(tmp_path, {"cut": _JPEG[: len(_JPEG) // 2] + b"\xff\xd9"})[0]
    pictures = [decoded(decoder, [file])[0].image for decoder in decoders(None)]
    assert all(torch.equal(picture, pictures[0]) and (picture[-1] == 128).all() for picture in pictures)


def test_damage_anywhere_is_a_bad_image_or_a_picture(tmp_path: Path) -> None:
    """No damage may end in another exception, or differ between the decoders."""
    rng = np.random.default_rng(0)
    whole = [encoded(photo(3, 48, 40)), encoded(photo(3, 48, 40), "PNG"), encoded(photo(3, 48, 40), "TIFF"),
             encoded(photo(3, 48, 40), "WEBP"), encoded(photo(3, 48, 40), "GIF"), encoded(photo(3, 48, 40), "BMP")]  # fmt: skip
    damaged = {}
    for number in range(240):
        content = bytearray(whole[number % len(whole)])
        end = len(content) if number % 2 else min(len(content), 700)  # headers, where most can go wrong
        for place in rng.integers(0, end, 1 + number % 3):
            content[place] = rng.integers(256)
        damaged[str(number)] = bytes(content)
    files = write(tmp_path, damaged)
    outcomes = []
    for decoder in decoders(None):
        with pil_warnings():
            batches = [decoder.decode(files[start : start + 4]) for start in range(0, len(files), 4)]
        outcomes.append([entry.image.tolist() if isinstance(entry, Decoded) else None for b in batches for entry in b])
        assert 20 < outcomes[-1].count(None) < 220
    assert all(outcome == outcomes[0] for outcome in outcomes)


def test_the_choice_of_a_decoder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert make_decoder("pil", None, "cpu", 1, silent).name == "PIL"
    assert make_decoder("auto", RULE, "cpu", 1, silent).name == "PIL", "the faster one"
    if dali_works():
        assert make_decoder("auto", None, "cpu", 1, silent).name == "DALI"
        assert make_decoder("dali", RULE, "cpu", 1, silent).name == "DALI"
    monkeypatch.setitem(sys.modules, "nvidia.dali", None)  # any import of it fails
    said: list[str] = []
    assert make_decoder("auto", None, "cpu", 1, said.append).name == "PIL"
    assert len(said) == 1 and "decoding by PIL, for DALI cannot be used" in said[0] and "of DALI's speed" in said[0]
    with pytest.raises(BadInput, match=r"--decoder dali: DALI cannot be used: .*\(make setup-dali"):
        make_decoder("dali", None, "cpu", 1, silent)


def test_a_file_that_cannot_be_read_is_no_bad_image(tmp_path: Path) -> None:
    for decoder in decoders(None):
        with pytest.raises(BadInput, match="cannot be read: No such file") as caught:
            decoder.decode([tmp_path / "gone.jpg"])
        assert not isinstance(caught.value, BadImage)
