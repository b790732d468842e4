"""Every Triton kernel that a run can launch, compiled for a GPU that is not there, and read back from its machine code.

What is counted needs no GPU and never flakes: registers, spills, shared memory, tensor-core and asynchronous-copy
instructions. Compilation happens in processes of their own, which live as long as they do not die: a compiler that aborts
is a row in the table. Nothing is left on disk.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from importlib import import_module
from itertools import count
from pathlib import Path
from queue import SimpleQueue
from types import TracebackType
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from kernels.variants import Variant

SHARED_LIMIT = {"sm_80": 163 * 1024, "sm_86": 99 * 1024, "sm_89": 99 * 1024, "sm_90": 227 * 1024, "sm_100": 227 * 1024}
"""Bytes of shared memory that one program can have (CUDA C++ Programming Guide, compute capabilities)."""

_TENSOR_CORES = ("HMMA", "HGMMA", "UTCHMMA")
_ASYNCHRONOUS_COPIES = ("LDGSTS", "UTMALDG", "UBLKCP")
_OPCODE = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_]*)", re.MULTILINE)


@dataclass(frozen=True)
class Compiled:
    """What one variant became on one architecture. Counts are of instructions in its code, bytes of memory per thread
    (stack) or per program (shared)."""

    op: str
    name: str
    dtype: str
    arch: str
    registers: int = 0
    spill_loads: int = 0
    spill_stores: int = 0
    stack: int = 0
    shared: int = 0
    tensor_core: int = 0
    copies: int = 0
    faults: tuple[str, ...] = ()
    """What must not be: any of them fails the check."""
    notes: tuple[str, ...] = ()
    """What is slower than it could be."""

    @property
    def verdict(self) -> str:
        return "; ".join((*self.faults, *self.notes)) or "ok"


def check(
    modules: Sequence[str], archs: Sequence[str], jobs: int, on_progress: Callable[[int, int], None]
) -> list[Compiled]:
    """All variants of these modules (imported by name, with a function `variants`) on all architectures, in that order.

    `on_progress(done, all)` is called from several threads.
    """
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(jobs) as pool, _Workers(jobs, folder) as workers:
        found = list(pool.map(lambda module: workers.ask({"module": module}), modules))
        failed = [
            Compiled(module.rpartition(".")[2], "variants()", "", "", faults=(answer["error"],))
            for module, answer in zip(modules, found, strict=True)
            if "error" in answer
        ]
        work = [
            ({"module": module, "index": index, "arch": arch}, Compiled(**named, arch=arch))
            for module, answer in zip(modules, found, strict=True)
            for index, named in enumerate(answer.get("variants", []))
            for arch in archs
        ]
        done = count(1)

        def compile_one(job: tuple[dict, Compiled]) -> Compiled:
            request, named = job
            answer = workers.ask(request)
            on_progress(next(done), len(work))
            if "error" in answer:
                return Compiled(named.op, named.name, named.dtype, named.arch, faults=(answer["error"],))
            return Compiled(**{**answer, "faults": tuple(answer["faults"]), "notes": tuple(answer["notes"])})

        return failed + list(pool.map(compile_one, work))


class _Workers:
    """Processes that compile: one for each thread that asks, started again when one dies."""

    def __init__(self, jobs: int, cache: str) -> None:
        self._idle: SimpleQueue[subprocess.Popen[str] | None] = SimpleQueue()
        for _ in range(jobs):
            self._idle.put(None)
        self._jobs, self._cache = jobs, cache

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for _ in range(self._jobs):
            process = self._idle.get()
            if process is not None:
                process.kill() if error else process.communicate()
                process.wait()

    def ask(self, request: Mapping[str, object]) -> dict:
        """One answer to one request; {"error": …} where the process died over it."""
        process = self._idle.get() or self._start()
        answer = ""
        try:
            assert process.stdin is not None
            assert process.stdout is not None
            process.stdin.write(json.dumps(request) + "\n")
            process.stdin.flush()
            answer = process.stdout.readline()
        except BrokenPipeError:
            pass  # it died: said below
        finally:
            self._idle.put(process if answer else None)
        if not answer:
            return {"error": f"the compiler's process died (exit code {process.wait()})"}
        return json.loads(answer)

    def _start(self) -> subprocess.Popen[str]:
        environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
        environment |= {"TRITON_CACHE_DIR": self._cache, "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", "bench.aot"]
        root = Path(__file__).resolve().parent.parent
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
        return subprocess.Popen(command, cwd=root, env=environment, text=True, **pipes)  # type: ignore[call-overload]


def main() -> int:
    """A worker: requests as lines of JSON on stdin, answers as lines on stdout."""
    answers, sys.stdout = sys.stdout, sys.stderr  # what a compiler prints is no answer
    for line in sys.stdin:
        request = json.loads(line)
        try:
            answer = _answer(**request)
        except Exception as error:  # noqa: BLE001 - a kernel that does not compile is a finding, whatever the compiler raises
            answer = {"error": _first_line(error)}
        print(json.dumps(answer), file=answers, flush=True)
    return 0


def sources() -> str:
    """Digest of the files that hold Triton kernels: what a record of compiled ones is a record of."""
    digest = hashlib.sha256()
    for file in sorted((Path(__file__).parent.parent / "kernels").rglob("*.py")):
        text = file.read_bytes()
        if b"triton.jit" in text:
            digest.update(file.name.encode() + b"\0" + text)
    return digest.hexdigest()


def _first_line(error: Exception) -> str:
    """A compiler's message begins with the source, marked; what is wrong stands at its end."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[-1] if lines else ''}"[:200]


def _answer(module: str, index: int | None = None, arch: str = "") -> dict:
    variants: list[Variant] = import_module(module).variants()
    if index is None:
        return {"variants": [{"op": v.op, "name": v.name, "dtype": v.dtype} for v in variants]}
    return asdict(compiled(variants[index], arch))


def compiled(variant: Variant, arch: str) -> Compiled:
    """One variant, compiled for one architecture ("sm_90") and judged. ValueError for a signature that does not fit."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = variant.kernel.arg_names
    if sorted(names) != sorted(variant.signature):
        raise ValueError(f"the signature has {sorted(variant.signature)}, the kernel {sorted(names)}")
    types = {name: variant.signature[name].removesuffix(":16") for name in names}
    aligned = [name for name in names if types[name][0] == "*" or types[name] != variant.signature[name]]
    attributes = {(names.index(name),): [["tt.divisibility", 16]] for name in aligned}
    kernel = triton.compile(
        ASTSource(variant.kernel, types, variant.constexprs, attributes),
        target=GPUTarget("cuda", int(arch.removeprefix("sm_")), 32),
        options={"num_warps": variant.num_warps, "num_stages": variant.num_stages},
    )
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage, code = (_cuobjdump(option, file.name) for option in ("-res-usage", "-sass"))
    return judged(variant, arch, kernel.metadata.shared, usage, Counter(_OPCODE.findall(code)))


def judged(variant: Variant, arch: str, shared: int, usage: str, opcodes: Counter[str]) -> Compiled:
    """`usage`: what cuobjdump -res-usage prints; `opcodes`: how often each instruction stands in the code."""
    registers, stack = (int(value) for value in re.findall(r"(?:REG|STACK):(\d+)", usage)[:2])
    loads, stores = opcodes["LDL"], opcodes["STL"]
    tensor_core, copies = (sum(opcodes[name] for name in names) for names in (_TENSOR_CORES, _ASYNCHRONOUS_COPIES))
    limit = SHARED_LIMIT.get(arch, shared)
    faults = {
        "spills": bool(loads or stores or stack),
        "no tensor cores": variant.dot and variant.dtype != "float32" and not tensor_core,
        f"more shared memory than {limit // 1024} KiB": shared > limit,
    }
    return Compiled(
        variant.op, variant.name, variant.dtype, arch, registers, loads, stores, stack, shared, tensor_core, copies,
        tuple(fault for fault, found in faults.items() if found),
        ("no asynchronous copies",) if variant.copies and not copies else (),
    )  # fmt: skip


def _cuobjdump(option: str, cubin: str) -> str:
    import triton

    tool = triton.knobs.nvidia.cuobjdump.path
    return subprocess.run([tool, option, cubin], capture_output=True, text=True, check=True).stdout


if __name__ == "__main__":
    sys.exit(main())
