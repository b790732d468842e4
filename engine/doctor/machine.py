"""The machine: cores, memory, what the kernel allows a process, and room on the disk.

The functions with numbers as arguments judge; the probes below them find the numbers.
"""

from __future__ import annotations

import math
import os
import resource
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from engine.doctor.cgroups import Cgroups
from engine.doctor.lines import Asked, Line, Probe, gib

if TYPE_CHECKING:
    from engine.config import RunConfig

_BYTES_IN_TRAINING, _BYTES_TO_WORK_IN = 16, 5 * 2**29
"""On a CPU: of a value (itself, gradient, master or not, two moments), and of a step of the full model at 16 samples
(bench/results/iterations_batch_16.json)."""
_FULL_MODEL = 268_028_859
_BYTES_OF_A_VALUE = 12
"""In a checkpoint: the weight and two moments, in float32."""
_LITTLE_MEMORY = 2**30
_SHARED_MEMORY = 2**30
"""What NCCL's guide asks for."""
_FILES, _FEWEST_FILES = 1024, 256
_THROTTLED = 0.05
_HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def cores(model: str, allowed: int, machine: int, quota: float | None, throttled: float) -> Line:
    """`allowed`: cores that this process may run on; `quota`: how many of them its group may use at a time."""
    value = f"{model}, {allowed} cores" + (f" of {machine}" if allowed < machine else "")
    if quota is None or quota >= allowed:
        return Line("cpu", value)
    value += f", of which its cgroup may use {quota:.1f}"
    if throttled <= _THROTTLED:
        return Line("cpu", value)
    value += f" and was stopped for that in {throttled:.0%} of all periods"
    return Line("cpu", value, "note", f"export OMP_NUM_THREADS={max(1, math.floor(quota))}")


def threads(count: int, usable: float, key: str) -> Line:
    """Threads of a rank beside the cores that it has. `key` sets them: `threads` of a run, or OMP_NUM_THREADS."""
    fitting = max(1, math.floor(usable))
    value = f"{count} for {usable:.3g} cores ({key})"
    mend = f"threads={fitting}" if key == "threads" else f"export OMP_NUM_THREADS={fitting}"
    if count > math.ceil(usable):
        return Line("threads", f"{value}: they wait for each other, and steps take many times as long", "problem", mend)
    if count < usable / 2:
        return Line("threads", f"{value}: cores stay idle", "note", mend)
    return Line("threads", value)


def load(load_average: float, usable: float) -> Line:
    """What else wants the cores: processes that ran or waited to run, over the last minute."""
    value = f"{load_average:.1f} in the last minute, for {usable:.3g} cores"
    if load_average <= 1.25 * usable:
        return Line("load", value)
    return Line("load", f"{value}: steps that share their cores slow down far beyond their part", "note", "top -o %CPU")


def memory(total: int, available: int, limit: int | None, held: int | None, killed: int, needed: int) -> Iterator[Line]:
    """Bytes: of the machine, free or to be had there; of this process's group, its limit and what it holds already; and what
    training the model takes. `killed`: processes of the group."""
    free, value = available, f"{gib(available)} of {gib(total)} to be had"
    mend = "ps aux --sort=-rss | head"
    if limit is not None and limit < total:
        inside = max(0, limit - (held or 0))
        free, value = min(available, inside), f"{value}; the cgroup allows {gib(limit)}, {gib(inside)} are left"
        if inside < available:
            mend = "docker run --memory=16g …, or sbatch --mem=16G"
    if free < _LITTLE_MEMORY:
        yield Line("memory", f"{value}: too little to train anything", "problem", mend)
    elif free < needed:
        yield Line("memory", f"{value}; training the model on a CPU takes about {gib(needed)}", "note", mend)
    else:
        yield Line("memory", value)
    if killed:
        value = f"the kernel has killed {killed} processes of this cgroup for want of it"
        yield Line("memory", value, "note", "dmesg | grep -i 'out of memory'")


def huge_pages(text: str) -> Line:
    """What /sys says: the mode in brackets. kernels/huge_pages.py asks for them by madvise."""
    mode = text.partition("[")[2].partition("]")[0]
    if mode in ("always", "madvise"):
        return Line("huge pages", f"{mode}: had by those who ask, as the optimizer does")
    value = f"{mode or 'not in this kernel'}: the optimizer's step takes about a tenth longer"
    mend = f"echo madvise | sudo tee {_HUGE_PAGES}" if mode else "zgrep TRANSPARENT_HUGEPAGE /proc/config.gz"
    return Line("huge pages", value, "note", mend)


def shared_memory(size: int, free: int, gpus: int) -> Line:
    """Bytes of /dev/shm. One process needs none: batches are made by threads, DALI's too. Ranks of one node talk through it."""
    value = f"{gib(free)} of {gib(size)} free"
    if free >= _SHARED_MEMORY:
        return Line("/dev/shm", value)
    value += f"; several ranks on a node want {gib(_SHARED_MEMORY)} (NCCL, DeepSpeed on CPUs), one rank none"
    mend = "sudo mount -o remount,size=1G /dev/shm, or docker run --shm-size=1g …"
    return Line("/dev/shm", value, "problem" if gpus > 1 else "note", mend)


def limits(files: float, processes: float, locked: float, infiniband: bool) -> Iterator[Line]:
    """Of one process: open files, threads of its user, bytes it may lock; infinity where there is no limit."""
    if files >= _FILES:
        yield Line("open files", f"{files:,.0f} allowed")
    else:
        value = f"{files:,.0f} allowed; stores, checkpoints and connections of many ranks want {_FILES:,}"
        yield Line("open files", value, "problem" if files < _FEWEST_FILES else "note", f"ulimit -n {_FILES * 4}")
    if processes < _FEWEST_FILES:
        yield Line("processes", f"{processes:,.0f} allowed, threads count", "problem", "ulimit -u 4096")
    value = "no limit" if math.isinf(locked) else f"{gib(locked)} allowed"
    if infiniband and not math.isinf(locked):
        value += "; InfiniBand, which is here, wants all of it"
        yield Line("locked memory", value, "problem", "ulimit -l unlimited, or docker run --ulimit memlock=-1 …")
    else:
        yield Line("locked memory", f"{value} (only InfiniBand needs more)" if not math.isinf(locked) else value)


def disk(folder: Path, free: int, files: float, checkpoint: int, kept: int) -> Line:
    """Room in the file system of `folder`, where a run writes: bytes and files, beside `kept` checkpoints of so many bytes."""
    value = f"{gib(free)} free for {folder}; a run keeps {kept} checkpoints of {gib(checkpoint)}"
    if free < 2 * checkpoint:  # the newest one, and that which takes its place
        return Line("disk", value, "problem", "output=ANOTHER_FOLDER")
    if files < _FEWEST_FILES:
        return Line("disk", f"{folder}: room for {files} files", "problem", "output=ANOTHER_FOLDER")
    if free < (kept + 1) * checkpoint:
        return Line("disk", value, "note", "checkpoint.keep=1, or output=ANOTHER_FOLDER")
    return Line("disk", value)


def usable_cores() -> float:
    """Cores that this process may keep busy."""
    return min(len(os.sched_getaffinity(0)), Cgroups().cpus() or math.inf)


def memory_to_be_had() -> int:
    """Bytes that this process and its page cache may take in all: the machine's, or its group's."""
    return min(_meminfo()["MemTotal"], Cgroups().memory_limit() or 2**63)


def _cores(asked: Asked) -> Iterator[Line]:
    groups, allowed = Cgroups(), len(os.sched_getaffinity(0))
    yield cores(_model_name(), allowed, os.cpu_count() or 1, groups.cpus(), groups.throttled())


def _threads(asked: Asked) -> Iterator[Line]:
    import torch

    if asked.config is not None and asked.config.threads is not None:
        yield threads(asked.config.threads, usable_cores(), "threads")
    else:
        key = "OMP_NUM_THREADS" if "OMP_NUM_THREADS" in os.environ else "torch's choice"
        yield threads(torch.get_num_threads(), usable_cores(), key)


def _load(asked: Asked) -> Iterator[Line]:
    yield load(os.getloadavg()[0], usable_cores())


def _memory(asked: Asked) -> Iterator[Line]:
    info, groups = _meminfo(), Cgroups()
    yield from memory(
        info["MemTotal"],
        info["MemAvailable"],
        groups.memory_limit(),
        groups.memory_held(),
        groups.killed(),
        _BYTES_IN_TRAINING * _values(asked.config) + _BYTES_TO_WORK_IN,
    )


def _huge_pages(asked: Asked) -> Iterator[Line]:
    yield huge_pages(_HUGE_PAGES.read_text() if _HUGE_PAGES.exists() else "")


def _shared_memory(asked: Asked) -> Iterator[Line]:
    import torch

    usage = shutil.disk_usage("/dev/shm")
    yield shared_memory(usage.total, usage.free, torch.cuda.device_count())


def _limits(asked: Asked) -> Iterator[Line]:
    def soft(which: int) -> float:
        value = resource.getrlimit(which)[0]
        return math.inf if value == resource.RLIM_INFINITY else value

    infiniband = Path("/sys/class/infiniband")
    yield from limits(
        soft(resource.RLIMIT_NOFILE), soft(resource.RLIMIT_NPROC), soft(resource.RLIMIT_MEMLOCK),
        infiniband.is_dir() and any(infiniband.iterdir()),
    )  # fmt: skip


def _disk(asked: Asked) -> Iterator[Line]:
    config = asked.config
    folder = Path("runs" if config is None or config.output == "auto" else config.folder)
    there = next(parent for parent in (folder, *folder.absolute().parents) if parent.is_dir())
    if not os.access(there, os.W_OK):
        yield Line("disk", f"{folder}: no right to write there", "problem", "output=ANOTHER_FOLDER")
        return
    kept = 2
    if config is not None:
        from engine.config import load_tasks

        kept = config.checkpoint.keep + config.checkpoint.best * len(load_tasks(config)[1])
    room = os.statvfs(there)
    files = room.f_favail if room.f_files else math.inf  # some file systems have no table of files that could be full
    yield disk(folder, room.f_bavail * room.f_frsize, files, _BYTES_OF_A_VALUE * _values(config), kept)


def _values(config: RunConfig | None) -> int:
    """Of the run's model, about: the published layout at its size; of the full model where no run is named."""
    if config is None:
        return _FULL_MODEL
    from engine.model.published import TIED, published_shapes

    return sum(math.prod(shape) for key, shape in published_shapes(config.model, {}).items() if key != TIED)


def _meminfo() -> dict[str, int]:
    """Bytes by name."""
    lines = (line.split() for line in Path("/proc/meminfo").read_text().splitlines())
    return {words[0].rstrip(":"): int(words[1]) * 1024 for words in lines if len(words) == 3}


def _model_name() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown CPU")


PROBES: Mapping[str, Probe] = {
    "cpu": _cores,
    "threads": _threads,
    "load": _load,
    "memory": _memory,
    "huge pages": _huge_pages,
    "/dev/shm": _shared_memory,
    "limits": _limits,
    "disk": _disk,
}
