"""`python -m bench.rehearsal`: two "nodes" on one machine, one of which is cut off in the middle of a run.

Each node is a network namespace with an address and a hostname of its own, on a switch (a bridge in a third namespace); the
file system is common, as on a cluster. A small run with one rank on each node is started, node-b's link is taken down, and it
is noted how long node-a takes to say so, and what the restart continues from. Three ways to start are rehearsed:

    pdsh        deepspeed --hostfile …           from node-a, by pdsh and ssh, with an sshd on each node
    no-ssh      deepspeed --hostfile … --no_ssh --node_rank R      by hand on each node
    torchrun    torchrun --nnodes 2 --node_rank R …                by hand on each node

Needs root, iproute2, and for the first openssh-server and pdsh. Nothing of the machine's own network is touched. Results go to
the section `rehearsal` of bench/results/ranks.json. What is not rehearsed: clocks that differ, file systems that hang, NCCL.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

from engine.checkpoint import newest_valid
from engine.journal import read_rows
from pipelines.errors import BadInput

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results" / "ranks.json"
SWITCH, NODES = "stopgo-switch", {"node-a": "10.77.0.1", "node-b": "10.77.0.2"}
EVERY, TIMEOUT_S, PORT = 5, 30, 29511
TRAINING = (
    "--config", "configs/runs/world.yaml", "world.size=small", "tasks=[vqa,refcoco]", "task_overrides.vqa.batch=8",
    "task_overrides.refcoco.batch=8", f"checkpoint.every={EVERY}", "logging.every=1", "logging.console=plain",
    f"ranks.timeout_s={TIMEOUT_S}", "device=cpu", "validation.max_examples=16",
)  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("ways", nargs="*", choices=[*WAYS, []], help="which ways to start; none: all")
    parser.add_argument("--results", type=Path, default=RESULTS, help="JSON file that gets the numbers")
    arguments = parser.parse_args()
    missing = [name for name in ("ip", "unshare") if shutil.which(name) is None]
    if os.geteuid() != 0 or missing:
        print(f"error: needs root and iproute2; {', '.join(missing) or 'this is another user'}", file=sys.stderr)
        return 2
    for way in arguments.ways or WAYS:
        if way == "pdsh" and not (shutil.which("pdsh") and Path("/usr/sbin/sshd").exists()):
            print("pdsh: left out, for pdsh and openssh-server are not installed", file=sys.stderr)
            continue
        with tempfile.TemporaryDirectory(prefix="rehearsal-") as folder, nodes():
            found = rehearse(WAYS[way], Path(folder))
        print(f"{way}: {json.dumps(found)}")
        results = json.loads(arguments.results.read_text()) if arguments.results.exists() else {}
        results.setdefault("rehearsal", {})[way] = {"date": time.strftime("%Y-%m-%d"), "numbers": found}
        arguments.results.write_text(json.dumps(results, indent=1, sort_keys=True) + "\n")
    return 0


Start = Callable[[Path, Sequence[str], str], None]
"""Start a run: (folder for logs, arguments of engine.train, name of the logs). Its logs are NAME-node-a and NAME-node-b."""


def rehearse(start: Start, folder: Path) -> dict[str, object]:
    """One run that is cut, and the one that continues it."""
    run = folder / "run"
    start(folder, [*TRAINING, f"world.path={folder / 'world'}", f"output={run}", "max_iterations=100000"], "first")
    wait(lambda: iteration(run) >= 2 * EVERY + 2, 300, folder)
    ip("-n", "node-b", "link", "set", "eth0", "down")
    cut, reached = time.monotonic(), iteration(run)
    reports = {}
    for rank, node in enumerate(NODES):
        if rank == 0 or not (folder / f"first-{node}").is_symlink():  # a node that is cut off reaches no pdsh
            wait(partial(said, folder, "first", node, rank), 120, folder)
            reports[node] = (round(time.monotonic() - cut, 1), said(folder, "first", node, rank))
    wait(lambda: not processes("node-a"), 120, folder)
    ended = time.monotonic() - cut
    wait(lambda: not processes("node-b"), 120, folder)
    ended_b = time.monotonic() - cut
    path, refused = newest_valid(run / "checkpoints")
    lost = reached - int(path.name.split("-")[1])
    ip("-n", "node-b", "link", "set", "eth0", "up")
    _launchers.clear()
    start(folder, ["--resume", str(run), "logging.console=plain"], "second")
    wait(lambda: iteration(run) > reached, 300, folder)
    continued = f"continuing from {path}" in log(folder, "second", "node-a").read_text()
    for launcher in _launchers:
        os.killpg(launcher, signal.SIGTERM)
    wait(lambda: not any(processes(node) for node in NODES), 60, folder)
    return {
        "ranks.timeout_s": TIMEOUT_S, "save_every_iterations": EVERY, "iteration_when_cut": reached,
        "seconds_to_report": {node: seconds for node, (seconds, _) in reports.items()},
        "report": {node: text for node, (_, text) in reports.items()},
        "seconds_until_no_process": {"node-a": round(ended, 1), "node-b": round(ended_b, 1)},
        "checkpoints_refused": len(refused), "iterations_lost": lost, "restart_continued_from_it": continued,
        "sigterm_to_the_launchers_saved": read_rows(run / "events.jsonl")[-1].get("reason") == "signal",
    }  # fmt: skip


def by_hand(command: Callable[[int], list[str]]) -> Start:
    """A launcher on each node, started there."""

    def start(folder: Path, arguments: Sequence[str], name: str) -> None:
        for rank, node in enumerate(NODES):
            spawn(node, [*command(rank), *arguments], log(folder, name, node))

    return start


def torchrun(rank: int) -> list[str]:
    where = ["--master_addr", NODES["node-a"], "--master_port", str(PORT)]
    run = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc_per_node", "1"]
    return [*run, "--node_rank", str(rank), *where, "-m", "engine.train"]


def deepspeed(folder: Path, *more: str) -> list[str]:
    hosts = folder / "hostfile"
    hosts.write_text("".join(f"{node} slots=1\n" for node in NODES))
    where = ["--master_addr", NODES["node-a"], "--master_port", str(PORT)]
    return [
        sys.executable,
        "-m",
        "deepspeed.launcher.runner",
        "--hostfile",
        str(hosts),
        *where,
        *more,
        "--module",
        "engine.train",
    ]


def without_ssh(folder: Path, arguments: Sequence[str], name: str) -> None:
    for rank, node in enumerate(NODES):
        spawn(node, [*deepspeed(folder, "--no_ssh", "--node_rank", str(rank)), *arguments], log(folder, name, node))


def by_pdsh(folder: Path, arguments: Sequence[str], name: str) -> None:
    """From node-a alone; a server on each node, with keys made for the occasion."""
    ssh = folder / "ssh"
    if not ssh.exists():
        make_keys(ssh)
        for node in NODES:
            spawn(
                node, ["/usr/sbin/sshd", "-D", "-e", "-f", str(ssh / "server")], folder / f"sshd-{node}", service=True
            )
        time.sleep(1)
    (folder / "deepspeed_env").write_text("DS_ACCELERATOR=cpu\nOMP_NUM_THREADS=1\n")
    environment = {"PATH": f"{ssh}:{os.environ['PATH']}", "DS_ENV_FILE": str(folder / "deepspeed_env")}
    path = log(folder, name, "node-a")
    spawn("node-a", [*deepspeed(folder), *arguments], path, environment)
    (folder / f"{name}-node-b").symlink_to(path)  # pdsh brings all output to node-a


WAYS: dict[str, Start] = {"pdsh": by_pdsh, "no-ssh": without_ssh, "torchrun": by_hand(torchrun)}


def make_keys(folder: Path) -> None:
    """Keys, and settings of server and client; `folder/ssh` is a client that uses them."""
    folder.mkdir()
    for name in ("host", "user"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / name)], check=True)
    names = ",".join([*NODES, *NODES.values()])
    (folder / "known").write_text(f"{names} {(folder / 'host.pub').read_text()}")
    (folder / "server").write_text(
        f"HostKey {folder}/host\nAuthorizedKeysFile {folder}/user.pub\nStrictModes no\nUsePAM no\nPidFile none\n"
    )
    (folder / "client").write_text(
        f"IdentityFile {folder}/user\nUserKnownHostsFile {folder}/known\nServerAliveInterval 10\nServerAliveCountMax 3\n"
    )
    (folder / "ssh").write_text(f'#!/bin/sh\nexec /usr/bin/ssh -F {folder}/client "$@"\n')
    (folder / "ssh").chmod(0o755)
    Path("/run/sshd").mkdir(exist_ok=True)


@contextmanager
def nodes() -> Iterator[None]:
    """The namespaces, their addresses and names; gone at the end, with every process in them."""
    try:
        ip("netns", "add", SWITCH)
        ip("-n", SWITCH, "link", "add", "bridge", "type", "bridge")
        ip("-n", SWITCH, "link", "set", "bridge", "up")
        hosts = "127.0.0.1 localhost\n" + "".join(f"{address} {node}\n" for node, address in NODES.items())
        for node, address in NODES.items():
            ip("netns", "add", node)
            ip("link", "add", "eth0", "netns", node, "type", "veth", "peer", "name", f"to-{node}", "netns", SWITCH)
            ip("-n", SWITCH, "link", "set", f"to-{node}", "master", "bridge", "up")
            ip("-n", node, "addr", "add", f"{address}/24", "dev", "eth0")
            for device in ("lo", "eth0"):
                ip("-n", node, "link", "set", device, "up")
            etc = Path("/etc/netns") / node
            etc.mkdir(parents=True)
            (etc / "hosts").write_text(hosts)
        yield
    finally:
        for node in (*NODES, SWITCH):
            for process in processes(node, services=True):
                with suppress(ProcessLookupError):
                    os.kill(process, signal.SIGKILL)
            subprocess.run(["ip", "netns", "delete", node], check=False, capture_output=True)
            shutil.rmtree(Path("/etc/netns") / node, ignore_errors=True)


_services: set[int] = set()
_launchers: list[int] = []


def spawn(
    node: str, command: list[str], path: Path, environment: dict[str, str] | None = None, service: bool = False
) -> None:
    """Start a process on a node, its output into a file."""
    inside = ["ip", "netns", "exec", node, "unshare", "--uts", "sh", "-c", 'hostname "$0"; exec "$@"', node, *command]
    given = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "DS_ACCELERATOR": "cpu",
        "PYTHONWARNINGS": "ignore",
        **(environment or {}),
    }
    with path.open("wb") as output:
        process = subprocess.Popen(
            inside, cwd=ROOT, env=given, stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True
        )
    if service:
        _services.add(process.pid)
    else:
        _launchers.append(process.pid)


def processes(node: str, services: bool = False) -> list[int]:
    """Of a node, those of its sshd left out if not wanted."""
    done = subprocess.run(["ip", "netns", "pids", node], capture_output=True, text=True, check=False)
    for found in list(_services):
        with suppress(ChildProcessError):
            os.waitpid(found, os.WNOHANG)
    ours = [int(pid) for pid in done.stdout.split() if _state(int(pid)) not in ("Z", "")]
    return ours if services else [pid for pid in ours if not _name(pid).startswith("sshd")]


def _state(pid: int) -> str:
    with suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    return ""


def _name(pid: int) -> str:
    with suppress(OSError):
        return Path(f"/proc/{pid}/comm").read_text().strip()
    return ""


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True)


def log(folder: Path, name: str, node: str) -> Path:
    """Where a node's output goes; with pdsh that of both is one file."""
    return (folder / f"{name}-{node}").resolve()


def said(folder: Path, name: str, node: str, rank: int) -> str:
    """The first complaint of a rank about another; empty: none yet."""
    complaint = rf"error: rank {rank}: .*(no sign of life|does not answer|lost contact).*"
    found = re.search(complaint, log(folder, name, node).read_text())
    return found[0][:300] if found else ""


def iteration(run: Path) -> int:
    with suppress(BadInput):
        return max((row["iteration"] for row in read_rows(run / "metrics.jsonl")), default=0)
    return 0


def wait(there: Callable[[], object], limit_s: float, folder: Path) -> None:
    until = time.monotonic() + limit_s
    while not there():
        if time.monotonic() > until:
            for path in sorted(folder.glob("*-node-*")):
                print(f"== {path.name}\n{path.read_text()[-3000:]}", file=sys.stderr)
            raise TimeoutError(f"not within {limit_s} s")
        time.sleep(0.2)


if __name__ == "__main__":
    sys.exit(main())
