"""Settings that all tests share."""

from __future__ import annotations

import os

from hypothesis import settings

import engine  # noqa: F401 - its thread settings must be there before torch is

# Shared machines stall now and then: no deadline per example. CI draws the same examples every time.
settings.register_profile("stopgo", deadline=None, derandomize="CI" in os.environ)
settings.load_profile("stopgo")
