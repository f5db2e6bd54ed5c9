"""Marks for parameters of tests."""

from __future__ import annotations

import pytest
from _pytest.mark import ParameterSet


def slow(*values: object, id: str | None = None) -> ParameterSet:
    """Values that `make test-slow` alone runs."""
    return pytest.param(*values, marks=pytest.mark.slow, id=id)
