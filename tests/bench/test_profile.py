"""The profile: its spans, against made-up clocks; its counts, by hand; its account of real steps; its traces and refusals."""

from __future__ import annotations

import gzip
import json
import time
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.text import Text
from torch._C._autograd import DeviceType

from bench import iterations, profile
from bench.gemms import GemmRecorder
from bench.profile_account import Line, alike, count, look_into, phases, run, shares
from bench.profile_against import Earlier, compare
from bench.profile_count import Counting
from bench.profile_plot import draw
from bench.profile_report import Report
from bench.profile_roofs import Roofs
from bench.profile_spans import Place, Spans
from bench.profile_subject import Subject, Visit, synthetic
from bench.profile_trace import kernel_seconds
from bench.profile_watch import watching
from bench.provider import Setting
from engine.model import transformer_layer
from engine.tasks import load_table
from kernels import adamw, attention, bias_dropout_residual_layernorm, native_library, projection
from kernels.rows import Rows
from pipelines.errors import BadInput

TINY = ["--model", "tiny", "--threads", "1", "--batch", "4"]


def tiny(*tasks: str) -> Subject:
    arguments = iterations._parser().parse_args(["--model", "tiny", "--threads", "1"])
    rows = [load_table().row(name) for name in tasks]
    return synthetic(Setting(iterations.run_of(arguments), 4, torch.device("cpu")), rows, lambda line: None)


@pytest.fixture(scope="module")
def subject() -> Subject:
    return tiny("vqa", "refcoco")


def visit(subject: Subject, lane: str = "profiled", task: int = 0) -> Visit:
    return Visit(subject.rows[task], 0, lane)


# Spans


class Ticks:
    """A clock that is one second later at every look."""

    def __init__(self) -> None:
        self.now = 0.0

    def mark(self) -> float:
        self.now += 1
        return self.now

    @staticmethod
    def seconds(began: float, ended: float) -> float:
        return ended - began


def test_spans_by_hand() -> None:
    """Marks: backward 1, text 2, op 3, kernel 4 to 5, op ends 6, text 7; reduce 8, all_reduce 9 to 10, reduce 11; 12."""
    spans = Spans(Ticks())
    kernel = spans.timed("kernel", "gemm", lambda: None)
    op, reduce = spans.timed("op", "projection", kernel), spans.collective("all_reduce", lambda: None)
    with spans.range("backward"):
        with spans.range("text 3"):
            op()
        reduce()
    spent = spans.spent()
    assert {place: one.seconds for place, one in spent.items()} == {
        Place("backward", "", ""): 11 - 5 - 3, Place("backward", "text 3", ""): 5 - 3,
        Place("backward", "text 3", "projection"): 3, Place("reduce", "", ""): 3 - 1, Place("reduce", "", "all_reduce"): 1,
    }  # fmt: skip
    assert spent[Place("backward", "text 3", "projection")].kernel_seconds == 1
    assert spent[Place("reduce", "", "all_reduce")].kernel_seconds == 1, "it calls nothing that is seen"
    assert sum(one.seconds for one in spent.values()) == 11


def test_a_span_ends_with_an_error() -> None:
    spans = Spans(Ticks())

    def fail() -> None:
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"), spans.range("forward"):
        spans.timed("op", "attention", fail)()
    assert set(spans.spent()) == {Place("forward", "", ""), Place("forward", "", "attention")}


# Counts


def counted(call: Any) -> Counting:
    counting = Counting()
    with watching(counting), counting:
        call()
    return counting


def work(counting: Counting, op: str) -> tuple[int, int]:
    found = counting.found[Place("", "", op)].cost
    return found.bytes, found.flops


@pytest.mark.parametrize("kernels", ["native", "torch"])
@pytest.mark.parametrize(("dtype", "size"), [(torch.float32, 4), (torch.bfloat16, 2)])
def test_work_of_three_ops_by_hand(dtype: torch.dtype, size: int, kernels: str) -> None:
    from kernels.backends import using

    if kernels == "native" and not native_library.available():
        pytest.skip(f"no native kernels: {native_library.reason()}")
    backend = {"attention": kernels, "bias_dropout_residual_layernorm": kernels, "projection": "torch"}
    with using(backend):
        # y [12, 32] = x [12, 64] Wt + b: 12 * 32 sums of 64 products.
        x, w, b = torch.randn(12, 64, dtype=dtype), torch.randn(32, 64, dtype=dtype), torch.randn(32, dtype=dtype)
        found = counted(lambda: projection.project(x, w, b))
        assert work(found, "projection") == (size * (12 * 64 + 32 * 64 + 32 + 12 * 32), 2 * 12 * 32 * 64)
        dy, dw = torch.randn(12, 32, dtype=dtype), torch.empty(32, 64, dtype=dtype)
        found = counted(lambda: projection.weight_gradient(dy, x, dw))
        assert work(found, "projection: weight gradient") == (size * (12 * 32 + 12 * 64 + 32 * 64), 2 * 12 * 32 * 64)

        # Items of 2 and 3 rows attend to 4 and 1: q and the context have 5 rows, k and v 5; 2 * 4 + 3 * 1 = 11 scores a head.
        q_rows, k_rows = rows(2, 3), rows(4, 1)
        q, k, v = (torch.randn(5, 32, dtype=dtype) for _ in range(3))

        def both() -> None:
            context, saved = attention.attention_forward(q, k, v, q_rows, k_rows, 2, None)
            attention.attention_backward(saved, context, *(torch.empty_like(x) for x in (q, k, v)))

        found = counted(both)
        assert work(found, "attention") == (4 * 5 * 32 * size, 2 * (2 * 11 * 32))
        # q k v dcontext in, dq dk dv out: 7 of 5 rows. Scores, dP, dV, dQ, dK: 5 products.
        assert work(found, "attention: gradient") == (7 * 5 * 32 * size, 5 * (2 * 11 * 32))

        # x, residual and y of 5 rows, and three vectors; backward x, residual, dy and two gradients.
        vectors, module = [torch.randn(32, dtype=dtype) for _ in range(3)], bias_dropout_residual_layernorm

        def norm() -> None:
            y, saved = module.bias_dropout_residual_layernorm_forward(
                q, vectors[0], k, vectors[1], vectors[2], q_rows, None
            )
            gradients = [torch.empty_like(x) for x in (q, k, *vectors)]
            module.bias_dropout_residual_layernorm_backward(saved, y, *gradients)

        found = counted(norm)
        name = "dropout + residual + LayerNorm"
        assert work(found, name) == (size * (3 * 5 * 32 + 3 * 32), 0)
        assert work(found, f"{name}: gradient") == (size * (5 * 5 * 32 + 5 * 32), 0)


def rows(*lengths: int) -> Rows:
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).int()
    return Rows(cu_seqlens, sum(lengths), max(lengths), torch.arange(len(lengths)))


def test_work_of_the_update_by_hand() -> None:
    """Read: gradient 2, master 4, moments 4 + 4. Written: the same but for the gradient, and weights 2: 28 bytes a value."""
    gradient, master = torch.randn(100).bfloat16(), torch.randn(100)
    state = (master, torch.zeros(100), torch.zeros(100), torch.zeros(100).bfloat16())
    options: dict[str, Any] = {"lr": 0.1, "betas": (0.9, 0.999), "eps": 1e-6, "weight_decay": 0.0}
    found = counted(lambda: adamw.adamw(gradient, *state, skipped=torch.zeros(()), **options))
    assert work(found, "AdamW") == (28 * 100, 0)


def test_products_of_a_step_are_those_that_run(subject: Subject) -> None:
    """All of them, wherever the profile has put them: those of torch between ops too."""
    found = count(subject, visit(subject, "counted"))
    with GemmRecorder() as recorder:
        subject.step(visit(subject, "plain"))
    attending = ("attention", "co-attention", "region embedding")  # native, and so no products of the recorder's
    products = sum(one.cost.flops for place, one in found.items() if not place.op.startswith(attending))
    assert products == sum(gemm.flops for gemm in recorder.gemms) > 0
    launches = sum(one.launches for one in found.values())
    assert launches > len(recorder.gemms)


# The account


def test_phases_add_up_and_nothing_stays(subject: Subject) -> None:
    """To the bit: what is in no place is between phases. Every phase of a step in one process is there."""
    watched = vars(transformer_layer)["project"], attention.attention_forward, projection.NATIVE["gelu_forward"]
    seconds, spent = look_into(subject, visit(subject))
    assert sum(one.seconds for one in spent.values()) == pytest.approx(seconds, rel=1e-9)
    assert [*dict.fromkeys(place.phase for place in spent)] == ["copy", "forward", "loss", "backward", "step", ""]
    blocks = {place.block for place in spent}
    assert {"text 0", "text 3", "image 1", "connection 1", "text embedding", "poolers", "vil_prediction"} <= blocks
    assert Place("backward", "text 1", "attention: gradient") in spent
    assert all(one.seconds > -1e-6 for one in spent.values())
    assert watched == (
        vars(transformer_layer)["project"],
        attention.attention_forward,
        projection.NATIVE["gelu_forward"],
    )


@pytest.fixture(scope="module")
def roofs() -> Roofs:
    return Roofs(torch.device("cpu"), torch.bfloat16, seconds=0.01)


@pytest.fixture(scope="module")
def report(subject: Subject, roofs: Roofs) -> Report:
    return Report.of(run(subject, 4, lambda *_: None)[0], roofs, subject.device, False, waits=False)


def test_report(report: Report) -> None:
    found = json.loads(json.dumps(report.as_json()))
    assert len(report.taken.rounds) == found["step"]["rounds"] == 4
    assert sum(found["phases"].values()) == pytest.approx(report.taken.profiled)
    assert sum(op["seconds"] for op in found["ops"]) == pytest.approx(report.taken.profiled)
    assert found["shares"]["data"] is None, "nothing waits for synthetic batches"
    rest = [share for share in found["shares"].values() if share is not None]
    assert sum(rest) == pytest.approx(1) and min(rest) >= 0
    assert found["verdict"] and report.about.launches
    text = report.text("vqa")
    assert "not measured" in text and "verdict: " in text and "text 3" in text
    for factor, said in ((1.0, False), (1.04, True), (0.96, True)):
        lines = [
            replace(one, seconds=factor * one.seconds * report.taken.plain / report.seconds) for one in report.lines
        ]
        assert ("! beyond 3%" in replace(report, lines=lines).text("vqa")) is said


def line(op: str, seconds: float, **changed: Any) -> Line:
    given: dict[str, Any] = {
        "phase": "forward", "block": "text 1", "op": op, "calls": 2, "launches": 2, "seconds": seconds, "low": 0.98 * seconds,
        "high": 1.02 * seconds, "kernel_seconds": 0.9 * seconds, "bytes": 100, "flops": 10, "bound": "GEMM", "ceiling": 0.0,
    }  # fmt: skip
    return Line(**{**given, **changed})


def test_alike_blocks_and_shares() -> None:
    found = [
        line("projection", 2.0), line("projection", 3.0, block="text 0"), line("", 0.5, kernel_seconds=0.0, bound=""),
        line("GELU", 1.0, block="image 1", bound="bandwidth"), line("", 1.0, phase="data", kernel_seconds=0.0),
        line("AdamW", 2.0, phase="step", block=""), line("", 0.5, phase="", block="", kernel_seconds=0.0),
    ]  # fmt: skip
    first = alike(found)[0]
    assert (first.key, first.seconds, first.calls) == ("forward / text / projection", 5.0, 4)
    assert phases(found) == {"forward": 6.5, "data": 1.0, "step": 2.0, "between phases": 0.5}
    of = shares(found, waits=True)
    assert (of.data, of.optimizer, of.reduce) == (0.1, 0.2, 0.0)
    assert of.gemm == pytest.approx(0.45) and of.bandwidth == pytest.approx(0.09)
    assert of.host == pytest.approx((0.5 + 0.5 + 0.1 * 6) / 10)


def test_a_gpus_kernels() -> None:
    """Its own events count, ranges over them and the host's do not. Microseconds."""

    def event(device: DeviceType, us: float, annotation: bool = False) -> Any:
        return SimpleNamespace(
            device_type=device, is_user_annotation=annotation, time_range=SimpleNamespace(elapsed_us=lambda: us)
        )

    events = [
        event(DeviceType.CUDA, 30),
        event(DeviceType.CUDA, 12),
        event(DeviceType.CUDA, 99, True),
        event(DeviceType.CPU, 7),
    ]
    assert kernel_seconds(events) == pytest.approx(42e-6)


# Against an earlier one


def test_a_planted_slowdown_is_named() -> None:
    """One op 5 % of the step slower, all of it on a machine that is 1.3 times as slow."""
    before = [line("projection", 6.0), line("attention", 1.0), line("GELU", 3.0)]
    now = [line(one.op, 1.3 * (one.seconds + (0.5 if one.op == "attention" else 0))) for one in before]
    found = compare(before, now)
    assert found.factor == pytest.approx(1.3)
    assert found.changes[0].key == "forward / text / attention"
    assert found.changes[0].excess == pytest.approx(1.3 * 0.5)
    assert found.named == "changed most: forward / text / attention, 650.00 ms more than the rest of the step explains"
    assert compare(before, before).named == "no op changed beyond the noise"
    slightly = [*before[:2], line("GELU", 3.0 + 0.05, low=3.04, high=3.06)]
    assert (
        compare([*before[:2], line("GELU", 3.0, low=2.99, high=3.01)], slightly).named
        == "no op changed by 1% of the step"
    )


def test_counters_and_ops_that_come_and_go() -> None:
    before, now = (
        [line("projection", 6.0), line("GELU", 1.0)],
        [line("projection", 6.0, launches=4), line("dropout", 2.0)],
    )
    changes = {one.key.rpartition("/")[2].strip(): one for one in compare(before, now).changes}
    assert changes["projection"].counters == ("launches 2 to 4",)
    assert changes["dropout"].counters == ("new",) and changes["GELU"].counters == ("gone",)


@pytest.mark.slow
def test_a_slower_op_of_real_steps_is_named(monkeypatch: pytest.MonkeyPatch, roofs: Roofs) -> None:
    """5 % of the step, spread over the calls of one op."""
    subject = tiny("vqa")

    def account() -> Report:
        return Report.of(run(subject, 40, lambda *_: None)[0], roofs, subject.device, False, waits=False)

    before = account()
    calls = sum(
        one.calls
        for one in before.lines
        if one.op == "dropout + residual + LayerNorm: gradient" and "text" in one.block
    )
    pause = 0.05 * before.taken.plain / calls
    inner = bias_dropout_residual_layernorm._BACKWARD["native"]

    def slower(saved: Any, dy: torch.Tensor, *rest: Any) -> None:
        inner(saved, dy, *rest)
        ends = time.perf_counter() + pause
        while time.perf_counter() < ends:
            pass

    monkeypatch.setitem(bias_dropout_residual_layernorm._BACKWARD, "native", slower)
    found = compare(before.lines, account().lines)
    assert "dropout + residual + LayerNorm: gradient" in found.changes[0].key, found.text("vqa")


# The command


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One run that writes everything."""
    folder = tmp_path_factory.mktemp("profile")
    code = profile.main(
        [*TINY, "--tasks", "vqa,refcoco", "--rounds", "2", "--json", str(folder / "out/p.json"),
         "--plot", str(folder / "out/p.png"), "--trace", str(folder / "trace"), "--trace-iterations", "2",
         "--memory", str(folder / "memory.json")]
    )  # fmt: skip
    assert code == 0
    return folder


def test_json_and_picture(files: Path) -> None:
    found = json.loads((files / "out/p.json").read_text())
    assert list(found["tasks"]) == ["vqa", "refcoco"]
    for key in (
        "device",
        "isa",
        "threads",
        "torch",
        "commit",
        "model",
        "batch",
        "precision",
        "load_average",
        "batches",
    ):
        assert key in found["conditions"], key
    assert found["ceilings"]["memory_bytes_per_s"] > 0 and found["ceilings"]["flops_per_s"]["bfloat16"] > 0
    assert (files / "out/p.png").read_bytes().startswith(b"\x89PNG")


def test_traces_are_chrome_traces(files: Path) -> None:
    """Complete events with names, times, process and thread; ranges one in the other; under 200 MB for 20 iterations."""
    path = files / "trace/rank0_trace.json.gz"
    content = gzip.decompress(path.read_bytes())
    events = json.loads(content)["traceEvents"]
    complete = [event for event in events if event["ph"] == "X"]
    assert complete and all({"name", "ts", "dur", "pid", "tid", "cat"} <= event.keys() for event in complete)
    spans = {event["name"]: (event["ts"], event["ts"] + event["dur"]) for event in complete}
    for outer, inner in [("iteration 2", "refcoco"), ("refcoco", "backward"), ("backward", "text embedding")]:
        assert spans[outer][0] <= spans[inner][0] and spans[inner][1] <= spans[outer][1], (outer, inner)
    assert {"iteration 1", "vqa", "copy", "forward", "loss", "step", "attention", "aten::mm"} & spans.keys() >= {
        "iteration 1",
        "attention",
    }
    assert len(content) / 2 * 20 < 200e6
    assert [file.name for file in path.parent.iterdir()] == [path.name], "nothing half written is left"


def test_memory_says_who_holds_it(files: Path) -> None:
    found = json.loads((files / "memory.json").read_text())["vqa"]
    assert sum(one["bytes"] for one in found["held_at_peak"]) == found["peak_bytes"] > 0
    assert any(one["block"] == "text 0" and one["phase"] == "forward" for one in found["held_at_peak"])


def test_against_the_same_code(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [*TINY, "--tasks", "refcoco", "--rounds", "2", "--against", str(files / "out/p.json")]
    assert profile.main(arguments) == 0
    text = capsys.readouterr().out
    assert "refcoco: " in text and "changed" in text
    assert " to " not in text.partition("against ")[2].replace("load", ""), "no counter differs"


@pytest.mark.parametrize(
    ("content", "what"),
    [
        ("", "no profile"),
        ('{"tasks": {"vqa": {"ops": [{"phase": "forward"}]}}, "conditions": {}}', "no profile"),
        ('{"tasks": [], "conditions": {}}', "no profile"),
        ('{"tasks": {}}', "conditions"),
        ('{"tasks": {"nlvr2": {"ops": []}}, "conditions": {}}', "has no task vqa"),
        (None, "No such file"),
    ],
)
def test_an_earlier_profile_that_cannot_be_used(
    content: str | None, what: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "p.json"
    if content is not None:
        path.write_text(content)
    assert profile.main([*TINY, "--rounds", "1", "--against", str(path)]) == 2
    error = capsys.readouterr().err
    assert "p.json" in error and what in error


def test_wrong_types_in_an_earlier_profile(files: Path, tmp_path: Path) -> None:
    found = json.loads((files / "out/p.json").read_text())
    found["tasks"]["vqa"]["ops"][0]["seconds"] = "long"
    (tmp_path / "p.json").write_text(json.dumps(found))
    with pytest.raises(BadInput, match="seconds is 'long'"):
        Earlier.read(tmp_path / "p.json")


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--tasks", "vqa,unknown"], "unknown"),
        (["--batch", "0"], "--batch"),
        (["--rounds", "0"], "--rounds"),
        (["--trace-iterations", "0"], "--trace-iterations"),
        (["--model", "huge"], "huge"),
        (["--config", "no.yaml"], "no.yaml"),
        (["--tasks", "conceptual_captions"], "lengths"),
    ],
)
def test_bad_input(arguments: list[str], named: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert profile.main(arguments) == 2
    assert named in capsys.readouterr().err


# The picture


def test_no_name_covers_another(report: Report, roofs: Roofs) -> None:
    """Nor do names leave the picture, or lie on a panel."""
    many = replace(
        report, lines=[*report.lines, *(replace(one, op=f"{one.op}, again") for one in report.lines if one.op)]
    )
    conditions = dict.fromkeys(("device", "isa", "threads", "model", "batch", "precision"), "some")
    figure = draw({"vqa": report, "again": many}, roofs, conditions)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    renderer, page = canvas.get_renderer(), figure.bbox
    for axes in figure.axes:
        names = [Text.get_window_extent(text, renderer) for text in axes.texts]  # without the line to its point
        assert len(names) > 5
        ordered = sorted(names, key=lambda box: -box.y1)
        for upper, lower in pairwise(ordered):
            assert lower.y1 <= upper.y0
        for box in names:
            assert page.x0 <= box.x0 and box.x1 <= page.x1
            assert not any(box.overlaps(other.get_window_extent(renderer)) for other in figure.axes)
