"""What `bench.gate` counts, by group. Every number is a function of the code alone, and more of it is worse."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import tracemalloc
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from bench import aot, buckets, plan_batches
from bench.counters import counting
from bench.gate import OF_OP
from bench.lengths import load as load_lengths
from bench.ours import Ours
from bench.pipeline_images import images, key_of
from bench.pipeline_readers import OurReader, write
from bench.plan_model import Model
from bench.provider import Setting
from engine.config import RunConfig, load
from engine.model.published import PUBLISHED_HEADS
from engine.tasks import CONFIGS, load_table
from pipelines.errors import BadInput

RESULTS = Path(__file__).parent / "results"
RECORD = RESULTS / "aot.json"
_BATCH = 4
_IMAGES, _REGIONS, _WIDTH = 16, 100, 2048


def run() -> RunConfig:
    """The published run with a small model, whose steps make the same calls."""
    longest = max(row.max_tokens for row in load_table().default_tasks())
    small = ["model=tiny", f"model.max_position_embeddings={longest}", "precision=bfloat16", "device=cpu", "threads=1"]
    return load(CONFIGS / "runs/twelve_in_one.yaml", small)


def steps(tasks: Sequence[str] = ()) -> dict[str, Any]:
    """Of a training step of each task (or of these): launches by op, copies, allocations, syncs, rows."""
    ours = Ours(Setting(run(), _BATCH, torch.device("cpu")))
    found = {}
    for row in load_table().default_tasks():
        if tasks and row.name not in tasks:
            continue
        rows = ours.prepare(row, 0)
        ours.step()
        counts = ours.count()
        found[row.name] = {
            "launches": counts["launches"], "native calls": counts["native_calls"], "copies": counts["copies"],
            "copied bytes": counts["copied_bytes"], "allocations": counts["allocations"],
            "syncs": sum(counts["syncs"].values()), "rows": rows.rows, "padded rows": rows.rows - rows.real,
            OF_OP: counts["ops"],
        }  # fmt: skip
    return found


def products() -> dict[str, Any]:
    """Of a step of the full model at batch 4, counted without memory: FLOPs, bytes and what backward keeps."""
    config = load(CONFIGS / "runs/twelve_in_one.yaml", ["precision=bfloat16"])
    model, lengths = Model(config.model, PUBLISHED_HEADS, torch.bfloat16), load_lengths()
    found = {}
    for row in load_table().default_tasks():
        batch = plan_batches.shapes(config, row, lengths[row.name], _BATCH, 0)
        counted = model.count(batch, row.head, config.share_prefixes)
        found[row.name] = {
            "flops": counted.flops, "products": counted.calls["products"], "launches": counted.launches,
            "bytes of products": sum(product.bytes for product in counted.products), "bytes": counted.bytes,
            "activations": counted.activations, "batch bytes": counted.batch_bytes,
        }  # fmt: skip
    return found


def padding() -> dict[str, Any]:
    """Rows that CUDA graphs' shape buckets add, in millionths of all rows."""
    found = buckets.simulate(25)
    return {
        name: {"padded rows, millionths": round(1e6 * of["padded_row_share"]["mean"])}
        for name, of in found.items() if name in load_table().tasks
    }  # fmt: skip


def batches() -> dict[str, Any]:
    """Of a batch of images of full size from a store: what Python and numpy allocate for it at most, its rows, its calls."""
    with tempfile.TemporaryDirectory() as folder:
        store = Path(folder) / "store"
        write(store, images(_IMAGES, _REGIONS, _WIDTH), _WIDTH, "bfloat16")
        reader, keys = OurReader(store), [key_of(number) for number in range(_IMAGES)]
        reader.batch(keys)
        with counting() as counts:
            batch = reader.batch(keys)
        tracemalloc.start()
        reader.batch(keys)
        allocated = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        bytes_ = sum(x.numel() * x.element_size() for x in batch.tensors())
        return {
            "of 16 images": {
                "allocated KiB": -(-allocated // 2**16) * 64, "bytes": bytes_, "copies": counts.as_json()["copies"],
                "copied bytes": counts.copied_bytes, "rows": batch.pair_text_rows + batch.pair_image_rows,
                OF_OP: dict(counts.ops),
            }
        }  # fmt: skip


def ranks() -> dict[str, Any]:
    """Of a step of two CPU ranks under DeepSpeed, at each ZeRO stage: hooks, collectives and their bytes, reads."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "hooks.json"
        command = [sys.executable, "-m", "bench.hooks", "--steps", "1", "--layouts", "flat", "--json", str(out)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise BadInput("bench.hooks", f"ended with {done.returncode}", f"{' '.join(command)} says why")
        found = json.loads(out.read_text())["stages"]
    counters = ("hooks_fired", "tensors", "collectives", "bytes", "reads_by_us", "reads_by_deepspeed")
    return {f"ZeRO-{stage}": {name: of["flat"][name] for name in counters} for stage, of in found.items()}


def kernels() -> dict[str, Any]:
    """Of the compiled GPU kernels, as `bench/results/aot.json` has them: compiling all of them takes minutes.

    Raises BadInput where the record is of other sources than those here.
    """
    record = json.loads(RECORD.read_text())
    if record.get("sources") != aot.sources():
        raise BadInput(RECORD, "it is of other kernels than those here",
                       f"python -m bench.kernels --aot sm_80,sm_90 --json {RECORD.relative_to(RECORD.parents[2])}")  # fmt: skip
    found: dict[str, Any] = defaultdict(lambda: defaultdict(int))
    for one in record["variants"]:
        of = found[f"{one['op']}, {one['arch']}"]
        for name in ("registers", "shared", "stack"):
            of[name] = max(of[name], one[name])
        of["spills"] += one["spill_loads"] + one["spill_stores"]
        of["without tensor cores"] += "tensor" in " ".join(one["faults"])
    for case in record["traffic"]:
        of = found[f"{case['op']}, {case['shape']}"]
        for part in ("forward", "backward"):
            of |= {f"{part} {name}": case[part][name] for name in ("launches", "issued", "distinct", "atomics")}
    return found


GROUPS: Mapping[str, Callable[[], Mapping[str, Any]]] = {
    "steps": steps,
    "products": products,
    "buckets": padding,
    "batches": batches,
    "ranks": ranks,
    "kernels": kernels,
}
