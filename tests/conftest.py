"""What holds for every test."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from hypothesis import settings

# No test is timed: a busy machine is no failure.
settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")


@pytest.fixture(scope="session", autouse=True)
def _no_files_of_earlier_sessions(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Trainings keep files in the temporary folder; those of other sessions may have been made by other code."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pipeline.student.node_store.TEMPORARY", tmp_path_factory.mktemp("node"))
        yield
