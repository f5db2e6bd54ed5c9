"""Fixtures and settings of all tests."""

from __future__ import annotations

import os
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings
from xdist.scheduler import LoadFileScheduling

# `make test` runs a process for each core, so each computes with one thread; before torch is imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Ray's workers would wait for a core until the other process of the tests leaves one idle.
os.environ.setdefault("RAY_worker_niceness", "0")

# No test has a deadline: a busy machine is no failure. By default the examples of a property are a function of its
# source, and none is read from an earlier run: the same commit gives the same result on every machine.
settings.register_profile("repeatable", deadline=None, derandomize=True, database=None)
# `make test-exhaustive` draws other examples in every run and prints what reproduces a failure.
settings.register_profile("explore", deadline=None, derandomize=False, database=None, print_blob=True)
# `make test-fast` tries fewer of the same examples.
settings.register_profile("quick", settings.get_profile("repeatable"), max_examples=20)
# pytest's option --hypothesis-profile comes after this.
settings.load_profile("repeatable")


class _ByFile(LoadFileScheduling):
    """A file's tests run in one process, which builds their fixtures once; so do all files of the shared Ray cluster,
    and all that fork ranks.

    The marker ``xdist_group`` is of no use: xdist 3.8 drops it without a warning under pytest 9.2.
    """

    def _split_scope(self, nodeid: str) -> str:
        file = super()._split_scope(nodeid)
        return _shared(self.config.rootpath / file) or file


@cache
def _shared(file: Path) -> str | None:
    """State that the tests of a file share with those of other files."""
    text = file.read_text()
    return next((name for name in ("ray_cluster", "tests.ranks") if name in text), None)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> LoadFileScheduling:
    return _ByFile(config, log)


# What a fixture starts or builds marks each test that uses it, also by way of another fixture.
_MARKERS = {
    "ray_cluster": "ray",
    "s3": "server",
    "host": "server",
    # Shards of which a test builds caches and trains students.
    "digits_shards": "long",
    "grown_cache": "long",
    "shards": "long",
}


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        for marker in {_MARKERS[name] for name in getattr(item, "fixturenames", ()) if name in _MARKERS}:
            item.add_marker(marker)


@pytest.fixture(scope="session", autouse=True)
def _no_fsync() -> Iterator[None]:
    """Tests kill processes and never the machine, so no file has to be on the disk; an ``fsync`` takes milliseconds."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda _: None)
        yield


@pytest.fixture(scope="session", autouse=True)
def _no_files_of_earlier_sessions(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Trainings store files in the temporary folder; those of other sessions may come from different code."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pipeline.student.data.local_store.TEMPORARY", tmp_path_factory.mktemp("node"))
        yield
