"""The engine: model, tasks, stop-and-go, loop, checkpoints, reports."""

import os

# Before torch is loaded. OpenMP threads that wait spin; on cores that something else wants too, they spin away the time
# of the thread that they wait for, and a step takes fifty times as long. A short spin costs a tenth on idle cores and
# keeps a busy machine usable (bench/LOG.md). The environment's own setting wins.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")
