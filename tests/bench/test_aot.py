"""The ahead-of-time checks: what is wrong with a kernel is found, and bytes are counted as by hand. No GPU is needed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from bench import aot_report
from bench.aot import Compiled, check, judged
from bench.traffic import Counted, Traffic, within
from kernels.dropout import variants

ROOT = Path(__file__).resolve().parents[2]

TOYS = """
import os
import triton
import triton.language as tl
from kernels.variants import Variant

@triton.jit
def holds_too_much(x, N: tl.constexpr):
    place = x + tl.arange(0, N)
    value = tl.load(place)
    tl.store(place, value / tl.sum(value, 0))

@triton.jit
def in_full_precision(x, N: tl.constexpr):
    place = x + tl.arange(0, N)[:, None] * N + tl.arange(0, N)[None, :]
    value = tl.load(place)
    tl.store(place, tl.dot(value, value, input_precision="ieee"))

def toy(kernel, n, dtype="bfloat16", **more):
    given = {"dot": False, "copies": False, **more}
    return Variant("toy", kernel.__name__, kernel, {"x": "*fp32", "N": "constexpr"}, {"N": n}, 1, 1, dtype, **given)
"""


@pytest.fixture
def modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder whose modules the compiling processes can import."""
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{ROOT}")
    (tmp_path / "toys.py").write_text(TOYS)
    return tmp_path


def compile_module(folder: Path, variants: str, archs: tuple[str, ...] = ("sm_90",)) -> list[Compiled]:
    (folder / "some.py").write_text(f"from toys import *\ndef variants():\n    return {variants}\n")
    return check(["some"], archs, 1, lambda done, total: None)


def test_a_real_kernel_compiles_for_both_gpus(modules: Path) -> None:
    (modules / "real.py").write_text("import kernels.dropout\ndef variants(): return kernels.dropout.variants()[:1]\n")
    found = check(["real"], ["sm_80", "sm_90"], 2, lambda done, total: None)
    assert [(row.op, row.arch, row.verdict) for row in found] == [
        ("dropout", "sm_80", "ok"),
        ("dropout", "sm_90", "ok"),
    ]
    assert all(row.registers > 8 and row.stack == 0 for row in found)


def test_a_spilling_kernel_ends_with_1(
    modules: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (row,) = found = compile_module(modules, "[toy(holds_too_much, 16384)]")
    assert row.spill_loads > 0 < row.spill_stores
    assert row.faults == ("spills",)
    monkeypatch.setattr(aot_report, "check", lambda *_: found)
    monkeypatch.setattr(aot_report, "count_all", lambda *_: {})
    assert aot_report.run(["dropout"], ["sm_90"], 1, tmp_path / "aot.json") == 1
    assert "1 at fault" in capsys.readouterr().out
    assert json.loads((tmp_path / "aot.json").read_text())["variants"][0]["verdict"] == "spills"


def test_a_product_without_tensor_cores_is_a_fault_where_they_are_expected(modules: Path) -> None:
    cases = "dict(dot=True), dict(dot=False), dict(dot=True, dtype='float32')"
    wanted, unwanted, full = compile_module(modules, f"[toy(in_full_precision, 16, **more) for more in ({cases})]")
    assert wanted.tensor_core == unwanted.tensor_core == full.tensor_core == 0
    assert wanted.faults == ("no tensor cores",)
    assert (unwanted.verdict, full.verdict) == ("ok", "ok")


def test_missing_asynchronous_copies_are_noted_but_no_fault(modules: Path) -> None:
    (row,) = compile_module(modules, "[toy(in_full_precision, 16, copies=True)]")
    assert (row.faults, row.notes) == ((), ("no asynchronous copies",))


def test_a_dying_compiler_is_a_row_and_the_next_kernel_still_compiles(modules: Path) -> None:
    (modules / "dies.py").write_text("import os\ndef variants(): os.abort()\n")
    (modules / "lives.py").write_text("from toys import *\ndef variants(): return [toy(in_full_precision, 16)]\n")
    died, lived = check(["dies", "lives"], ["sm_90"], 1, lambda done, total: None)
    assert died.faults == ("the compiler's process died (exit code -6)",)
    assert lived.verdict == "ok"


def test_what_does_not_compile_says_why(modules: Path) -> None:
    unfit = "Variant('toy', 'unfit', in_full_precision, {'y': '*fp32'}, {}, 1, 1, 'float32', False, False)"
    (row,) = compile_module(modules, f"[{unfit}]")
    assert row.verdict == "ValueError: the signature has ['y'], the kernel ['N', 'x']"
    (row,) = check(["toys"], ["sm_90"], 1, lambda done, total: None)
    assert row.verdict == "AttributeError: module 'toys' has no attribute 'variants'"


def test_more_shared_memory_than_there_is() -> None:
    usage = " Function f:\n  REG:64 STACK:0 SHARED:0 LOCAL:0"
    fits = judged(variants()[0], "sm_80", 163 * 1024, usage, Counter())
    assert (fits.registers, fits.verdict) == (64, "ok")
    assert judged(variants()[0], "sm_80", 163 * 1024 + 1, usage, Counter()).faults == (
        "more shared memory than 163 KiB",
    )


def test_traffic_is_counted_as_by_hand(tmp_path: Path) -> None:
    """100 of 128 lanes: two programs read the same 100 float16 (one place of them twice, masked lanes not) and write their own
    100 float32; a product of torch's then reads and writes 200 float32."""
    script = tmp_path / "count.py"
    script.write_text("""
import json, torch, triton, triton.language as tl
from bench.traffic import counting

@triton.jit
def kernel(x, y):
    lane = tl.arange(0, 128)
    value = tl.load(x + lane, lane < 100).to(tl.float32) + tl.load(x + lane * 0)
    tl.store(y + tl.program_id(0) * 100 + lane, value, lane < 100)

x, y = torch.ones(128, dtype=torch.float16), torch.empty(200)
with counting() as traffic:
    kernel[(2,)](x, y)
    y.view(2, 100) * 2.0
print(json.dumps([traffic.launches, traffic.issued, traffic.distinct, traffic.atomics, traffic.names]))
""")
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, str(script)], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    issued = 2 * (100 * 2 + 1 * 2 + 100 * 4) + 2 * 200 * 4
    distinct = 100 * 2 + 200 * 4 + 2 * 200 * 4
    assert json.loads(done.stdout) == [2, issued, distinct, 0, ["kernel", "mul"]]


@pytest.mark.parametrize(
    ("op", "longest", "ratio", "verdict"),
    [
        ("bias_gelu", 0, 1.1, "ok"),
        ("bias_gelu", 0, 1.15, "over the goal"),
        ("bias_gelu", 0, 1.3, "over the floor"),
        ("attention", 64, 1.3, "ok"),
        ("attention", 65, 9.0, ""),
        ("masked_lm_loss", 0, 1.0, "ok"),
    ],
)
def test_limits_of_traffic(op: str, longest: int, ratio: float, verdict: str) -> None:
    distinct = 1000 if op == "masked_lm_loss" else 0
    forward = Traffic(1, round(1000 * ratio), distinct)
    assert within(Counted(op, "", forward, Traffic(), 1000, longest))[1] == verdict
