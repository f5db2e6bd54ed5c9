"""Assertions on errors by their code and fields."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager

import pytest

from pipeline.core.errors import StillroomError


@contextmanager
def raises(
    code: str, kind: type[StillroomError] = StillroomError, **fields: object
) -> Generator[pytest.ExceptionInfo[StillroomError]]:
    """Passes if the code inside raises an error of this kind with this code and these fields, such as ``got``."""
    with pytest.raises(kind) as caught:
        yield caught
    assert caught.value.code == code
    assert {name: getattr(caught.value, name) for name in fields} == fields
