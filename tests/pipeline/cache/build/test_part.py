"""A task may be killed, repeated or raced: the files are the same bytes in the end."""

from __future__ import annotations

import io
import multiprocessing
import random
import shutil
import tarfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
import safetensors.torch
import torch
from PIL import Image

from pipeline import storage
from pipeline.augment.params import EVAL_VIEW, sample_keys, shard_partners, unmix, view_params
from pipeline.cache.build.commit import publish_commit, publish_file, read_commit
from pipeline.cache.build.context import cache_config, prepare
from pipeline.cache.build.manifest import publish_manifest
from pipeline.cache.build.part import PartTask, build_part
from pipeline.cache.build.shard_index import IndexTask, restore_index
from pipeline.cache.format import layout
from pipeline.cache.read.reader import ViewColumns, open_cache
from pipeline.core.errors import CacheError, ConfigError, ResourceError, ShardError
from pipeline.models.cifar import resnet
from pipeline.shards.index import encode_index, index_settings, index_shard
from pipeline.shards.omissions import Omissions
from pipeline.shards.publish import publish_index, publish_shard_index
from pipeline.shards.writer import Members, pack_shards
from schemas.cache_format import ViewBlock, aug_param_columns
from schemas.config import Config
from tests.pipeline.cache import teachers
from tests.pipeline.caches import TinyCache, build, cache_section, digit_samples, files, open_tasks, read_commits
from tests.pipeline.conftest import TinyConfig
from tests.pipeline.shards.tars import make_linked_tar

EVAL = ViewBlock(start=0, stop=1, is_eval=True)
SKIP = {"bad_samples": "skip", "max_bad_share": 1.0}


def first_view(config: Config) -> PartTask:
    assert isinstance(config.data.shards, tuple)
    return PartTask(config, config.data.shards[0], ViewBlock(start=0, stop=1))


def with_samples(
    folder: Path, tiny_config: TinyConfig, change: Callable[[int, dict[str, bytes]], Members], **overrides: Any
) -> Config:
    """A config over one shard of 20 digits, each changed by ``change(row, members)``."""
    samples = [(key, change(row, dict(members))) for row, (key, members) in enumerate(digit_samples(20))]
    shards = pack_shards(samples, f"{folder}/shard-%02d.tar", shard_size=20)
    data = {"shards": shards, **overrides.pop("data", {})}
    return tiny_config(data=data, **overrides)


def test_the_same_build_gives_the_same_bytes_in_every_file(built_cache: TinyCache, tiny_config: TinyConfig) -> None:
    config = tiny_config()
    build(config)
    assert files(cache_section(config).url) == files(built_cache.url)


def test_no_file_of_a_cache_contains_its_url(built_cache: TinyCache) -> None:
    folder = built_cache.url.encode()
    assert not [path for path, data in files(built_cache.url).items() if folder in data]


@pytest.mark.parametrize("seed", range(3))
def test_the_order_of_tasks_changes_no_byte(seed: int, built_cache: TinyCache, tiny_config: TinyConfig) -> None:
    config = tiny_config()
    prepare(config)
    tasks = open_tasks(config)
    random.Random(seed).shuffle(tasks)
    build(config, tasks)
    assert files(cache_section(config).url) == files(built_cache.url)


def test_blocks_of_one_view_hold_the_same_rows(built_cache: TinyCache, tiny_config: TinyConfig) -> None:
    config = tiny_config(cache={"views_per_part": 1})
    build(config)
    small, large = open_cache(cache_section(config).url), open_cache(built_cache.url)
    assert small.num_views == large.num_views == 3
    for shard in ("digits-00", "digits-01"):
        for view in range(3):
            for name in ViewColumns.__slots__:
                left, right = getattr(small.view(shard, view), name), getattr(large.view(shard, view), name)
                assert np.array_equal(left, right) or left == right
    same = ("index/", "means/", "class_means", "header")
    assert {path: data for path, data in files(cache_section(config).url).items() if path.startswith(same)} == {
        path: data for path, data in files(built_cache.url).items() if path.startswith(same)
    }


OPTIONS = {"jitter": {"hue": 0.1}, "randaugment": {}, "erasing": {"probability": 0.5}, "cutmix": 0.5}


def test_augmentation_parameters_are_plain_columns_of_each_part_except_the_eval_pass(tiny_config: TinyConfig) -> None:
    config = tiny_config(views=OPTIONS)
    build(config)
    cache = open_cache(cache_section(config).url)
    names = set(aug_param_columns(config.views))
    for path in (path for path in files(cache.url) if path.startswith("parts/")):
        part = pq.read_table(storage.join(cache.url, path))
        assert names & {*part.column_names} == (set() if "/eval." in path else names)
        for view in part["view"].unique().to_pylist():
            rows = part.filter(pc.equal(part["view"], view))
            stored = cache.view(path.split("/")[1], view).drawn
            assert all(rows[name].to_pylist() == stored[name].tolist() for name in stored)
    assert cache.view("digits-00", EVAL_VIEW).drawn == {}


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
            assert np.array_equal(columns.drawn[name], values), name
    assert cache.view("digits-01", EVAL_VIEW).mix_lambda_N.tolist() == [1] * 15


def test_a_memory_url_holds_the_same_parts(built_cache: TinyCache, tiny_config: TinyConfig, tmp_path: Path) -> None:
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
        patch.setattr("pipeline.cache.build.part.publish_commit", killed)
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


def test_a_cache_removed_between_two_builds_of_a_process_is_claimed_again(
    built_cache: TinyCache, tiny_config: TinyConfig
) -> None:
    config = tiny_config()
    build(config)
    shutil.rmtree(cache_section(config).url)
    build(config)
    assert files(cache_section(config).url) == files(built_cache.url)


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


def test_a_build_uses_an_index_published_without_a_teacher(built_cache: TinyCache, tiny_config: TinyConfig) -> None:
    config = tiny_config()
    assert isinstance(config.data.shards, tuple)
    folder = storage.join(cache_section(config).url, layout.INDEX)
    for url in config.data.shards:
        publish_shard_index(url, data=config.data, folder_url=folder, threads=1)
    build(config)
    assert files(cache_section(config).url) == files(built_cache.url)


@pytest.mark.parametrize("count", [20, 5], ids=["as long", "shorter"])
def test_indexing_a_shard_that_was_replaced_under_its_name_is_refused(
    tiny_config: TinyConfig, tmp_path: Path, count: int
) -> None:
    config = with_samples(tmp_path, tiny_config, lambda _, members: members)
    assert isinstance(config.data.shards, tuple)
    url, folder = config.data.shards[0], str(tmp_path / "indexes")
    for _ in range(2):
        assert publish_shard_index(url, data=config.data, folder_url=folder, threads=1).num_ok == 20
    digits = [members for _, members in digit_samples(21)][21 - count :]
    pack_shards(
        [(f"digit-{row:04d}", members) for row, members in enumerate(digits)],
        f"{tmp_path}/again/shard-%02d.tar",
        shard_size=count,
    )
    Path(url).write_bytes((tmp_path / "again/shard-00.tar").read_bytes())
    with pytest.raises(ShardError, match=r"shard\.changed\][\s\S]*digit-0019"):
        publish_shard_index(url, data=config.data, folder_url=folder, threads=1)


def odd_tar(folder: Path) -> str:
    """Ten digits in a folder, five hard links to the first of them and a hidden file between; returns the URL."""
    members: list[tuple[str, bytes | str]] = [("d/.DS_Store", b"x")]
    for key, sample in digit_samples(10):
        members += [(f"d/{key}.{extension}", content) for extension, content in sample.items()]
    first = next(iter(digit_samples(1)))[0]
    for row in range(5):
        members += [(f"d/link-{row}.{extension}", f"d/{first}.{extension}") for extension in ("png", "cls")]
    (folder / "odd.tar").write_bytes(make_linked_tar(members))
    return str(folder / "odd.tar")


def test_linked_images_are_in_the_cache_and_hidden_members_are_counted(tiny_config: TinyConfig, tmp_path: Path) -> None:
    config = tiny_config(data={"shards": (odd_tar(tmp_path),)})
    prepare(config)
    first, *others = open_tasks(config)
    omissions = [Omissions() for _ in range(2)]
    commit = build_part(first, omissions=omissions[0])
    assert (commit.num_ok, commit.read, commit.skipped) == (15, 15, {})
    assert omissions[0].lines() == ["1 hidden members (d/.DS_Store)"]
    # Later parts are built from the index, and count nothing again.
    assert build_part(others[0], omissions=omissions[1]).num_ok == 15
    assert omissions[1].lines() == []


def test_a_build_continues_with_an_index_of_the_first_version(tiny_config: TinyConfig, tmp_path: Path) -> None:
    config = tiny_config(data={"shards": (odd_tar(tmp_path),), **SKIP})
    url, (first, *others) = cache_section(config).url, open_tasks(config)
    old = index_shard(Path(first.shard_url), config.data, where=first.shard_url, rules=1)
    data = encode_index(old, index_settings(config.data))
    publish_index(storage.join(url, layout.INDEX), "odd", data)
    prepare(config)
    omissions = Omissions()
    commit = build_part(first, omissions=omissions)
    assert (commit.num_ok, commit.skipped) == (10, {"no_image": 1})
    (line,) = omissions.lines()
    assert line.startswith("10 links ignored")
    # The lost index is restored with the same bytes, so that the other parts fit it.
    storage.delete(storage.join(url, layout.index_path("odd")))
    restore_index(IndexTask(config, first.shard_url, commit.index.sha256))
    assert storage.read(storage.join(url, layout.index_path("odd"))) == data
    for task in others:
        assert build_part(task).num_ok == 10


def test_reasons_of_skipped_samples_are_reported(tiny_config: TinyConfig, tmp_path: Path) -> None:
    config = with_samples(tmp_path, tiny_config, bad, data=SKIP)
    prepare(config)
    omissions = Omissions()
    commit = build_part(open_tasks(config)[0], omissions=omissions)
    assert sum(omissions.counts.values()) == sum(commit.skipped.values()) > 0
    assert any("undecodable samples (shard-00/" in line and ": " in line for line in omissions.lines())


def bad(row: int, members: dict[str, bytes]) -> Members:
    """Rows 3, 4 and 12 cannot be decoded, are empty, or have no image."""
    changes = {3: {"png": b"not a png"}, 4: {"png": b""}, 12: {"png": None}}
    return {name: data for name, data in {**members, **changes.get(row, {})}.items() if data is not None}


def test_groups_are_full_whatever_bad_samples_lie_between(tiny_config: TinyConfig, tmp_path: Path) -> None:
    # Without an eval pass before it, the first block of views meets the bad samples itself.
    section = {"class_means": "none"}
    config = with_samples(tmp_path, tiny_config, bad, data=SKIP, cache=section)
    manifest = build(config)
    assert (manifest.num_samples, manifest.num_ok) == (20, 17)
    assert manifest.skipped == {"empty": 1, "no_image": 1, "undecodable": 1}
    for commit in read_commits(cache_section(config).url):
        assert commit.read == 20 == commit.written + sum(commit.skipped.values())
    columns = open_cache(cache_section(config).url).view("shard-00", 1)
    ok = [row for row in range(20) if row not in (3, 4, 12)]
    assert columns.row_N.tolist() == ok
    # 17 ok rows: two groups of 8 and a last row alone.
    groups = [set(ok[:8]), set(ok[8:16]), {ok[16]}]
    for row, partner in zip(ok, columns.mix_row_N.tolist(), strict=True):
        assert any({row, partner} <= group for group in groups)
        assert (row == partner) == (row == ok[16])


def test_a_bad_sample_under_fail_leaves_no_commit(tiny_config: TinyConfig, tmp_path: Path) -> None:
    config = with_samples(tmp_path, tiny_config, bad)
    with pytest.raises(ShardError, match=r"shard\.bad-samples[\s\S]*digit-0003 \(undecodable: "):
        build(config)
    assert list(files(cache_section(config).url)) == ["header.json"]


def test_a_known_index_with_bad_samples_is_refused_under_fail(tiny_config: TinyConfig, tmp_path: Path) -> None:
    build(with_samples(tmp_path, tiny_config, bad, data=SKIP, views={"count": 1}))
    with pytest.raises(ShardError, match=r"shard\.bad-samples"):
        build(with_samples(tmp_path, tiny_config, bad))


def test_more_bad_samples_than_may_be_skipped_leave_no_commit_and_no_index(
    tiny_config: TinyConfig, tmp_path: Path
) -> None:
    config = with_samples(tmp_path, tiny_config, bad, data={"bad_samples": "skip"})
    with pytest.raises(ShardError, match=r"shard\.bad-samples[\s\S]*digit-0003[\s\S]*at most 0\.1 "):
        build(config)
    assert list(files(cache_section(config).url)) == ["header.json"]
    build(with_samples(tmp_path, tiny_config, bad, data={"bad_samples": "skip", "max_bad_share": 0.15}))


def test_a_truncated_shard_keeps_its_complete_samples_and_counts_the_truncated_one(
    tiny_config: TinyConfig, tmp_path: Path
) -> None:
    config = with_samples(tmp_path, tiny_config, lambda _, members: members, data={"bad_samples": "skip"})
    assert isinstance(config.data.shards, tuple)
    path = Path(config.data.shards[0])
    with tarfile.open(path) as archive:
        offset = archive.getmember("digit-0015.png").offset_data
    path.write_bytes(path.read_bytes()[: offset + 10])
    manifest = build(config)
    assert (manifest.num_samples, manifest.num_ok, manifest.skipped) == (16, 15, {"truncated": 1})
    assert open_cache(cache_section(config).url).view("shard-00", 2).row_N.tolist() == list(range(15))
    with pytest.raises(ShardError, match=r"shard\.bad-samples"):
        build(tiny_config(data={"shards": [str(path)]}, views={"count": 4}))


def test_a_shard_without_one_good_sample_is_a_cache_of_no_rows(tiny_config: TinyConfig, tmp_path: Path) -> None:
    config = with_samples(tmp_path, tiny_config, lambda _, members: {**members, "png": b"no"}, data=SKIP)
    manifest = build(config)
    cache = open_cache(cache_section(config).url)
    assert (manifest.num_ok, manifest.skipped) == (0, {"undecodable": 20})
    assert cache.view("shard-00", 2).logits_NK.shape == (0, 10)


def plain(row: int, members: dict[str, bytes]) -> Members:
    buffer = io.BytesIO()
    Image.new("RGB", (20, 20), (9, 9, 9)).save(buffer, "PNG")
    return {**members, "png": buffer.getvalue()} if row in (5, 11) else members


def test_nan_from_a_teacher_names_the_samples(tiny_config: TinyConfig, tmp_path: Path) -> None:
    teacher = {"model": "python:tests.pipeline.cache.teachers:NanOnPlainImages", "kwargs": {}}
    config = with_samples(tmp_path, tiny_config, plain, teacher=teacher, views={"kind": "crop"})
    with pytest.raises(ShardError, match=r"model\.outputs-not-finite[\s\S]*keys digit-0005\n"):
        build(config)
    assert read_commits(cache_section(config).url) == []


def grey_or_white(row: int, members: dict[str, bytes]) -> Members:
    buffer = io.BytesIO()
    Image.new("RGB", (20, 20), (255, 255, 255) if row in (5, 11) else (110, 110, 110)).save(buffer, "PNG")
    return {**members, "png": buffer.getvalue()}


def test_infinity_in_half_precision_names_the_samples(tiny_config: TinyConfig, tmp_path: Path) -> None:
    hot = {"model": "python:tests.pipeline.cache.teachers:HotOnWhite", "kwargs": {}}
    config = with_samples(
        tmp_path, tiny_config, grey_or_white, teacher={**hot, "precision": "fp16"}, views={"kind": "crop"}
    )
    with pytest.raises(ShardError, match=r"model\.outputs-not-finite[\s\S]*keys digit-0005\n"):
        build(config)
    assert read_commits(cache_section(config).url) == []
    build(
        with_samples(
            tmp_path,
            tiny_config,
            grey_or_white,
            teacher=hot,
            views={"kind": "crop"},
            cache={"url": f"{tmp_path}/fp32"},
        )
    )


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


def test_logits_beyond_half_precision_stop_the_build(tiny_config: TinyConfig) -> None:
    teacher = {"model": "python:tests.pipeline.cache.teachers:Loud", "kwargs": {}}
    config = tiny_config(teacher=teacher, cache={"logits": "fp16"})
    with pytest.raises(CacheError, match=r"cache\.values-do-not-fit[\s\S]*cache\.logits=fp32"):
        build(config)
    assert read_commits(cache_section(config).url) == []


def unlabelled(row: int, members: dict[str, bytes]) -> Members:
    return {name: data for name, data in members.items() if name != "cls" or row not in (2, 9)}


def test_class_means_refuse_a_sample_without_a_label(tiny_config: TinyConfig, tmp_path: Path) -> None:
    config = with_samples(tmp_path, tiny_config, unlabelled)
    with pytest.raises(ShardError, match=r"shard\.unlabelled-samples[\s\S]*digit-0002[\s\S]*missing_labels=ignore"):
        build(config)


def test_missing_labels_are_left_out_of_the_means_when_configured(tiny_config: TinyConfig, tmp_path: Path) -> None:
    config = with_samples(tmp_path, tiny_config, unlabelled, data={"missing_labels": "ignore"})
    build(config)
    cache = open_cache(cache_section(config).url)
    means = cache.class_means()
    assert means is not None
    assert means.count_K.sum() == 18
    assert cache.view("shard-00", 0).row_N.tolist() == list(range(20))


def test_a_shard_changed_since_it_was_indexed_is_found_by_a_later_block(
    tiny_config: TinyConfig, tmp_path: Path
) -> None:
    config = with_samples(tmp_path, tiny_config, lambda _, members: members)
    prepare(config)
    build_part(first_view(config))
    assert isinstance(config.data.shards, tuple)
    path = Path(config.data.shards[0])
    data = bytearray(path.read_bytes())
    at = data.index(b"IDAT") + 8
    data[at] ^= 1
    path.write_bytes(data)
    with pytest.raises(ShardError, match=r"shard\.changed-since-index[\s\S]*digit-0000"):
        build(config)


def test_a_shard_that_grew_between_two_blocks_is_found(tiny_config: TinyConfig, tmp_path: Path) -> None:
    config = with_samples(tmp_path, tiny_config, lambda _, members: members)
    prepare(config)
    build_part(first_view(config))
    with_samples(tmp_path, tiny_config, lambda row, members: members if row < 19 else {**members, "txt": b"more"})
    with pytest.raises(CacheError, match=r"cache\.shard-changed-between-parts"):
        build(config)


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
