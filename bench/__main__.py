"""`python -m bench`: what `make bench` runs, the steps of the embedded world's run."""

from __future__ import annotations

import sys

from bench.iterations import main

if __name__ == "__main__":
    sys.exit(main(["--config", "configs/runs/world.yaml", *sys.argv[1:]]))
