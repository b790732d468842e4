"""One task's steps in rounds, with and without a look inside, and the account that comes of them.

Of a task's rounds the middle half counts, by how long their two steps took together: means over it add up, and what a busy
machine did to single steps is left out.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from statistics import fmean, median

import torch

from bench.profile_count import Counted, Counting
from bench.profile_roofs import Roofs
from bench.profile_spans import BETWEEN, Place, Spans, Spent, clock_of
from bench.profile_subject import Subject, Visit
from bench.profile_watch import watching
from engine.bottleneck import About, Shares
from engine.tasks import TaskRow

WARM_UP = 3
"""Rounds that do not count."""
_STEP_PHASES = ("forward", "loss", "backward")


@dataclass
class Round:
    """The two steps of one round. Seconds."""

    plain: float
    profiled: float
    turn: int
    spent: Mapping[Place, Spent]


@dataclass
class Taken:
    """What was seen of one task."""

    row: TaskRow
    rounds: list[Round] = field(default_factory=list)
    counted: dict[int, Mapping[Place, Counted]] = field(default_factory=dict)
    """By turn."""
    busy: float | None = None
    """Seconds of a step that a GPU's kernels run; None on a CPU, where each kernel is timed by itself."""

    @property
    def middle(self) -> list[Round]:
        """The rounds that count."""
        rounds = sorted(self.rounds, key=lambda one: one.plain + one.profiled)
        cut = len(rounds) // 4
        return rounds[cut : len(rounds) - cut]

    @property
    def plain(self) -> float:
        """Seconds of a step that nobody looks into."""
        return fmean(one.plain for one in self.middle)

    @property
    def profiled(self) -> float:
        """Seconds of one that is looked into."""
        return fmean(one.profiled for one in self.middle)

    @property
    def overhead(self) -> float:
        """What looking costs, as a share of the step: the median over all rounds, each against itself."""
        return median(one.profiled / one.plain for one in self.rounds) - 1


@dataclass(frozen=True)
class Line:
    """What one step spends in one place, or in alike places of several blocks. Seconds, bytes, FLOPs."""

    phase: str
    block: str
    op: str
    calls: float
    launches: float
    seconds: float
    low: float
    """20 % quantile over all rounds."""
    high: float
    """80 % quantile."""
    kernel_seconds: float
    bytes: float
    flops: float
    bound: str = ""
    """What limits it: "bandwidth" or "GEMM"; empty between ops."""
    ceiling: float = 0.0
    """The seconds that the limit allows, measured in this run."""

    @property
    def share(self) -> float | None:
        """Of the ceiling that its kernels reach."""
        return self.ceiling / self.kernel_seconds if self.ceiling and self.kernel_seconds else None

    @property
    def key(self) -> str:
        """For people, and for finding it again in another profile."""
        return " / ".join(
            part for part in (self.phase or "between phases", self.block, self.op or "between ops") if part
        )


def run(subject: Subject, rounds: int, show: Callable[[str, int, int], None]) -> list[Taken]:
    """Every task in turn, in each round a plain step and a profiled one, which of them first changing from round to round;
    then a step that counts for every batch that had a round."""
    taken = {row.name: Taken(row) for row in subject.rows}
    visits = list(_visits(subject, rounds))
    plain: dict[str, float] = {}
    profiled: dict[str, tuple[float, dict[Place, Spent]]] = {}
    for place, visit in enumerate(visits):
        show("steps", place, len(visits))
        name, following = visit.row.name, visits[place + 1 :][:8]
        if visit.lane == "plain":
            plain[name] = subject.step(visit, following)
        else:
            profiled[name] = look_into(subject, visit, following)
        if name in plain and name in profiled:
            if place >= _warming(subject):
                taken[name].rounds.append(Round(plain[name], profiled[name][0], visit.turn, profiled[name][1]))
            del plain[name], profiled[name]
    for one in taken.values():
        for turn in dict.fromkeys(found.turn for found in one.middle):
            one.counted[turn] = count(subject, Visit(one.row, turn, "counted"))
    show("steps", len(visits), len(visits))
    return list(taken.values())


def _visits(subject: Subject, rounds: int) -> Iterator[Visit]:
    for number in range(WARM_UP + rounds):
        lanes = ("plain", "profiled") if number % 2 else ("profiled", "plain")
        for lane in lanes:
            for row in subject.rows:
                yield Visit(row, subject.source.turn(number), lane)


def _warming(subject: Subject) -> int:
    """How many visits do not count."""
    return 2 * WARM_UP * len(subject.rows)


def look_into(subject: Subject, visit: Visit, following: Sequence[Visit] = ()) -> tuple[float, dict[Place, Spent]]:
    """(seconds of one step, where they were spent)."""
    spans = Spans(clock_of(subject.device))
    with watching(spans):
        seconds = subject.step(visit, following)
    return seconds, with_rest(spans.spent(), seconds)


def with_rest(spent: dict[Place, Spent], seconds: float) -> dict[Place, Spent]:
    """The same, with what of the step is in none of its phases."""
    rest = spent.setdefault(Place(BETWEEN, "", BETWEEN), Spent(calls=1))
    rest.seconds += seconds - sum(one.seconds for one in spent.values())
    return spent


def count(subject: Subject, visit: Visit) -> dict[Place, Counted]:
    """What one step does, by place; but how its batch was made, in this thread for once, is not of it."""
    counting = Counting()
    with watching(counting), counting:
        subject.step(visit)
    return {place: counted for place, counted in counting.found.items() if place.phase != "data"}


def lines(taken: Taken, roofs: Roofs) -> list[Line]:
    """What a step spends in every place, in the order of their first appearance."""
    places = list(dict.fromkeys(place for one in taken.middle for place in (*one.spent, *taken.counted[one.turn])))
    once = sum(one.cost.cold for one in taken.counted[taken.middle[0].turn].values())
    found = [_line(place, taken, roofs, once) for place in places]
    return found if taken.busy is None else _at_work(found, taken.busy)


def _at_work(found: Sequence[Line], busy: float) -> list[Line]:
    """On a GPU an op lasts from one event to the other, its kernels' waiting for their launch included. How long all kernels
    together run is known, and shared out among the ops."""
    lasting = sum(line.kernel_seconds for line in found)
    share = min(1.0, busy / lasting) if lasting else 1.0
    return [replace(line, kernel_seconds=share * line.kernel_seconds) for line in found]


def _line(place: Place, taken: Taken, roofs: Roofs, once: int) -> Line:
    """`once`: cold bytes of the whole step."""
    nothing, uncounted = Spent(), Counted()
    spent = [one.spent.get(place, nothing) for one in taken.middle]
    counted = [taken.counted[one.turn].get(place, uncounted) for one in taken.middle]
    calls, kernels = fmean(one.calls for one in spent), fmean(one.kernel_seconds for one in spent)
    moved, flops, cold = (fmean(getattr(one.cost, name) for one in counted) for name in ("bytes", "flops", "cold"))
    everywhere = torch.tensor([one.spent.get(place, nothing).seconds for one in taken.rounds], dtype=torch.float64)
    low, high = everywhere.quantile(torch.tensor([0.2, 0.8], dtype=torch.float64)).tolist()
    bound, ceiling = "", 0.0
    if place.op and moved and calls:
        bound, of_call = roofs.limit(moved / calls, cold / calls, flops / calls, once)
        ceiling = of_call * calls
    return Line(
        *place, calls, fmean(one.launches for one in counted), fmean(one.seconds for one in spent), low, high,
        kernels if place.op else 0.0, moved, flops, bound, ceiling,
    )  # fmt: skip


def alike(found: Sequence[Line]) -> list[Line]:
    """The lines of all text layers as one, those of all image layers, and so on; the longest first."""
    groups: defaultdict[tuple[str, str, str], list[Line]] = defaultdict(list)
    for line in found:
        groups[line.phase, kind_of(line.block), line.op].append(line)
    return sorted((_sum(key, group) for key, group in groups.items()), key=lambda line: -line.seconds)


def _sum(key: tuple[str, str, str], group: Sequence[Line]) -> Line:
    def total(name: str) -> float:
        return sum(getattr(line, name) for line in group)

    bound = max(group, key=lambda line: line.ceiling).bound
    return Line(
        *key, total("calls"), total("launches"), total("seconds"), total("low"), total("high"), total("kernel_seconds"),
        total("bytes"), total("flops"), bound, total("ceiling"),
    )  # fmt: skip


def kind_of(block: str) -> str:
    """`text` of `text 3`; a block that has no number is a kind of its own."""
    return re.sub(r"^(text|image|connection) \d+$", r"\1", block)


def phases(found: Sequence[Line]) -> dict[str, float]:
    """Seconds by phase, in the order of a step."""
    spent: defaultdict[str, float] = defaultdict(float)
    for line in found:
        spent[line.phase] += line.seconds
    rest = spent.pop(BETWEEN, 0.0)
    return {**spent, "between phases": rest}


def shares(found: Sequence[Line], waits: bool) -> Shares:
    """Where the time of a step goes. `waits`: whether waiting for batches was measured."""
    spent, seconds = phases(found), sum(line.seconds for line in found)
    within = [line for line in found if line.phase in _STEP_PHASES]
    kernels = {
        bound: sum(line.kernel_seconds for line in within if line.bound == bound) for bound in ("GEMM", "bandwidth")
    }
    others = sum(line.kernel_seconds for line in within if line.op and not line.bound)
    host = sum(line.seconds for line in within) - sum(kernels.values()) - others + spent["between phases"]
    graph = "graph" in spent
    return Shares(
        data=spent.get("data", 0.0) / seconds if waits else None,
        copy=spent.get("copy", 0.0) / seconds,
        host=None if graph else host / seconds,
        bandwidth=None if graph else (kernels["bandwidth"] + others) / seconds,
        gemm=None if graph else kernels["GEMM"] / seconds,
        reduce=spent.get("reduce", 0.0) / seconds,
        optimizer=spent.get("step", 0.0) / seconds,
    )


def about(found: Sequence[Line], device: torch.device, graphs: bool) -> About:
    """What the rules want to know beside shares."""
    return About(
        device=device.type,
        graphs=graphs,
        seconds=sum(line.seconds for line in found),
        launches=round(sum(line.launches for line in found)),
        kernel_seconds=sum(line.kernel_seconds for line in found),
    )
