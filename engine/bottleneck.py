"""What holds a training step back, in words, with the knob to turn: rules over where its time goes.

Pure functions on plain data, for whoever has measured: `python -m bench.profile` an account of single steps, others what a
run's journal says. A step is taken apart into shares of its time. Each rule allows one of them what a well-fed step has; what
is beyond that could be saved, and the rule that could save most is the verdict.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

LEAST_GAIN = 0.05
"""Of a step's time: what could be saved is not worth a word below this."""


@dataclass(frozen=True)
class Shares:
    """Parts of a step's time, in [0, 1]; None: not measured, and no rule speaks of it. Over all, at most 1."""

    data: float | None = None
    """Waiting for the batch."""
    copy: float | None = None
    """Bringing it to the device."""
    host: float | None = None
    """The device has nothing to do: Python, autograd and launches between kernels, and small ops of torch's."""
    bandwidth: float | None = None
    """Kernels of forward, loss and backward that memory limits."""
    gemm: float | None = None
    """Kernels of forward, loss and backward that products limit."""
    reduce: float | None = None
    """Waiting for other ranks and for what they send."""
    optimizer: float | None = None
    """The update."""


@dataclass(frozen=True)
class About:
    """What else is known of the step."""

    device: str = "cpu"
    """`cpu` or `cuda`."""
    graphs: bool = False
    """Whether CUDA graphs replay it."""
    seconds: float | None = None
    """Of a step."""
    launches: int | None = None
    """Kernels of a step."""
    kernel_seconds: float | None = None
    """Of these kernels."""


@dataclass(frozen=True)
class Rule:
    """A kind of bottleneck."""

    name: str
    share: str
    """A field of `Shares`."""
    allowed: float
    """What a well-fed step has of it."""
    says: str
    """With {percent}, and {launches} for {work} of work where they are known."""
    mend: str
    device: str | None = None
    """Where the rule holds; None: everywhere."""
    graphs: bool | None = None
    """With CUDA graphs, or without; None: either."""


_LAUNCHED = "{launches}{work}the device waits {percent} of the step for the host"

RULES: tuple[Rule, ...] = (
    Rule(
        "data-bound", "data", 0.02, "{percent} of the step waits for its batch",
        "data_threads=2 or more; resident_features=true where the features fit; python -m bench.pipeline times reading alone",
    ),
    Rule(
        "copy-bound", "copy", 0.02, "{percent} of the step brings its batch to the device",
        "precision=bfloat16 halves the features; resident_features=true leaves them on the device",
    ),
    Rule(
        "host-bound", "host", 0.10, _LAUNCHED, "cuda_graphs=true replays forward and backward in one launch",
        device="cuda", graphs=False,
    ),
    Rule(
        "host-bound", "host", 0.10, _LAUNCHED,
        "larger batches (task_overrides.TASK.batch): only the update is outside of the graph",
        device="cuda", graphs=True,
    ),
    Rule(
        "host-bound", "host", 0.10, "{launches}{work}{percent} of the step lies between kernels (Python, autograd, small ops)",
        "larger batches (task_overrides.TASK.batch), so that each call does more; kernels: native where torch stands in",
        device="cpu",
    ),
    Rule(
        "bandwidth-bound", "bandwidth", 0.25, "kernels that memory limits take {percent} of the step",
        "precision=bfloat16; stopgo doctor says where torch stands in for a fused kernel; the op with the lowest share of its "
        "ceiling has most to give",
    ),
    Rule(
        "reduce-bound", "reduce", 0.10, "{percent} of the step waits for other ranks",
        "larger batches a rank; accumulation=N reduces once for N of them; deepspeed=zero1 sends least",
    ),
    Rule(
        "optimizer-bound", "optimizer", 0.15, "the update takes {percent} of the step, whatever the batch",
        "larger batches; task_overrides.TASK.accumulation=N updates once for N of them; over several ranks deepspeed=zero1 "
        "divides it",
    ),
)  # fmt: skip

GEMM_BOUND = Rule(
    "GEMM-bound", "gemm", 0.0, "products take {percent} of the step, and nothing else stands out",
    "precision=bfloat16 where it is float32; else fewer rows, or a faster device",
)  # fmt: skip
"""The verdict where no rule speaks: what a step should wait for."""


@dataclass(frozen=True)
class Finding:
    """What one rule says of a step."""

    name: str
    share: float
    gain: float
    """Share of the step that could be saved at most."""
    says: str
    mend: str

    def __str__(self) -> str:
        return f"{self.name}: {self.says}; {self.mend}"


def findings(shares: Shares, about: About, rules: Sequence[Rule] = RULES) -> list[Finding]:
    """What stands out, the largest gain first; of what was not measured, nothing."""
    found = [_finding(rule, shares, about) for rule in rules if _holds(rule, about)]
    return sorted((one for one in found if one and one.gain >= LEAST_GAIN), key=lambda one: -one.gain)


def verdict(shares: Shares, about: About) -> Finding | None:
    """What the step waits for most; None where nothing stands out of what was measured, and products were not."""
    return next(iter(findings(shares, about)), None) or _finding(GEMM_BOUND, shares, about)


def _holds(rule: Rule, about: About) -> bool:
    return rule.device in (None, about.device) and rule.graphs in (None, about.graphs)


def _finding(rule: Rule, shares: Shares, about: About) -> Finding | None:
    share = getattr(shares, rule.share)
    if share is None:
        return None
    says = rule.says.format(percent=f"{100 * share:.0f} %", **_counts(about))
    return Finding(rule.name, share, share - rule.allowed, says, rule.mend)


def _counts(about: About) -> dict[str, str]:
    """Of launches and their work, each empty where it is not known."""
    launches = "" if about.launches is None else f"{about.launches:,} launches"
    work = f" for {_duration(about.kernel_seconds)} of work" if launches and about.kernel_seconds is not None else ""
    return {"launches": launches, "work": f"{work}; " if launches else ""}


def _duration(seconds: float) -> str:
    return f"{seconds:,.2f} s" if seconds >= 1 else f"{1e3 * seconds:.3g} ms"
