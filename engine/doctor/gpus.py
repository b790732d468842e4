"""The GPUs, how they reach each other, and NCCL. Never run where there is one: what is said of GPUs has only been read."""

from __future__ import annotations

import re
import subprocess
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path

from engine.doctor.lines import Asked, Line, Probe, gib

_DRIVER = Path("/proc/driver/nvidia/version")
_AMPERE = (8, 0)
"""The first with bfloat16 in its tensor cores."""
_THROUGH_THE_HOST = {"SYS", "NODE"}
_KINDS = {
    "NV": "NVLink",
    "PIX": "one PCIe switch",
    "PXB": "several PCIe switches",
    "PHB": "a PCIe host bridge",
    "NODE": "the bus within a NUMA node",
    "SYS": "the bus between NUMA nodes",
}


def gpu(number: int, name: str, capability: tuple[int, int], free: int, total: int) -> Line:
    """One GPU: its compute capability, and bytes of its memory."""
    what = f"gpu {number}"
    value = f"{name}, sm_{capability[0]}{capability[1]}, {gib(free)} of {gib(total)} free"
    if capability < _AMPERE:
        return Line(what, f"{value}: it has no bfloat16", "note", "precision=float32")
    if free < total / 2:
        return Line(what, f"{value}: something else is using it", "note", "nvidia-smi")
    return Line(what, value)


def none(driver: str, torch_cuda: str | None, said: str, wanted: bool) -> Line:
    """No GPU that torch can use. `driver`: its version, `torch_cuda`: what torch is built for, `said`: torch, of why."""
    reason = f" ({said})" if said else ""
    if driver and torch_cuda is None:
        return Line("gpu", f"there is a driver ({driver}), but this torch is built for CPUs only", "problem",
                    "pip install --force-reinstall -r requirements.txt")  # fmt: skip
    if driver:
        value = f"torch, built for CUDA {torch_cuda}, cannot use what the driver ({driver}) has{reason}"
        return Line("gpu", value, "problem", "nvidia-smi; echo $CUDA_VISIBLE_DEVICES")
    if wanted:
        return Line("gpu", f"cuda is asked for, and there is none{reason}", "problem", "device=cpu")
    return Line("gpu", "none: everything runs on the CPU")


def driver_version(text: str) -> str:
    """From /proc/driver/nvidia/version, whose first line has it among other words."""
    found = re.search(r"\b\d{3,}\.\d+(\.\d+)?\b", text)
    return found[0] if found else "of unknown version"


def links(table: str) -> Counter[str]:
    """How many pairs of GPUs are linked in each way, from `nvidia-smi topo -m`."""
    rows = [re.sub(r"\x1b\[[0-9;]*m", "", line).split("\t") for line in table.splitlines()]
    names = [cell.strip() for cell in rows[0]] if rows else []
    columns = [place for place, name in enumerate(names) if re.fullmatch(r"GPU\d+", name)]
    found: Counter[str] = Counter()
    for row in rows[1:]:
        if not re.fullmatch(r"GPU\d+", row[0].strip()):
            continue
        for place in columns:
            if place < len(row) and names[place] > row[0].strip():
                found[row[place].strip().rstrip("0123456789")] += 1
    return found


def topology(found: Mapping[str, int]) -> Line:
    """`found`: as `links` gives it."""
    value = ", ".join(f"{count} pairs over {_KINDS.get(kind, kind)}" for kind, count in found.items())
    if _THROUGH_THE_HOST & found.keys():
        return Line("topology", f"{value}: those pairs share the host's bus", "note",
                    "nvidia-smi topo -m, then CUDA_VISIBLE_DEVICES=… with GPUs that are near each other")  # fmt: skip
    return Line("topology", value)


def _devices(asked: Asked) -> Iterator[Line]:
    import torch

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        usable = torch.cuda.is_available()
    if not usable:
        driver = driver_version(_DRIVER.read_text()) if _DRIVER.exists() else ""
        said = str(caught[0].message).strip().splitlines()[0] if caught else ""
        wanted = asked.device == "cuda" or (asked.config is not None and asked.config.device == "cuda")
        yield none(driver, torch.version.cuda, said, wanted)
        return
    for number in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(number)
        name, capability = torch.cuda.get_device_name(number), torch.cuda.get_device_capability(number)
        yield gpu(number, name, capability, free, total)


def _nccl(asked: Asked) -> Iterator[Line]:
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if not count:
        return
    if not torch.distributed.is_nccl_available():
        yield Line("nccl", "not in this torch: several ranks cannot use GPUs", "problem",
                   "pip install --force-reinstall -r requirements.txt")  # fmt: skip
        return
    yield Line("nccl", ".".join(map(str, torch.cuda.nccl.version())))
    if count > 1:
        command = ["nvidia-smi", "topo", "-m"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
        yield topology(links(done.stdout))


PROBES: Mapping[str, Probe] = {"gpu": _devices, "nccl": _nccl}
