"""Caches that trainings replay, one of each kind of views, built once."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import pytest
import torch

from schemas.config import Config, ViewsConfig
from tests.pipeline.caches import TinyCache, build, cache_section, copy_of
from tests.pipeline.student.runs import close_sources

NUM_VIEWS = 6
PLANS: dict[str, dict[str, Any]] = {
    "crop": {"kind": "crop"},
    "function_matching": {"kind": "function_matching"},
    "repeated": {"kind": "function_matching", "mix_repeat": 2, "cutmix": 0.5},
    "raw": {"kind": "function_matching", "mix_repeat": 2, "cutmix": 0.5, "pixels": "raw"},
    "jpeg": {"kind": "crop", "pixels": "jpeg:90"},
    "everything": {
        "kind": "function_matching",
        "size": 32,
        "jitter": {"probability": 0.8, "hue": 0.2},
        "randaugment": {"num_ops": 2, "magnitude": 15, "magnitude_spread": 15},
        "erasing": {"probability": 0.5},
        "cutmix": 0.5,
    },
}


class Replay(Protocol):
    """A cache of one of the plans, with ``NUM_VIEWS`` views by default."""

    def __call__(self, kind: str, *, num_views: int = NUM_VIEWS) -> TinyCache: ...


@pytest.fixture(autouse=True)
def _leave_no_trace() -> Iterator[None]:
    """Training sets the number of threads for its whole process, and sources hold shards open."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
    close_sources()


def _with_views(config: Config, kind: str, url: str, num_views: int = NUM_VIEWS) -> Config:
    views = ViewsConfig.model_validate({**config.views.model_dump(), "count": num_views, **PLANS[kind]})
    cache = cache_section(config).model_copy(update={"url": url, "views_per_part": 4})
    return config.model_copy(update={"views": views, "cache": cache})


@pytest.fixture(scope="session")
def replays(built_cache: TinyCache, tmp_path_factory: pytest.TempPathFactory) -> Replay:
    """``replays("crop")`` and so on through ``PLANS``: fp32 views of 35 digits. Never written to."""
    built: dict[tuple[str, int], TinyCache] = {}

    def get(kind: str, *, num_views: int = NUM_VIEWS) -> TinyCache:
        if (kind, num_views) not in built:
            url = str(tmp_path_factory.mktemp("replay") / kind)
            config = _with_views(built_cache.config, kind, url, num_views)
            build(config)
            built[kind, num_views] = TinyCache(cache_section(config).url, config)
        return built[kind, num_views]

    return get


@pytest.fixture
def replay_copy(replays: Replay, tmp_path: Path) -> Replay:
    """Copies of the same caches, which a test may change."""

    def get(kind: str, *, num_views: int = NUM_VIEWS) -> TinyCache:
        return copy_of(replays(kind, num_views=num_views), tmp_path / f"replay-{kind}-{num_views}")

    return get


@pytest.fixture(scope="session")
def wide_caches(built_cache: TinyCache, tmp_path_factory: pytest.TempPathFactory) -> Replay:
    """The views of ``replays`` except two, with the outputs of a wider teacher at 12 pixels. Never written to."""
    built: dict[tuple[str, int], TinyCache] = {}

    def get(kind: str, *, num_views: int = NUM_VIEWS - 2) -> TinyCache:
        if (kind, num_views) not in built:
            url = str(tmp_path_factory.mktemp("wide") / kind)
            config = _with_views(built_cache.config, kind, url, num_views)
            teacher = config.teacher.model_copy(update={"kwargs": {"depth": 8, "widths": [4, 4, 6, 9]}})
            views = config.views.model_copy(update={"size": 12})
            config = config.model_copy(update={"teacher": teacher, "views": views})
            build(config)
            built[kind, num_views] = TinyCache(cache_section(config).url, config)
        return built[kind, num_views]

    return get


@pytest.fixture(scope="session")
def wide_cache(wide_caches: Replay) -> TinyCache:
    return wide_caches("crop")
