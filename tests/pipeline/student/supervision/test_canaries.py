"""Canaries: this machine renders the pixels of the cache, or the training stops with their difference."""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
import torchvision

from pipeline.cache.read.reader import open_cache
from pipeline.student.run.checkpoint import read_config
from pipeline.student.supervision.canaries import CanaryReport, check_canaries
from pipeline.student.training.trainer import train
from tests.errors import raises
from tests.marks import slow
from tests.pipeline.caches import TinyCache, shard_urls
from tests.pipeline.student.conftest import Replay
from tests.pipeline.student.runs import cached_source, rewrite_view, run_config, set_cell, warnings_of


def check(cache: TinyCache, allowed_levels: int = 0) -> CanaryReport:
    data = cache.config.data.model_copy(update={"allow_pixel_drift": allowed_levels})
    return check_canaries(cached_source(cache), data)


@pytest.mark.parametrize("kind", ["crop", "function_matching", slow("everything")])
def test_the_machine_that_built_a_cache_renders_its_canaries(replays: Replay, kind: str) -> None:
    report = check(replays(kind))
    assert report.num_compared >= 2
    assert report.num_drifted == 0


def brighter(levels: int, block: int) -> Callable[[pa.Table], pa.Table]:
    """A digest of other pixels, whose mean differs in one of its 8 x 8 x 3 blocks."""

    def mean(stored: bytes) -> bytes:
        values = np.frombuffer(stored, np.uint8).copy()
        values[block] = values[block] + levels if values[block] < 128 else values[block] - levels
        return values.tobytes()

    def change(table: pa.Table) -> pa.Table:
        table = set_cell("pixel_digest", 0, bytes(16))(table)
        return set_cell("pixel_mean", 0, mean)(table)

    return change


def test_drift_stops_training_with_its_size_and_both_versions_unless_it_is_allowed(
    replay_copy: Replay, tmp_path: Path
) -> None:
    cache = replay_copy("crop")
    rewrite_view(cache, "digits-00", 0, brighter(3, 50))
    rewrite_view(cache, "digits-01", 0, brighter(7, 191))
    with raises("cache.pixel-drift") as caught:
        train(run_config(cache.config, tmp_path / "run"))
    first = open_cache(cache.url)
    assert caught.value.where == f"2 of 2 canaries, first {first.index(first.shards[0]).sample_ids([0])[0]}"
    assert "differ by up to 7 of 255" in str(caught.value.got)
    for installed in (torchvision.__version__, version("pillow"), torch.__version__):
        assert installed in str(caught.value.got)
        assert installed in str(caught.value.expected)
    assert not (tmp_path / "run").exists()
    assert "--allow-pixel-drift 7" in str(caught.value.next_step)
    with raises("cache.pixel-drift"):
        check(cache, 6)
    assert check(cache, 7) == CanaryReport(num_compared=2, num_drifted=2, levels=7)


def test_a_changed_image_is_not_mistaken_for_another_decoder(replays: Replay, tmp_path: Path) -> None:
    cache = replays("crop")
    opened = open_cache(cache.url)
    index = opened.index(opened.shards[0])
    paths: list[str] = []
    for name, url in shard_urls(cache.config).items():
        data = bytearray(Path(url).read_bytes())
        if name == "digits-00":
            data[int(index.offset[0]) + 30] ^= 1
        (tmp_path / Path(url).name).write_bytes(bytes(data))
        paths.append(str(tmp_path / Path(url).name))
    source = cached_source(cache, data=cache.config.data.model_copy(update={"shards": tuple(paths)}))
    with raises("shard.image-changed"):
        check_canaries(source, cache.config.data)


def test_drift_below_a_level_needs_an_allowance_of_1_and_of_unknown_size_one_of_255(
    replay_copy: Replay,
) -> None:
    cache = replay_copy("crop")
    rewrite_view(cache, "digits-00", 0, set_cell("pixel_digest", 0, bytes(16)))
    with raises("cache.pixel-drift") as caught:
        check(cache)
    assert "differ by up to 0 of 255" in str(caught.value.got)
    assert check(cache, 1) == CanaryReport(num_compared=2, num_drifted=1, levels=0)
    rewrite_view(cache, "digits-01", 0, set_cell("pixel_digest", 0, bytes(16)))
    rewrite_view(cache, "digits-01", 0, set_cell("pixel_mean", 0, None))
    with raises("cache.pixel-drift") as caught:
        check(cache, 254)
    assert "differ by up to 255 of 255" in str(caught.value.got)


def test_a_run_on_drifting_pixels_warns_and_records_that_it_was_allowed(replay_copy: Replay, tmp_path: Path) -> None:
    cache = replay_copy("crop")
    rewrite_view(cache, "digits-00", 0, brighter(3, 50))
    texts = warnings_of(run_config(cache.config, tmp_path / "run", data={"allow_pixel_drift": 4}))
    assert sum("1 of 2 canaries differ, block means by up to 3 of 255" in text for text in texts) == 1
    assert read_config(str(tmp_path / "run")).data.allow_pixel_drift == 4
    sound = replay_copy("function_matching").config
    texts = warnings_of(run_config(sound, tmp_path / "sound", data={"allow_pixel_drift": 4}))
    assert not [text for text in texts if "canaries" in text]
