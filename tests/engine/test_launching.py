"""The SLURM script of engine/README.md, run as it stands, with stand-ins for srun and scontrol and two ranks on CPUs."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from engine.journal import read_rows
from tests.engine.launch import free_port
from tests.reference import ROOT

SRUN = """#!/bin/bash
# Two tasks on this node; signals reach the tasks; the exit code is the largest.
shift
for n in 0 1; do SLURM_PROCID=$n SLURM_LOCALID=$n SLURM_NTASKS=2 "$@" & pids="$pids $!"; done
trap : TERM
code=0
for pid in $pids; do
  wait $pid; one=$?
  while kill -0 $pid 2>/dev/null; do wait $pid; one=$?; done
  [ $one -gt $code ] && code=$one
done
exit $code
"""
SCONTROL = """#!/bin/bash
if [ "$1" = requeue ]; then echo "$2" >> REQUEUED; else echo 127.0.0.1; fi
"""


@pytest.mark.slow
def test_the_slurm_script_saves_requeues_and_continues(tmp_path: Path) -> None:
    (script,) = re.findall(r"```bash\n(#!/bin/bash\n.*?)```", (ROOT / "engine" / "README.md").read_text(), re.DOTALL)
    (tmp_path / "train.sbatch").write_text(script.replace("29500", str(free_port())))
    for name, text in {"srun": SRUN, "scontrol": SCONTROL.replace("REQUEUED", str(tmp_path / "requeued"))}.items():
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    environment = {
        **os.environ, "PATH": f"{tmp_path}:{Path(sys.executable).parent}:{os.environ['PATH']}", "SLURM_JOB_ID": "7",
        "SLURM_JOB_NODELIST": "here", "CUDA_VISIBLE_DEVICES": "",
    }  # fmt: skip
    run = tmp_path / "run"
    command = [
        "bash", str(tmp_path / "train.sbatch"), "configs/runs/world.yaml", f"output={run}", f"world.path={tmp_path / 'world'}",
        "world.size=small", "tasks=refcoco", "task_overrides.refcoco.batch=4", "logging.every=1", "device=cpu",
        "validation.max_examples=8", "logging.console=plain",
    ]  # fmt: skip
    for time_around in (1, 2):
        with (tmp_path / "output").open("wb") as output:
            job = subprocess.Popen(
                command, cwd=ROOT, env=environment, stdout=output, stderr=output, start_new_session=True
            )
        try:
            until = time.monotonic() + 240
            while not _has_row(run, 3 * time_around):
                assert job.poll() is None and time.monotonic() < until, (tmp_path / "output").read_text()
                time.sleep(0.2)
            for process in psutil.Process(job.pid).children(recursive=True):
                if "engine.train" in process.cmdline() and "python" in process.name():
                    process.send_signal(signal.SIGTERM)
            assert job.wait(60) == 75, (tmp_path / "output").read_text()
        finally:
            if job.poll() is None:
                os.killpg(job.pid, signal.SIGKILL)
        assert (tmp_path / "requeued").read_text() == "7\n" * time_around
    assert [row["event"] for row in read_rows(run / "events.jsonl") if row["event"] in ("start", "resume")] == [
        "start", "resume",
    ]  # fmt: skip


def _has_row(run: Path, iteration: int) -> bool:
    file = run / "metrics.jsonl"
    return file.exists() and any(row["iteration"] >= iteration for row in read_rows(file))
