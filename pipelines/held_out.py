"""Which images a run must not train or validate on: those that any data set of its sheet tests on (paper section 2.2).

They come from the sheet's removal list. Without one the test splits that are there are read instead, and what they
have in common with a train or val split is refused, not removed: what a run leaves out is to be written down first.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from pipelines.datasets import TaskData
from pipelines.errors import BadInput
from pipelines.overlap import TRAINED_ON, Identities, Identity, is_there, read_tests
from pipelines.removal import load_list, outdated
from pipelines.sheet import Sheet

_ALLOW = "unclean_data=allow trains on all examples"


@dataclass(frozen=True)
class HeldOut:
    """The test images of all data sets of a sheet."""

    sheet: Sheet
    path: Path | None = None
    """The removal list that they come from; None: from the test splits themselves."""
    by_source: Mapping[str, frozenset[str]] = field(default_factory=dict, repr=False)
    """Source -> image keys."""
    tested: frozenset[str] = frozenset()
    """Data sets whose test images are among them."""
    tests: Mapping[str, frozenset[Identity]] = field(default_factory=dict, repr=False)
    """Without a list: data set -> test images."""
    identities: Identities = field(default_factory=lambda: Identities({}), repr=False)

    def keys(self, name: str, split: str) -> frozenset[str]:
        """Image keys that this split of a data set does without; none in a test split."""
        return self.by_source.get(self.sheet.source(name), frozenset()) if split in TRAINED_ON else frozenset()

    def settle(self, data: TaskData) -> None:
        """Raises BadInput if a split was loaded without some of these images and no list had said so before."""
        if self.path is not None or not data.removed_examples:
            return
        source = self.sheet.source(data.spec.name)
        removed = {self.identities.identity(source, key) for key in data.removed_images}
        shared = Counter({name: len(removed & test) for name, test in self.tests.items()})
        tested_by = ", ".join(f"{name} ({count:,} images)" for name, count in shared.most_common(3) if count)
        raise BadInput(
            f"{self.sheet.path}: sets.{data.spec.name}.{data.split}",
            f"{_removed([data])} show test images, of {tested_by}",
            f"python -m pipelines.clean {self.sheet.path} lists them for removal; {_ALLOW}",
        )

    def told(self, train: Sequence[TaskData], val: Sequence[TaskData]) -> str:
        """One line on what was left out of all splits of a run, by the list."""
        return f"left out by {self.path}: {_removed(train)} of training, {_removed(val)} of validation"


def _removed(splits: Sequence[TaskData]) -> str:
    removed = sum(data.removed_examples for data in splits)
    total = removed + sum(map(len, splits))
    return f"{removed:,} of {total:,} examples ({removed / total:.1%})"


def listed(sheet: Sheet, readers: Mapping[str, str]) -> HeldOut | None:
    """What the sheet's removal list holds out; None where it names none, or none is there yet.

    Raises BadInput for a list that is damaged, or stale by `pipelines.removal.outdated`.
    """
    if sheet.removed is None or not sheet.removed.exists():
        return None
    removed = load_list(sheet.removed)
    for reason in outdated(removed, sheet, readers):
        mend = f"make it again: python -m pipelines.clean {sheet.path}; {_ALLOW}"
        raise BadInput(sheet.removed, f"the removal list is stale: {reason}", mend)
    return HeldOut(sheet, sheet.removed, removed.keys(), frozenset(removed.tests))


def held_out(sheet: Sheet, readers: Mapping[str, str], sets: Iterable[str], say: Callable[[str], None]) -> HeldOut:
    """By the sheet's list, or by the test splits that are there; `sets` are those that the run trains.

    `say` is told what cannot be known. Raises BadInput as `listed` and the readers do.
    """
    found = listed(sheet, readers) or _compared(sheet, readers, sets, say)
    unknown = [name for name, entry in sheet.sets.items() if entry.test is not None and name not in found.tested]
    if unknown:
        say(f"test splits that are not there, so their images cannot be kept out of training: {', '.join(unknown)}")
    return found


def _compared(sheet: Sheet, readers: Mapping[str, str], sets: Iterable[str], say: Callable[[str], None]) -> HeldOut:
    there = [name for name in sheet.sets if name in readers and is_there(sheet, name, "test", readers[name])]
    if not there:
        return HeldOut(sheet)
    say(f"no removal list: comparing with the test images of {len(there)} data sets")
    identities = Identities.of(sheet, (*there, *sets))
    tests = read_tests(sheet, readers, there, identities)
    keys = identities.keys(frozenset().union(*tests.values()))
    return HeldOut(sheet, None, keys, frozenset(there), tests, identities)
