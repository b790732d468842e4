"""The limits of this process's control group, which the kernel's own numbers (cores, free memory) do not show.

Both layouts of /sys/fs/cgroup: version 2, one tree with `cpu.max` and `memory.max`, and version 1, a tree for each controller.
A limit of any group above counts too. Where nothing can be read there is no limit.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

_NONE_OF_VERSION_1 = 2**60
"""Version 1 has a number for "no limit": the largest multiple of a page below 2**63."""


@dataclass(frozen=True)
class Cgroups:
    """The groups that a process is in. The two paths are those of Linux; tests give others."""

    root: Path = Path("/sys/fs/cgroup")
    membership: Path = Path("/proc/self/cgroup")

    def cpus(self) -> float | None:
        """Cores' worth of time that the group may use; None where there is no limit."""
        limits = [
            *(_quota(_read(folder / "cpu.max")) for folder in self._folders("")),
            *(
                _quota(f"{_read(folder / 'cpu.cfs_quota_us')} {_read(folder / 'cpu.cfs_period_us')}")
                for folder in self._folders("cpu")
            ),
        ]
        return min((limit for limit in limits if limit is not None), default=None)

    def throttled(self) -> float:
        """Share of the scheduler's periods in which the group had used up its time; 0 where that is not known."""
        for folder in (*self._folders(""), *self._folders("cpu")):
            counts = _counts(_read(folder / "cpu.stat"))
            if counts.get("nr_periods"):
                return counts.get("nr_throttled", 0) / counts["nr_periods"]
        return 0.0

    def memory_limit(self) -> int | None:
        """Bytes that the group may hold, page cache included; None where there is no limit."""
        limits = [
            *(_bytes(_read(folder / "memory.max")) for folder in self._folders("")),
            *(_bytes(_read(folder / "memory.limit_in_bytes")) for folder in self._folders("memory")),
        ]
        return min((limit for limit in limits if limit is not None), default=None)

    def memory_held(self) -> int | None:
        """Bytes that the group holds and the kernel could not simply drop: without the page cache that nobody uses."""
        for folder, used, idle in (
            *((folder, "memory.current", "inactive_file") for folder in self._folders("")),
            *((folder, "memory.usage_in_bytes", "total_inactive_file") for folder in self._folders("memory")),
        ):
            held = _bytes(_read(folder / used))
            if held is not None:
                return max(0, held - _counts(_read(folder / "memory.stat")).get(idle, 0))
        return None

    def killed(self) -> int:
        """Processes of the group that the kernel has killed for memory."""
        files = [folder / "memory.events" for folder in self._folders("")]
        files += [folder / "memory.oom_control" for folder in self._folders("memory")]
        return max((_counts(_read(file)).get("oom_kill", 0) for file in files), default=0)

    def _folders(self, controller: str) -> Iterator[Path]:
        """The process's own group of a controller, then those above it; "" is version 2, which has one tree for all.

        In a container the path may be that of the host, which is not there; its root is the container's own group then.
        """
        for line in _read(self.membership).splitlines():
            _, _, rest = line.partition(":")
            controllers, _, path = rest.partition(":")
            if controller not in controllers.split(","):
                continue
            top = self._top(controller)
            inside = Path(path.strip().lstrip("/"))
            for part in (inside, *inside.parents) if path.strip("/ \n") else (Path(),):
                if (top / part).is_dir():
                    yield top / part

    def _top(self, controller: str) -> Path:
        if controller:
            return self.root / controller
        return self.root / "unified" if (self.root / "unified").is_dir() else self.root


def _read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""


def _quota(text: str) -> float | None:
    """ "200000 100000" -> 2.0 cores; "max 100000", -1, and nothing at all are no limit."""
    numbers = text.split()
    if len(numbers) != 2 or not all(number.isdigit() for number in numbers) or numbers[1] == "0":
        return None
    return int(numbers[0]) / int(numbers[1])


def _bytes(text: str) -> int | None:
    """ "17179869184" -> 16 GiB; "max", version 1's largest number, and nothing at all are no limit."""
    return int(text) if text.isdigit() and int(text) < _NONE_OF_VERSION_1 else None


def _counts(text: str) -> dict[str, int]:
    """Lines of "name number"."""
    pairs = (line.split() for line in text.splitlines())
    return {pair[0]: int(pair[1]) for pair in pairs if len(pair) == 2 and pair[1].isdigit()}
