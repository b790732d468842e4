"""Editable installation of the checkout: `pip install -e . --no-deps --no-build-isolation` (`make setup` does it).

There is no wheel. One of the four packages is called `kernels`, as is a package on PyPI: an installed copy would
overwrite that one, and break other programs of the same environment.
"""

from __future__ import annotations

from setuptools import find_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.sdist import sdist

TOP_LEVEL = ("engine", "kernels", "pipelines", "bench")
REFUSAL = (
    "error: stopgo: no wheel or sdist is built, for its package `kernels` would overwrite PyPI's package of that name "
    "(install the checkout instead, in an environment of its own: pip install -e . --no-deps --no-build-isolation)"
)


class RefusedWheel(bdist_wheel):
    """Editable installs use this command for names and tags only; running it would build a wheel."""

    def run(self) -> None:
        raise SystemExit(REFUSAL)


class RefusedSdist(sdist):
    def run(self) -> None:
        raise SystemExit(REFUSAL)


setup(
    packages=find_packages(include=[f"{name}{rest}" for name in TOP_LEVEL for rest in ("", ".*")]),
    cmdclass={"bdist_wheel": RefusedWheel, "sdist": RefusedSdist},
)
