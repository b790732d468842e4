"""Measurements."""

import engine  # noqa: F401 - its thread settings must be there before torch is
