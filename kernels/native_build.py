"""Compiling a few C++ sources into a shared library, once, with the compiler at hand.

A library's name covers its flags and sources, so a stale one is never loaded. Imports nothing but the standard library.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

BUILD = Path(__file__).resolve().parent.parent / "build"
NO_COMPILER = "no C++ compiler found"


def compiler() -> str | None:
    """The C++ compiler that is taken: `CXX`, else g++, else c++; None where there is none."""
    return os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++")


def library_path(name: str, folder: Path, flags: Sequence[str]) -> Path:
    """Where the library `name` of all sources in `folder` lies; CMakeLists.txt computes the same digest."""
    digest = hashlib.sha256(" ".join(flags).encode())
    for source in sorted([*folder.glob("*.cpp"), *folder.glob("*.h")]):
        digest.update(source.read_bytes())
    return BUILD / f"lib{name}-{digest.hexdigest()[:16]}.so"


def build(path: Path, folder: Path, flags: Sequence[str], link_flags: Sequence[str]) -> str:
    """Compile the sources of `folder` into `path`, one process per source; why it failed, or an empty string."""
    command = compiler()
    if command is None:
        return NO_COMPILER
    path.parent.mkdir(exist_ok=True)
    sources = sorted(folder.glob("*.cpp"))
    with tempfile.TemporaryDirectory(dir=path.parent) as scratch:
        objects = [Path(scratch) / f"{source.stem}.o" for source in sources]
        commands = [
            [command, *flags, "-c", str(source), "-o", str(built)]
            for source, built in zip(sources, objects, strict=True)
        ]
        # Linked under another name and renamed, so that processes starting together never load half a file.
        linked = Path(scratch) / "linked.so"
        why = _run(commands) or _run([[command, "-shared", *link_flags, "-o", str(linked), *map(str, objects)]])
        if not why:
            os.replace(linked, path)
    return why


def _run(commands: list[list[str]]) -> str:
    try:
        started = [subprocess.Popen(c, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) for c in commands]
    except OSError as error:
        return f"{commands[0][0]}: {error}"
    failed = ""
    for process in started:
        errors = process.communicate()[1].strip()
        if process.returncode:
            failed = f"{commands[0][0]} failed: {errors.splitlines()[-1] if errors else process.returncode}"
    return failed
