"""One check at start: top-level folders are import names here, and one of them is taken on PyPI."""

from __future__ import annotations

from pathlib import Path

import kernels
from pipelines.errors import BadInput


def check_imports() -> None:
    """`kernels` must be this checkout's folder, not the PyPI package of that name. Raises BadInput."""
    here = Path(__file__).resolve().parent.parent / "kernels"
    found = Path(str(kernels.__file__)).resolve().parent
    if found != here:
        raise BadInput(found, f"the name `kernels` leads there instead of {here}", "use a virtual environment of its own "
                       "without the PyPI package `kernels`, and run from the checkout")  # fmt: skip
