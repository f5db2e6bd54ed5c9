"""Assertions on errors by their code."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager

import pytest

from pipeline.core.errors import StillroomError


@contextmanager
def raises(code: str, kind: type[StillroomError] = StillroomError) -> Generator[pytest.ExceptionInfo[StillroomError]]:
    """Passes if the code inside raises an error of this kind with this code."""
    with pytest.raises(kind) as caught:
        yield caught
    assert caught.value.code == code
