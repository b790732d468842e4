"""`stopgo doctor`: what this machine has, which backend each op would take and why, and what is missing."""

from __future__ import annotations

import argparse
import importlib.util
import os
import platform
import shutil
import sys
from importlib import metadata

import torch
from rich.console import Console
from rich.table import Table

from engine.house import check_imports
from kernels import backends, native_library
from pipelines import copy_runs
from pipelines.errors import BadInput

_OPTIONAL = {
    "apex": "its LayerNorm and Adam by name (kernels: {adamw: apex}), peers of bench.kernels; from source",
    "flash_attn": "a peer of bench.kernels on GPUs",
    "liger_kernel": "a peer of bench.kernels on GPUs",
    "nvidia-dali-cuda130": "data_path=dali, decoding of images: make setup-dali",
    "torchvision": "a detector for pipelines.extract",
}
"""Packages by the name that they are installed under, and what for."""


def main(argv: list[str] | None = None) -> int:
    """Command line; returns the exit code: 0, or 1 where something needs mending."""
    parser = argparse.ArgumentParser(prog="stopgo doctor", description=__doc__)
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="whose kernels to show")
    arguments = parser.parse_args(argv)
    console = Console(highlight=False)
    try:
        check_imports()
        device = _device(arguments.device)
        console.print(_machine(device))
        console.print(_kernels(device))
    except (BadInput, backends.UnusableBackend) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    problems = _problems(device)
    for problem in problems:
        console.print(f"[yellow]![/] {problem}")
    return 1 if problems else 0


def _device(name: str) -> torch.device:
    if name == "cuda" and not torch.cuda.is_available():
        raise BadInput("--device", "torch sees no GPU", "leave it out, or install torch for your driver")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


def _machine(device: torch.device) -> Table:
    table = Table(title="machine", title_justify="left", show_header=False)
    threads = f"{torch.get_num_threads()} threads of {os.cpu_count()} cores"
    rows = {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {threads}",
        "native kernels": native_library.isa() if native_library.available() else native_library.reason(),
        "copying of features": "native" if copy_runs.native() else "torch",
        "compiler": os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++") or "none",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _version("triton") or "not installed",
        "deepspeed": _version("deepspeed") or "not installed (runs over several ranks; make setup)",
    }
    for name, purpose in _OPTIONAL.items():
        rows[name] = _version(name) or f"not installed ({purpose})"
    for name, value in rows.items():
        table.add_row(name, value)
    return table


def _kernels(device: torch.device) -> Table:
    table = Table("op", "backend", "why", title=f"kernels on {device.type}", title_justify="left")
    for choice in backends.report(device):
        table.add_row(*choice)
    return table


def _problems(device: torch.device) -> list[str]:
    found = []
    if device.type == "cpu" and not native_library.available():
        found.append(
            f"no native kernels ({native_library.reason()}): a step takes about twice the time; "
            "install a C++ compiler (Debian: apt-get install g++)"
        )
    return found


def _version(name: str) -> str:
    """Of an installed distribution, or "installed" for a module that belongs to none; empty where there is neither."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "installed" if name.isidentifier() and importlib.util.find_spec(name) is not None else ""


if __name__ == "__main__":
    sys.exit(main())
