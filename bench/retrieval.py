"""`python -m bench.retrieval`: every caption with every image of a test pool, against the loops over pairs.

    ours      engine.evaluation.pairs: texts and images before the first bridge once each, packed
    padded    one caption with a block of images a call, padded, one head, in the same dtype: the plain loop
    authors   the published evaluation: float32, padded, all heads, texts shared within a call of 500 images (`fast_mode`)

All three have the same weights (new ones) and run in turns in one process. Texts have the real lengths of COCO's captions,
images 100 regions. The whole pool is far too large for the loops, so every way runs pieces of it, other captions at every
turn, and

    time of all = captions x time of a caption's own part + images x time of an image's own part + pairs x time of a pair

with medians over the turns; the loops have pairs alone. Padding the images and reading them from disk is on nobody's clock.
--whole runs ours over all pairs, by the clock. Beside the clocks: rows that went through layers and bytes of features that were
embedded, counted. And the order: each way ranks the images of a part of the pool for each caption. Where ours differs from the
authors' in the order of two images, their float32 scores should lie within twice the largest error of the padded loop in the
same dtype (in float32, of 16 roundings); what lies further apart is counted as `beyond`.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.peers.model import PaddedModel
from bench.peers.retrieval import AuthorsLoop, PairwiseLoop
from bench.retrieval_pool import Pool
from bench.retrieval_ways import Loop, Ours, Piece, Way, counted, models
from bench.timing import Spread, conditions, interleaved
from engine.model.config import ModelConfig
from engine.model.vilbert import ViLBERT
from engine.overrides import model_preset
from engine.tasks import load_table
from kernels import heap
from pipelines.errors import BadInput
from pipelines.files import write_atomic
from pipelines.progress import Show, progress_on_stderr

TASK = "coco_retrieval"
RESULTS = Path("bench/results/retrieval.json")
CPU = torch.device("cpu")
_ROUNDINGS = 16
"""What float32 itself may err by, in roundings of the largest score: in it the padded loop and the authors' run the same
products, and do not differ at all."""

SLICES: dict[str, dict[str, int]] = {
    "tiny": {"captions": 5, "block": 40, "call": 500, "ranked_captions": 10, "ranked_images": 500},
    "vilbert_6l_6c": {"captions": 1, "block": 40, "call": 40, "ranked_captions": 4, "ranked_images": 40},
}
"""What a turn does: captions, images of ours' and the padded loop's call, images of the authors' (a call of 500 takes the full
model minutes on a CPU); and the part whose images are ranked."""


def main(argv: list[str] | None = None) -> int:
    """Command line; returns the exit code."""
    arguments = _parser().parse_args(argv)
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    heap.keep()
    try:
        with progress_on_stderr() as show:
            for name in arguments.model.split(","):
                result = measure(name, arguments, show)
                _keep(arguments.json, f"{name} {arguments.precision}", result)
                print(table(name, result), flush=True)
    except BadInput as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bench.retrieval", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="tiny,vilbert_6l_6c", help="presets, comma-separated (default: %(default)s)")
    parser.add_argument("--precision", choices=("bfloat16", "float32"), default="bfloat16", help="default: %(default)s")
    parser.add_argument("--captions", type=int, default=5000, help="of the whole pool (default: %(default)s)")
    parser.add_argument("--images", type=int, default=1000, help="of the whole pool (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=120, help="of each model's turns (default: %(default)s)")
    parser.add_argument("--threads", type=int, help="of torch (default: its own choice)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--whole", action="store_true", help="ours over all pairs as well: half an hour with tiny")
    parser.add_argument("--json", type=Path, default=RESULTS, help="default: %(default)s")
    return parser


def measure(name: str, arguments: argparse.Namespace, show: Show) -> dict[str, Any]:
    """One model: clocks, what they add up to, counters, order."""
    if name not in SLICES:
        raise BadInput(f"--model {name}", "no slice of the pool is known for it", f"one of {', '.join(SLICES)}")
    config = ModelConfig(**model_preset(name, "--model")[1])
    part, dtype = SLICES[name], getattr(torch, arguments.precision)
    size = {"captions": arguments.captions, "images": arguments.images}
    size["pairs"] = size["captions"] * size["images"]
    held = size["images"] if arguments.whole else max(part["call"], part["ranked_images"])
    pool = Pool.drawn(load_table().row(TASK), config, size["captions"], min(held, size["images"]), arguments.seed)
    model, padded, exact = models(config, dtype, arguments.seed)
    ours = Ours(model, pool, dtype, part["captions"], part["block"])
    ways: dict[str, tuple[Way, ViLBERT | PaddedModel]] = {
        "ours": (ours, model),
        "padded": (Loop(PairwiseLoop(padded), pool, dtype, part["captions"], part["block"]), padded),
        "authors": (Loop(AuthorsLoop(exact), pool, torch.float32, 1, part["call"]), exact),
    }
    pieces = {(way, what): piece for way, (w, _) in ways.items() for what, piece in w.pieces().items()}
    spreads = _timed(pieces, arguments.seconds)
    result: dict[str, Any] = {
        "conditions": conditions(CPU), "precision": arguments.precision, "pool": size, "slice": part,
        "mean_text_rows": sum(len(text) + 1 for text in pool.texts) / len(pool.texts),
        "seconds_of_a_unit": {f"{way} {what}": _unit(spreads[way, what], piece) for (way, what), piece in pieces.items()},
        "seconds_of_all": {way: _of_all(way, pieces, spreads, size) for way in ways},
        "counted": {way: _counted(way, pieces, m, size) for way, (_, m) in ways.items()},
        "order": _order(*(w.scores(part["ranked_captions"], part["ranked_images"]) for w, _ in ways.values())),
    }  # fmt: skip
    if arguments.whole:
        result["whole_seconds"] = _whole(ours, size, show)
    return result


def _timed(pieces: Mapping[tuple[str, str], Piece], seconds: float) -> dict[tuple[str, str], Spread]:
    turns = dict.fromkeys(pieces, 0)

    def prepare(key: tuple[str, str]) -> Any:
        turns[key] += 1
        return partial(pieces[key].run, turns[key])

    return interleaved({key: partial(prepare, key) for key in pieces}, CPU, seconds)


def _unit(spread: Spread, piece: Piece) -> dict[str, float]:
    times = {"median": spread.median, "low": spread.low, "high": spread.high, "least": spread.least}
    return {**{name: value / piece.units for name, value in times.items()}, "turns": spread.calls}


def _of_all(
    way: str,
    pieces: Mapping[tuple[str, str], Piece],
    spreads: Mapping[tuple[str, str], Spread],
    size: Mapping[str, int],
) -> float:
    own = {key: piece for key, piece in pieces.items() if key[0] == way}
    return sum(spreads[key].median / piece.units * size[piece.of] for key, piece in own.items())


def _counted(
    way: str, pieces: Mapping[tuple[str, str], Piece], model: ViLBERT | PaddedModel, size: Mapping[str, int]
) -> dict[str, float]:
    """Rows and bytes of the whole pool: those of one turn of each piece, times how many turns there are."""
    rows = feature_bytes = 0.0
    for (of, _), piece in pieces.items():
        if of == way:
            with counted(model) as found:
                piece.run(0)
            rows += found.rows / piece.units * size[piece.of]
            feature_bytes += found.feature_bytes / piece.units * size[piece.of]
    return {"rows_through_layers": rows, "feature_bytes": feature_bytes}


def _order(ours: Tensor, padded: Tensor, exact: Tensor) -> dict[str, Any]:
    """Ranks of every image for every caption, ours against float32; `beyond`: see the module."""
    error = float((padded - exact).abs().max())
    allowed = 2 * max(error, _ROUNDINGS * torch.finfo(exact.dtype).eps * float(exact.abs().max()))
    ranks = [(-x).argsort(dim=1, stable=True).argsort(1) for x in (ours, padded, exact)]
    gaps = exact[:, :, None] - exact[:, None, :]
    turned = (ours[:, :, None] - ours[:, None, :]) * gaps < 0
    return {
        "images_ranked": ours.numel(), "spread_of_scores": float(exact.std(1).mean()),
        "largest_error": {"ours": float((ours - exact).abs().max()), "padded": error},
        "ranks_that_differ": {"ours": int((ranks[0] != ranks[2]).sum()), "padded": int((ranks[1] != ranks[2]).sum())},
        "pairs_of_images": len(gaps) * gaps.shape[1] * (gaps.shape[1] - 1) // 2, "turned": int(turned.sum()) // 2,
        "beyond": int((turned & (gaps.abs() > allowed)).sum()) // 2,
    }  # fmt: skip


def _whole(way: Ours, size: Mapping[str, int], show: Show) -> float:
    """Seconds of ours over all pairs."""
    started = time.perf_counter()
    texts = way.texts(range(size["captions"]))
    for start in range(0, size["images"], way.block):
        block = way.images(start, min(start + way.block, size["images"]))
        for done, text in enumerate(texts, 1):
            way.pairs.scores(text, block)
            show("pairs", start * len(texts) + done * block.rows.n, size["pairs"])
    return time.perf_counter() - started


def _keep(path: Path, name: str, result: dict[str, Any]) -> None:
    """Beside the results of other models and precisions."""
    known = json.loads(path.read_text()) if path.exists() else {}
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, (json.dumps({**known, name: result}, indent=1) + "\n").encode())


def table(name: str, result: Mapping[str, Any]) -> str:
    """For people."""
    seconds, size = result["seconds_of_all"], result["pool"]
    lines = [f"{name}, {result['precision']}, {size['captions']:,} captions x {size['images']:,} images"]
    lines.append(f"{'':10}{'all pairs':>12}{'ms a pair':>11}{'ours is':>9}{'rows':>10}{'features':>12}")
    for way, of_all in seconds.items():
        unit, found = result["seconds_of_a_unit"][f"{way} pairs"]["median"], result["counted"][way]
        lines.append(
            f"{way:10}{of_all / 3600:10.2f} h{1000 * unit:11.3f}{of_all / seconds['ours']:7.1f} x"
            f"{found['rows_through_layers'] / 1e9:8.2f} G{found['feature_bytes'] / 1e9:9.2f} GB"
        )
    if "whole_seconds" in result:
        lines.append(f"ours by the clock: {result['whole_seconds'] / 3600:.2f} h")
    order = result["order"]
    lines.append(
        f"order: {order['turned']:,} of {order['pairs_of_images']:,} pairs of images turned, {order['beyond']} beyond the "
        f"dtype's error; ranks that differ from float32: ours {order['ranks_that_differ']['ours']:,}, padded "
        f"{order['ranks_that_differ']['padded']:,} of {order['images_ranked']:,}; largest error: ours "
        f"{order['largest_error']['ours']:.2g}, padded {order['largest_error']['padded']:.2g}"
    )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
