"""The packages: what requirements.txt pins against what is installed, and what others bring that a run may ask for."""

from __future__ import annotations

import ast
import importlib.util
import os
import platform
import re
import shutil
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from engine.doctor.lines import Asked, Line, Probe

ROOT = Path(__file__).resolve().parent.parent.parent
_PYTHON = (3, 11)
_TOLD = ("torch", "triton", "numpy", "deepspeed", "lmdb")
"""Named with their versions where all is as it should be; the others are counted."""
_DALI = "nvidia-dali-cuda130"
_PEERS = {"flash_attn": "flash_attn", "liger_kernel": "liger_kernel", "torchvision": "torchvision"}
"""Modules that only measurements (`bench.kernels`) and a detector for photos use."""


@dataclass(frozen=True)
class Pin:
    """One line of a requirements file."""

    name: str
    version: str
    needed: bool
    """By training itself: it stands in the first block of the file."""


def pins(text: str) -> list[Pin]:
    """The pinned packages of a requirements file."""
    found: list[Pin] = []
    first = True
    for line in text.splitlines():
        requirement = line.partition("#")[0].strip()
        if not line.strip():
            first = first and not found
        elif "==" in requirement:
            name, _, version = requirement.partition("==")
            found.append(Pin(name.strip(), version.strip(), first))
    return found


def compared(wanted: list[Pin], installed: Mapping[str, str]) -> Iterator[Line]:
    """`installed`: version by name. One line for all that is as pinned, one for each that is not. Labels (+cpu) are free."""
    matching = []
    for pin in wanted:
        version = installed.get(pin.name, "")
        if version.partition("+")[0] == pin.version:
            matching.append(pin)
        elif version:
            yield Line(pin.name, f"{version}, pinned is {pin.version}", "note", "make setup")
        else:
            whose = "" if pin.needed else " (tests, checks, or what others need)"
            value = f"not installed, pinned is {pin.version}{whose}"
            yield Line(pin.name, value, "problem" if pin.needed else "note", "make setup")
    told = [f"{pin.name} {installed[pin.name]}" for pin in matching if pin.name in _TOLD]
    rest = len(matching) - len(told)
    if matching:
        yield Line("as pinned", ", ".join([*told, f"{rest} more" if told else f"{rest} packages"]))


def _python(asked: Asked) -> Iterator[Line]:
    value = f"{platform.python_version()} in {sys.prefix}"
    if sys.version_info[:2] == _PYTHON:
        yield Line("python", value)
    else:
        wanted = ".".join(map(str, _PYTHON))
        yield Line("python", f"{value}; {wanted} is wanted", "problem", f"make setup PYTHON=python{wanted}")


def _pinned(asked: Asked) -> Iterator[Line]:
    wanted = pins((ROOT / "requirements.txt").read_text())
    yield from compared(wanted, {pin.name: version for pin in wanted if (version := _version(pin.name))})


def _own_kernels(asked: Asked) -> Iterator[Line]:
    from engine.house import check_imports

    check_imports()  # raises BadInput, which becomes a line
    yield from ()


def _lmdb(asked: Asked) -> Iterator[Line]:
    import lmdb

    yield Line("lmdb", f"library {'.'.join(map(str, lmdb.version()))}; stores are read without it, and written with it")


def _dali(asked: Asked) -> Iterator[Line]:
    version, wanted = _version(_DALI), asked.config is not None and asked.config.data_path == "dali"
    if wanted:
        from pipelines import dali

        dali.check_installed()  # raises BadInput, which becomes a line
    pinned = next(pin.version for pin in pins((ROOT / "requirements-dali.txt").read_text()) if pin.name == _DALI)
    if not version:
        yield Line("dali", "not installed; only data_path=dali and decoding of images use it (make setup-dali)")
    elif version != pinned:
        yield Line("dali", f"{version}, pinned is {pinned}", "note", "make setup-dali")
    else:
        yield Line("dali", version)


def _deepspeed(asked: Asked) -> Iterator[Line]:
    """Its ops, without importing it: that takes seconds."""
    spec = importlib.util.find_spec("deepspeed")
    if spec is None or spec.origin is None:
        return  # said already
    ops = prebuilt((Path(spec.origin).parent / "git_version_info_installed.py").read_text())
    asks = asked.config is not None and (
        asked.config.kernels.get("adamw") == "deepspeed" or "offload" in str(asked.config.deepspeed)
    )
    missing = [tool for tool in ("ninja", "c++") if not (shutil.which(tool) or os.environ.get("CXX"))]
    value = (
        f"prebuilt: {', '.join(ops)}"
        if ops
        else "none prebuilt; built when they are asked for (adamw=deepspeed, offload)"
    )
    if asks and not ops and missing:
        mend = "sudo apt-get install g++ ninja-build"
        yield Line("deepspeed ops", f"asked for, and not to be built: no {', '.join(missing)}", "problem", mend)
    else:
        yield Line("deepspeed ops", value)


def prebuilt(text: str) -> list[str]:
    """The ops that DeepSpeed was installed with, from its own record of that."""
    found = re.search(r"^installed_ops\s*=\s*(\{.*?\})", text, re.MULTILINE | re.DOTALL)
    ops = ast.literal_eval(found[1]) if found else {}
    return sorted(name for name, there in ops.items() if there)


def _apex(asked: Asked) -> Iterator[Line]:
    asks = asked.config is not None and "apex" in asked.config.kernels.values()
    if _is_there("apex.optimizers"):
        yield Line("apex", f"installed {_version('apex')}")
    elif _is_there("apex"):
        yield Line(
            "apex", "another package of that name, not NVIDIA's", "problem" if asks else "note", "pip uninstall apex"
        )
    elif asks:
        mend = "pip install --no-build-isolation git+https://github.com/NVIDIA/apex"
        yield Line("apex", "asked for, and not installed", "problem", mend)
    else:
        yield Line("apex", "not installed; only kernels that are asked for by this name use it")


def _peers(asked: Asked) -> Iterator[Line]:
    there = [name for name, module in _PEERS.items() if _is_there(module)]
    yield Line("others", f"{', '.join(there) or 'none'} of {', '.join(_PEERS)}; training uses none of them")


def _version(name: str) -> str:
    """Of an installed distribution; empty where there is none."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return ""


def _is_there(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ImportError:
        return False


PROBES: Mapping[str, Probe] = {
    "python": _python,
    "packages": _pinned,
    "kernels": _own_kernels,
    "lmdb": _lmdb,
    "dali": _dali,
    "deepspeed ops": _deepspeed,
    "apex": _apex,
    "others": _peers,
}
