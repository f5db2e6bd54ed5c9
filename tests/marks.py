"""Marks for parameters of tests."""

from __future__ import annotations

import pytest
from _pytest.mark import ParameterSet


def slow(*values: object, id: str | None = None) -> ParameterSet:
    """Values of a family that `make test` and `make test-system` cover by others: `make test-exhaustive` has all."""
    return pytest.param(*values, marks=[pytest.mark.slow, pytest.mark.exhaustive], id=id)


def long(*values: object) -> ParameterSet:
    """Values that take too long for `make test-fast`."""
    return pytest.param(*values, marks=pytest.mark.long)
