"""The embedded world: rendered scenes, their features, and annotations for all data sets in the published formats.

`build` and `ensure` make it and return its data sheet; `python -m pipelines.world DIR` does the same. See README.md.
"""

from pipelines.world.builder import build, ensure

__all__ = ["build", "ensure"]
