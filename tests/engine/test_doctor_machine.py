"""`stopgo doctor`: what it judges of a machine and its packages, by given numbers and texts."""

from __future__ import annotations

import math
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import pytest

from engine.doctor import gpus, machine, packages, stores
from engine.doctor.cgroups import Cgroups
from engine.doctor.lines import Line

ROOT = Path(__file__).resolve().parent.parent.parent
GIB = 2**30


JUDGED = {
    "cores of a cgroup": (machine.cores("CPU", 8, 8, 2.0, 0.0), "good", "8 cores, of which its cgroup may use 2.0"),
    "throttled": (machine.cores("CPU", 8, 8, 2.5, 0.4), "note", "export OMP_NUM_THREADS=2"),
    "as many threads as cores": (machine.threads(2, 2.0, "torch's choice"), "good", ""),
    "more threads than the cgroup allows": (machine.threads(8, 2.5, "torch's choice"), "problem", "export OMP_NUM_THREADS=2"),
    "more threads by the run": (machine.threads(8, 2.5, "threads"), "problem", "threads=2"),
    "hyper-threads left out": (machine.threads(8, 16, "torch's choice"), "good", ""),
    "idle cores": (machine.threads(1, 16, "OMP_NUM_THREADS"), "note", "export OMP_NUM_THREADS=16"),
    "a busy machine": (machine.load(6.0, 2.0), "note", "top"),
    "a quiet machine": (machine.load(2.2, 2.0), "good", ""),
    "huge pages": (machine.huge_pages("always [madvise] never\n"), "good", "madvise"),
    "no huge pages": (machine.huge_pages("always madvise [never]\n"), "note", "echo madvise | sudo tee /sys/kernel/mm/"),
    "a kernel without huge pages": (machine.huge_pages(""), "note", "not in this kernel"),
    "a small /dev/shm for one rank": (machine.shared_memory(64 * 2**20, 64 * 2**20, 0), "note", "docker run --shm-size=1g"),
    "a small /dev/shm for GPUs": (machine.shared_memory(64 * 2**20, 64 * 2**20, 8), "problem", "64.0 MiB of 64.0 MiB"),
    "a full /dev/shm": (machine.shared_memory(8 * GIB, GIB // 2, 8), "problem", "512.0 MiB of 8.0 GiB"),
    "a large /dev/shm": (machine.shared_memory(8 * GIB, 8 * GIB, 8), "good", ""),
    "room for checkpoints": (machine.disk(Path("runs"), 40 * GIB, 10**6, 3 * GIB, 2), "good", "2 checkpoints of 3.0 GiB"),
    "room for few": (machine.disk(Path("runs"), 8 * GIB, 10**6, 3 * GIB, 2), "note", "checkpoint.keep=1"),
    "room for one": (machine.disk(Path("runs"), 4 * GIB, 10**6, 3 * GIB, 2), "problem", "output="),
    "no more files": (machine.disk(Path("runs"), 40 * GIB, 3, 3 * GIB, 2), "problem", "room for 3 files"),
    "an old GPU": (gpus.gpu(0, "V100", (7, 0), 15 * GIB, 16 * GIB), "note", "precision=float32"),
    "a GPU in use": (gpus.gpu(0, "H100", (9, 0), 10 * GIB, 80 * GIB), "note", "nvidia-smi"),
    "a free GPU": (gpus.gpu(3, "H100", (9, 0), 79 * GIB, 80 * GIB), "good", "sm_90"),
    "no GPU": (gpus.none("", "13.0", "", wanted=False), "good", "none"),
    "no GPU, but asked for": (gpus.none("", "13.0", "", wanted=True), "problem", "device=cpu"),
    "a GPU and a CPU build of torch": (gpus.none("570.86.15", None, "", wanted=False), "problem", "built for CPUs only"),
    "an old driver": (gpus.none("470.1.1", "13.0", "driver too old", wanted=False), "problem", "driver too old"),
    "stores that fit": (stores.fits(10 * GIB, 32 * GIB), "good", ""),
    "stores that do not fit": (stores.fits(80 * GIB, 32 * GIB), "note", "--dtype uint8"),
    "stores on a network": (stores.file_system("/data", "nfs4", [Path("/data/a.lmdb")]), "note", "rsync -a /data/a.lmdb"),
    "stores on a disk": (stores.file_system("/", "ext4", [Path("a.lmdb"), Path("b.lmdb")]), "good", "2 stores"),
}  # fmt: skip


@pytest.mark.parametrize("case", JUDGED)
def test_what_numbers_mean(case: str) -> None:
    line, state, said = JUDGED[case]
    assert line.state == state
    assert said in f"{line.value} {line.mend}"


@pytest.mark.parametrize(
    ("numbers", "states", "said"),
    [
        ((64 * GIB, 60 * GIB, None, None, 0), ["good"], "60.0 GiB of 64.0 GiB"),
        ((64 * GIB, 60 * GIB, 16 * GIB, 4 * GIB, 0), ["good"], "the cgroup allows 16.0 GiB, 12.0 GiB are left"),
        ((64 * GIB, 60 * GIB, 8 * GIB, 4 * GIB, 0), ["note"], "docker run --memory="),
        ((64 * GIB, 5 * GIB, 32 * GIB, 4 * GIB, 0), ["note"], "ps aux"),
        ((64 * GIB, 60 * GIB, 4 * GIB, 4 * GIB, 0), ["problem"], "0 KiB are left"),
        ((64 * GIB, 60 * GIB, None, None, 3), ["good", "note"], "killed 3 processes"),
    ],
)
def test_memory_is_what_the_cgroup_leaves(
    numbers: tuple[int, int, int | None, int | None, int], states: list[str], said: str
) -> None:
    found = list(machine.memory(*numbers, needed=7 * GIB))
    assert [line.state for line in found] == states
    assert said in " ".join(f"{line.value} {line.mend}" for line in found)


@pytest.mark.parametrize(
    ("numbers", "states"),
    [
        ((1024, 4096, math.inf, True), ["good", "good"]),
        ((512, 4096, 2**16, False), ["note", "good"]),
        ((64, 4096, 2**16, True), ["problem", "problem"]),
        ((math.inf, 100, math.inf, False), ["good", "problem", "good"]),
    ],
)
def test_limits_of_a_process(numbers: tuple, states: list[str]) -> None:
    assert [line.state for line in machine.limits(*numbers)] == states


# Control groups as text


def write(root: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)


VERSION_2 = {
    "self": "0::/job/step\n",
    "fs/cpu.max": "max 100000\n",
    "fs/job/cpu.max": "250000 100000\n",
    "fs/job/step/cpu.max": "max 100000\n",
    "fs/job/step/cpu.stat": "usage_usec 5\nnr_periods 200\nnr_throttled 50\n",
    "fs/job/memory.max": str(16 * GIB),
    "fs/job/step/memory.max": "max\n",
    "fs/job/step/memory.current": str(6 * GIB),
    "fs/job/step/memory.stat": f"anon 1\ninactive_file {2 * GIB}\n",
    "fs/job/step/memory.events": "low 0\noom 4\noom_kill 3\n",
}
VERSION_1 = {
    "self": "9:name=systemd:/x\n4:memory:/docker/abc\n1:cpu,cpuacct:/docker/abc\n0::/x\n",
    "fs/unified/cgroup.procs": "",
    "fs/cpu/docker/abc/cpu.cfs_quota_us": "250000\n",
    "fs/cpu/docker/abc/cpu.cfs_period_us": "100000\n",
    "fs/cpu/cpu.cfs_quota_us": "-1\n",
    "fs/cpu/cpu.cfs_period_us": "100000\n",
    "fs/cpu/docker/abc/cpu.stat": "nr_periods 200\nnr_throttled 50\nthrottled_time 9\n",
    "fs/memory/docker/abc/memory.limit_in_bytes": str(16 * GIB),
    "fs/memory/memory.limit_in_bytes": "9223372036854771712\n",
    "fs/memory/docker/abc/memory.usage_in_bytes": str(6 * GIB),
    "fs/memory/docker/abc/memory.stat": f"cache 5\ntotal_inactive_file {2 * GIB}\n",
    "fs/memory/docker/abc/memory.oom_control": "oom_kill_disable 0\nunder_oom 0\noom_kill 3\n",
}
IN_A_CONTAINER = {name.replace("/docker/abc", ""): text for name, text in VERSION_1.items() if "docker" in name} | {
    "self": VERSION_1["self"]  # paths of the host, of which only the own group is to be seen
}


@pytest.mark.parametrize("files", [VERSION_2, VERSION_1, IN_A_CONTAINER], ids=["v2", "v1", "v1 in a container"])
def test_limits_of_control_groups(files: dict[str, str], tmp_path: Path) -> None:
    write(tmp_path, files)
    groups = Cgroups(tmp_path / "fs", tmp_path / "self")
    assert groups.cpus() == 2.5
    assert groups.throttled() == 0.25
    assert groups.memory_limit() == 16 * GIB
    assert groups.memory_held() == 4 * GIB
    assert groups.killed() == 3


UNLIMITED: list[dict[str, str]] = [
    {},
    {"self": "0::/\n", "fs/cpu.max": "max 100000", "fs/memory.max": "max"},
    {"self": "nonsense\n\n0::/", "fs/cpu.max": "0", "fs/memory.max": ""},
]


@pytest.mark.parametrize("files", UNLIMITED, ids=["nothing", "max", "nonsense"])
def test_no_control_group_no_limit(files: dict[str, str], tmp_path: Path) -> None:
    write(tmp_path, files)
    groups = Cgroups(tmp_path / "fs", tmp_path / "self")
    assert (groups.cpus(), groups.memory_limit(), groups.memory_held()) == (None, None, None)
    assert (groups.throttled(), groups.killed()) == (0, 0)


def told(lines: Iterator[Line] | list[Line]) -> list[tuple[str, str]]:
    return [(line.what, line.state) for line in lines]


# Packages


REQUIREMENTS = """# first
torch==2.13.0
lmdb==3.0.0  # why

# tests
pytest==9.2.0
-r other.txt
"""


def test_pins_are_compared_with_what_is_installed() -> None:
    pins = packages.pins(REQUIREMENTS)
    assert [(pin.name, pin.version, pin.needed) for pin in pins] == [
        ("torch", "2.13.0", True), ("lmdb", "3.0.0", True), ("pytest", "9.2.0", False),
    ]  # fmt: skip
    all_there = packages.compared(pins, {"torch": "2.13.0+cpu", "lmdb": "3.0.0", "pytest": "9.2.0"})
    assert list(all_there) == [Line("as pinned", "torch 2.13.0+cpu, lmdb 3.0.0, 1 more")]
    assert told(packages.compared(pins, {"torch": "2.12.0", "pytest": "9.2.0"})) == [
        ("torch", "note"), ("lmdb", "problem"), ("as pinned", "good"),
    ]  # fmt: skip
    assert told(packages.compared(pins, {})) == [("torch", "problem"), ("lmdb", "problem"), ("pytest", "note")]


def test_the_pins_of_this_project_are_found() -> None:
    pins = {pin.name: pin for pin in packages.pins((ROOT / "requirements.txt").read_text())}
    assert pins["torch"].needed and pins["lmdb"].needed and not pins["pytest"].needed
    assert pins["pytest"].version == metadata.version("pytest")


def test_ops_that_deepspeed_was_installed_with() -> None:
    assert packages.prebuilt("version='1'\ninstalled_ops={'cpu_adam': True, 'aio': False}\nx=1\n") == ["cpu_adam"]
    assert packages.prebuilt("version='1'\n") == []


TOPOLOGY = """\t\x1b[4mGPU0\tGPU1\tGPU2\tNIC0\tCPU Affinity\tGPU NUMA ID\x1b[0m
GPU0\t X \tNV18\tSYS\tPIX\t0-47\tN/A
GPU1\tNV18\t X \tSYS\tSYS\t0-47\tN/A
GPU2\tSYS\tSYS\t X \tSYS\t48-95\tN/A
NIC0\tPIX\tSYS\tSYS\t X \t\t

Legend:

  SYS  = Connection traversing PCIe
"""


def test_links_between_gpus() -> None:
    """The text is written after NVIDIA's description: there is no GPU to ask."""
    found = gpus.links(TOPOLOGY)
    assert found == {"NV": 1, "SYS": 2}
    assert gpus.topology(found).state == "note"
    assert gpus.topology({"NV": 28}) == Line("topology", "28 pairs over NVLink")
    assert gpus.links("") == {}


@pytest.mark.parametrize(
    "text",
    ["NVRM version: NVIDIA UNIX x86_64 Kernel Module  570.86.15  Tue Mar  5 22:23:56 UTC 2024\nGCC version:  gcc 12.3.0\n",
     "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  570.86.15  Release Build\n"],
)  # fmt: skip
def test_the_version_of_a_driver(text: str) -> None:
    assert gpus.driver_version(text) == "570.86.15"
