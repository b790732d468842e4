"""Cutting data sets that publish no split of their own, and lists of image names."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pipelines.errors import BadInput
from pipelines.examples import Example
from pipelines.files import lines
from pipelines.identity import image_key

PARTS = ("all", "head", "tail")


def part_of(files: Sequence[list[Example]], part: str, last: int) -> list[Example]:
    """The examples of all files, or all but / only the `last` ones by id of the last file (spec section 5.3).

    With files train and val, `head` is the published trainval and `tail` minval. Each file is put in ascending order
    of its ids, which are numbers. Raises `BadInput` for an unknown part and for a file with fewer than `last` examples.
    """
    if part not in PARTS:
        raise BadInput("part", f"{part!r} is none of {', '.join(PARTS)}")
    ordered = [sorted(examples, key=_ascending) for examples in files]
    if part == "all":
        return [example for examples in ordered for example in examples]
    final = ordered[-1]
    if not isinstance(last, int) or not 0 < last <= len(final):
        raise BadInput("last", f"{last!r} of the last file's {len(final)} examples cannot be held out", "choose fewer")
    if part == "tail":
        return final[-last:]
    return [example for examples in ordered[:-1] for example in examples] + final[:-last]


def _ascending(example: Example) -> tuple[int, str]:
    return (int(example.id) if example.id.isdigit() else -1, example.id)


def image_list(path: Path) -> list[str]:
    """Image keys of a list with one image a line: an id or file name, optionally more fields after a space.

    Karpathy's lists, REFER's, the Flickr30k ones. Raises `BadInput` for an empty line amid the list.
    """
    keys = []
    for number, line in lines(path):
        if not line.strip():
            raise BadInput(f"{path}:{number}", "no image name", "remove the empty line")
        keys.append(image_key(line.split()[0]))
    return keys
