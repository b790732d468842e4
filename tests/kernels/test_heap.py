"""Freed memory stays with the process, unless its user has decided otherwise."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

_PROGRAM = """
import resource
import torch
from kernels import heap

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(64 << 20, dtype=torch.uint8)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

kept = heap.keep()
for _ in range(30):  # small blocks settle in the first holes, and the next request is too large for those
    faults()
print(kept, min(faults() for _ in range(3)))
"""
_PAGES = (64 << 20) // 4096


def _run(**environment: str) -> tuple[bool, int]:
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("MALLOC_", "GLIBC_TUNABLES", "LD_PRELOAD"))}
    command = [sys.executable, "-c", _PROGRAM]
    done = subprocess.run(command, env=inherited | environment, capture_output=True, text=True, check=True)
    kept, faults = done.stdout.split()
    return kept == "True", int(faults)


def test_memory_asked_for_again_costs_no_page_faults_in_the_end() -> None:
    kept, faults = _run()
    if not kept:
        pytest.skip("not glibc")
    assert faults < _PAGES // 100


@pytest.mark.parametrize("environment", [{"MALLOC_ARENA_MAX": "2"}, {"GLIBC_TUNABLES": "glibc.malloc.tcache_count=7"}])
def test_the_users_own_settings_win(environment: dict[str, str]) -> None:
    kept, faults = _run(**environment)
    assert not kept and faults >= _PAGES // 512, "pages of 4 KiB or 2 MiB, handed out anew"
