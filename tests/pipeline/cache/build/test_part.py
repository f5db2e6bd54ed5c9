"""A task may be killed, repeated or raced: the files are the same bytes in the end."""

from __future__ import annotations

import multiprocessing
import random
import shutil
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
import safetensors.torch
import torch

from pipeline import storage
from pipeline.augment.params import EVAL_VIEW, sample_keys, shard_partners, unmix, view_params
from pipeline.cache.build.commit import publish_commit, publish_file, read_commit
from pipeline.cache.build.context import cache_config, prepare
from pipeline.cache.build.manifest import publish_manifest
from pipeline.cache.build.part import build_part
from pipeline.cache.format import layout
from pipeline.cache.read.reader import open_cache
from pipeline.core.errors import CacheError, ConfigError, ResourceError
from pipeline.models.cifar import resnet
from pipeline.shards.publish import publish_shard_index
from schemas.cache_format import ViewBlock, aug_param_columns
from tests.pipeline.cache import teachers
from tests.pipeline.caches import TinyCache, build, cache_section, files, open_built, open_tasks, read_commits
from tests.pipeline.conftest import TinyConfig

EVAL = ViewBlock(start=0, stop=1, is_eval=True)


def test_no_file_of_a_cache_contains_its_url(built_cache: TinyCache) -> None:
    folder = built_cache.url.encode()
    assert not [path for path, data in files(built_cache.url).items() if folder in data]


def test_another_order_of_tasks_and_an_index_published_before_change_no_byte(
    built_cache: TinyCache, tiny_config: TinyConfig
) -> None:
    config = tiny_config()
    assert isinstance(config.data.shards, tuple)
    folder = storage.join(cache_section(config).url, layout.INDEX)
    publish_shard_index(config.data.shards[0], data=config.data, folder_url=folder, threads=1)
    prepare(config)
    tasks = open_tasks(config)
    random.Random(0).shuffle(tasks)
    build(config, tasks)
    assert files(cache_section(config).url) == files(built_cache.url)


OPTIONS = {"jitter": {"hue": 0.1}, "randaugment": {}, "erasing": {"probability": 0.5}, "cutmix": 0.5}


def test_augmentation_parameters_are_plain_columns_of_each_part_except_the_eval_pass(
    tiny_config: TinyConfig, digits_shards: list[str]
) -> None:
    config = tiny_config(data={"shards": digits_shards[1:]}, views=OPTIONS)
    cache = open_built(config)
    names = set(aug_param_columns(config.views))
    for path in (path for path in files(cache.url) if path.startswith("parts/")):
        part = pq.read_table(storage.join(cache.url, path))
        assert names & {*part.column_names} == (set() if "/eval." in path else names)
        for view in part["view"].unique().to_pylist():
            rows = part.filter(pc.equal(part["view"], view))
            stored = cache.view(path.split("/")[1], view).aug_params
            assert all(rows[name].to_pylist() == stored[name].tolist() for name in stored)
    assert cache.view("digits-01", EVAL_VIEW).aug_params == {}


def test_the_last_views_that_a_plan_can_have_differ_from_the_eval_pass(tiny_config: TinyConfig) -> None:
    """Their 65,535 views would take minutes to build, so only the first and the last ones are."""
    config = tiny_config(views={**OPTIONS, "count": 65_535}, cache={"views_per_part": 3})
    tasks = [task for task in open_tasks(config) if task.shard_url.endswith("digits-01.tar")]
    assert [(task.block.start, task.block.stop) for task in tasks[-2:]] == [(65_529, 65_532), (65_532, 65_535)]
    prepare(config)
    for task in (*tasks[:2], tasks[-1]):
        build_part(task)
    last = read_commits(cache_section(config).url)[-1]
    assert last.block.name == "v65532-65534"
    assert [view.view for view in last.views] == [65_532, 65_533, 65_534]
    publish_manifest(cache_section(config).url, {"digits-01": tasks[0].shard_url})
    cache = open_cache(cache_section(config).url)
    assert cache.num_views == 3
    assert isinstance(config.data.shards, tuple)
    index = cache.index(cache.shards[0])
    keys, sizes = sample_keys(0, index.sample_ids(index.ok)), (index.width[index.ok], index.height[index.ok])
    for view in (2, 65_532, 65_534):
        columns = cache.view("digits-01", view)
        expected = view_params(
            config.views, keys, np.full(15, view, np.int64), *(side.astype(np.int64) for side in sizes)
        )
        assert np.array_equal(columns.box_N4, expected.box_N4)
        partners = shard_partners(config.views, "digits-01", view, 15)
        assert np.array_equal(columns.mix_row_N, partners)
        single = partners == np.arange(15)
        for name, values in unmix(expected, single).aug_params.items():
            assert np.array_equal(columns.aug_params[name], values), name
    assert cache.view("digits-01", EVAL_VIEW).mix_lambda_N.tolist() == [1] * 15


def test_the_same_build_in_another_store_gives_the_same_bytes_in_every_file(
    built_cache: TinyCache, tiny_config: TinyConfig, tmp_path: Path
) -> None:
    url = f"memory://{tmp_path.name}/cache"
    build(tiny_config(cache={"url": url}))
    assert files(url) == files(built_cache.url)


def test_without_its_manifest_a_cache_is_published_again_with_the_same_bytes(tiny_cache: TinyCache) -> None:
    before = files(tiny_cache.url)
    for path in ("manifest.json", layout.SHARDS, layout.PARTS, layout.CLASS_MEANS):
        storage.delete(storage.join(tiny_cache.url, path))
    with pytest.raises(CacheError, match=r"cache\.unfinished"):
        open_cache(tiny_cache.url)
    assert open_tasks(tiny_cache.config) == []
    build(tiny_cache.config)
    assert files(tiny_cache.url) == before


@pytest.mark.slow
def test_racing_builders_agree_on_every_byte(built_cache: TinyCache, tiny_config: TinyConfig) -> None:
    config = tiny_config()
    prepare(config)
    tasks = open_tasks(config)
    with ThreadPoolExecutor(4) as pool:
        commits = list(pool.map(build_part, [task for task in tasks for _ in range(2)]))
    assert commits[0::2] == commits[1::2]
    build(config)
    assert files(cache_section(config).url) == files(built_cache.url)


@pytest.mark.slow
def test_racing_processes_agree_on_every_byte(built_cache: TinyCache, tiny_config: TinyConfig) -> None:
    config = tiny_config()
    prepare(config)
    tasks = open_tasks(config)
    with ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("spawn")) as pool:
        commits = list(pool.map(build_part, [task for task in tasks for _ in range(2)]))
    assert commits[0::2] == commits[1::2]
    build(config)
    assert files(cache_section(config).url) == files(built_cache.url)


def test_a_loser_with_other_bits_leaves_the_winners_files_alone(tiny_cache: TinyCache, tmp_path: Path) -> None:
    winner = read_commit(tiny_cache.url, layout.commit_path("digits-00", EVAL))
    before = files(tiny_cache.url)
    local = tmp_path / "rounded-differently"
    local.write_bytes(b"another part")
    part = publish_file(tiny_cache.url, local, layout.part_path("digits-00", EVAL))
    assert publish_commit(tiny_cache.url, winner.model_copy(update={"part": part})) == winner
    assert files(tiny_cache.url) == before


def test_the_files_of_a_builder_killed_before_its_commit_are_removed(
    built_cache: TinyCache, tiny_config: TinyConfig, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    config = tiny_config()
    prepare(config)

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("pipeline.cache.build.header_claim.publish_commit", killed)
        with pytest.raises(KeyboardInterrupt):
            build_part(open_tasks(config)[1])
    url = cache_section(config).url
    assert read_commits(url) == []
    # The part of a machine that rounds differently is under another name, and no commit will ever name it.
    local = tmp_path / "rounded-differently"
    local.write_bytes(b"another part")
    publish_file(url, local, layout.part_path("digits-00", ViewBlock(start=0, stop=2)))
    publish_file(url, local, layout.means_path("digits-00", EVAL))
    build(config)
    assert files(url) == files(built_cache.url)


def test_parts_that_another_builder_is_about_to_commit_are_not_removed(tiny_cache: TinyCache, tmp_path: Path) -> None:
    local = tmp_path / "under-way"
    local.write_bytes(b"views to come")
    coming = publish_file(tiny_cache.url, local, layout.part_path("digits-00", ViewBlock(start=3, stop=5)))
    build(tiny_cache.config)
    assert coming.path in files(tiny_cache.url)


def test_a_cache_removed_between_two_parts_of_a_process_is_claimed_again(tiny_config: TinyConfig) -> None:
    config = tiny_config()
    prepare(config)
    first, second, *_ = open_tasks(config)
    build_part(first)
    header = files(cache_section(config).url)[layout.HEADER]
    shutil.rmtree(cache_section(config).url)
    build_part(second)
    assert files(cache_section(config).url)[layout.HEADER] == header


def test_a_task_that_finds_another_teachers_header_stops(tiny_config: TinyConfig) -> None:
    config = tiny_config()
    prepare(config)
    task = open_tasks(config)[0]
    header = Path(cache_section(config).url, layout.HEADER)
    header.unlink()
    foreign = tiny_config(cache={"logits": "fp16", "url": f"{header.parent}-foreign"})
    prepare(foreign)
    prepare(config)
    header.write_bytes(Path(cache_section(foreign).url, layout.HEADER).read_bytes())
    with pytest.raises(CacheError, match=r"cache\.unused-header[\s\S]*teacher\.logits: fp16 -> fp32"):
        build_part(task)


def test_a_batch_beyond_memory_is_found_before_any_work(
    tiny_config: TinyConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(teachers, "max_rows", 6)
    config = tiny_config(teacher={"model": "python:tests.pipeline.cache.teachers:Large", "kwargs": {}, "batch_size": 8})
    with pytest.raises(ResourceError, match=r"model\.out-of-memory[\s\S]*teacher\.batch_size=4"):
        prepare(config)
    assert files(cache_section(config).url) == {}


def save_weights(path: Path, *, seed: int) -> str:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        safetensors.torch.save_file(resnet(10, 8, (4, 4, 6, 7)).state_dict(), path)
    return str(path)


def test_a_process_notices_weights_that_were_replaced_under_their_url(tiny_config: TinyConfig, tmp_path: Path) -> None:
    config = tiny_config(teacher={"weights": save_weights(tmp_path / "w.safetensors", seed=1)})
    prepare(config)
    first, second, *_ = open_tasks(config)
    build_part(first)
    save_weights(tmp_path / "w.safetensors", seed=2)
    with pytest.raises(CacheError, match=r"cache\.other-header[\s\S]*teacher\.weights: [0-9a-f]{64} -> [0-9a-f]{64}"):
        build_part(second)
    save_weights(tmp_path / "w.safetensors", seed=1)
    build_part(second)


@pytest.mark.parametrize(
    ("overrides", "code", "where"),
    [
        ({"cache": {"class_means": "view0"}}, "config.class-means-of-mixed-views", "cache.class_means"),
        ({"data": {"label": None}}, "config.class-means-without-labels", "data.label"),
        ({"data": {"num_classes": None}}, "config.missing-key", "data.num_classes"),
        ({"data": {"shards": None}}, "config.missing-key", "data.shards"),
        ({"teacher": {"others": [{"model": "timm/resnet18"}]}}, "config.several-teachers", "teacher.others"),
    ],
)
def test_a_config_that_cannot_be_built_is_refused_first(
    overrides: dict[str, Any], code: str, where: str, tiny_config: TinyConfig
) -> None:
    with pytest.raises(ConfigError) as caught:
        cache_config(tiny_config(**overrides))
    assert caught.value.code == code
    assert where in str(caught.value)
