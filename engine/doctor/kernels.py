"""The kernels that a run would use: the compiler, the native library, and which backend each op takes."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from engine.doctor.lines import Asked, Line, Probe

if TYPE_CHECKING:
    import torch

_BUILD = "stopgo doctor --build"
_INSTALL = "sudo apt-get install g++"
_PLACES = {"cpu": "CPU", "cuda": "GPU"}
_WITHOUT = "a training step on the CPU takes about twice the time"


def _compiler(asked: Asked) -> Iterator[Line]:
    from kernels import native_build, native_library
    from pipelines import copy_runs

    command = native_build.compiler()
    if command is None:
        built = native_library.path_of(native_library.wanted_isa()).exists() and copy_runs.path().exists()
        where = "none found, and none needed: all is built"
        yield (
            Line("compiler", where)
            if built
            else Line("compiler", f"none found: no native kernels, {_WITHOUT}", "problem", _INSTALL)
        )
        return
    mend = "unset CXX" if os.environ.get("CXX") else _INSTALL
    if shutil.which(command) is None:
        yield Line("compiler", f"{command}: no such program", "problem", mend)
        return
    done = subprocess.run([command, "--version"], capture_output=True, text=True, timeout=20, check=False)
    if done.returncode or not done.stdout.strip():
        yield Line("compiler", f"{command} does not work (exit code {done.returncode})", "problem", mend)
    else:
        yield Line("compiler", f"{command}: {done.stdout.splitlines()[0]}")


def _native(asked: Asked) -> Iterator[Line]:
    from kernels import native_library

    try:
        name = native_library.wanted_isa()
    except ValueError as error:
        yield Line("native kernels", str(error), "problem", "unset STOPGO_ISA")
        return
    path, best = native_library.path_of(name), native_library.best_isa()
    if not (path.exists() or asked.build):
        if native_library.expected().isa:
            yield Line(
                "native kernels", f"{name}: built when they are first needed, in some 15 seconds", "note", _BUILD
            )
        else:
            yield Line("native kernels", f"{native_library.expected().reason}: {_WITHOUT}", "problem", _INSTALL)
        return
    try:
        found = native_library.found()
    except (OSError, RuntimeError) as error:
        yield Line("native kernels", f"{error}", "problem", f"rm {path} && {_BUILD}")
        return
    if not found.isa:
        yield Line("native kernels", f"cannot be built: {found.reason}; {_WITHOUT}", "problem", _INSTALL)
    elif name != best:
        yield Line("native kernels", f"{name}, by STOPGO_ISA; this CPU has {best}", "note", "unset STOPGO_ISA")
    else:
        yield Line("native kernels", f"built for {found.isa}, the best that this CPU has")


def _ops(asked: Asked) -> Iterator[Line]:
    """As the first lines of a run say it."""
    device = _device(asked)
    try:
        from kernels import backends  # which reads STOPGO_KERNELS

        with backends.using(asked.config.kernels if asked.config else {}):
            choices = backends.report(device, build=asked.build or _built())
    except ValueError as error:  # an override that does not exist, or that cannot be obeyed
        op = str(error).partition(":")[0]
        by_run = asked.config is not None and op in asked.config.kernels
        named = [name for name in ("STOPGO_KERNELS", "STOPGO_ISA") if os.environ.get(name)]
        yield Line("ops", str(error), "problem", f"kernels.{op}=torch" if by_run else f"unset {' '.join(named)}")
        return
    for backend, ops in backends.grouped(choices).items():
        yield Line(f"on the {_PLACES[device.type]}", f"{backend}: {', '.join(ops)}")
    if backends.interpreting():
        value = "TRITON_INTERPRET=1: Triton runs in its interpreter, thousands of times slower"
        yield Line("triton", value, "problem" if device.type == "cuda" else "note", "unset TRITON_INTERPRET")


def _copying(asked: Asked) -> Iterator[Line]:
    from kernels import native_build
    from pipelines import copy_runs

    if copy_runs.path().exists() or asked.build:
        if copy_runs.native():
            yield Line("copying features", "native")
            return
    elif native_build.compiler():
        yield Line("copying features", "native: built when it is first needed, in seconds", "note", _BUILD)
        return
    yield Line("copying features", "by torch: filling a batch takes two to five times as long", "problem", _INSTALL)


def _built() -> bool:
    """Whether the native library of this CPU is there."""
    from kernels import native_library

    return native_library.path_of(native_library.wanted_isa()).exists()


def _device(asked: Asked) -> torch.device:
    import torch

    wanted = asked.device
    if wanted == "auto" and asked.config is not None:
        wanted = asked.config.device
    if wanted == "auto":
        wanted = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(wanted)


PROBES: Mapping[str, Probe] = {"compiler": _compiler, "native kernels": _native, "ops": _ops, "copying": _copying}
