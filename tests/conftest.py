"""What holds for every test."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from hypothesis import settings

# No test has a deadline: a busy machine is no failure. By default the examples of a property are a function of its
# source, and none is read from an earlier run: the same commit gives the same result on every machine.
settings.register_profile("repeatable", deadline=None, derandomize=True, database=None)
# `make test-slow` draws other examples in every run and prints what reproduces a failure.
settings.register_profile("explore", deadline=None, derandomize=False, database=None, print_blob=True)
# pytest's option --hypothesis-profile comes after this.
settings.load_profile("repeatable")

_RAY_FIXTURE = "ray_cluster"


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Assigns tests to processes for ``--dist loadgroup``: a file stays in one process, which builds its fixtures once.

    All tests of the shared Ray cluster run in one process too, so that one cluster is started.
    """
    for item in items:
        uses_ray = _RAY_FIXTURE in getattr(item, "fixturenames", ())
        item.add_marker(pytest.mark.xdist_group(_RAY_FIXTURE if uses_ray else item.location[0]))


@pytest.fixture(scope="session", autouse=True)
def _no_files_of_earlier_sessions(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Trainings keep files in the temporary folder; those of other sessions may have been made by other code."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pipeline.student.node_store.TEMPORARY", tmp_path_factory.mktemp("node"))
        yield
