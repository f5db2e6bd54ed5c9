from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from pipeline import storage
from pipeline.cache.build.commit import read_commit_summaries
from pipeline.cache.build.context import prepare
from pipeline.cache.build.part import build_part
from pipeline.cache.plan.build_plan import plan_cache
from pipeline.cache.plan.class_warnings import label_spread
from pipeline.cache.plan.free_space import check_space
from pipeline.cache.plan.pixel_sample import sample_pixels
from pipeline.cache.plan.plan_inputs import PlanInputs, collect_plan_inputs, resolve_embedding_dim
from pipeline.cache.plan.plan_warnings import plan_warnings
from pipeline.core.errors import ShardError, StorageInputError
from pipeline.shards.publish import publish_shard_index
from pipeline.shards.writer import pack_shards
from schemas.config import Config
from tests.errors import raises
from tests.pipeline.caches import TinyCache, build, cache_section, digit_samples, files, open_tasks, shard_urls
from tests.pipeline.conftest import TinyConfig
from tests.pipeline.shards.tars import make_tar

NUM_DIGITS, NUM_SHARDS, NUM_VIEWS = 35, 2, 3


def inputs_of(config: Config) -> PlanInputs:
    urls, cache = shard_urls(config), cache_section(config)
    sizes = {shard: storage.size(url) for shard, url in urls.items()}
    return collect_plan_inputs(config, cache, urls, sizes, read_commit_summaries(cache.url))


def test_a_plan_counts_the_parts_and_files_of_the_build(tiny_config: TinyConfig) -> None:
    config = tiny_config()
    plan = plan_cache(inputs_of(config))
    assert not storage.listing(cache_section(config).url)
    assert (plan.work.rows.low, plan.work.rows.high) == (NUM_DIGITS, NUM_DIGITS)
    assert plan.work.forwards.expected == plan.work.forwards_open.expected == NUM_DIGITS * (NUM_VIEWS + 1)
    tasks = open_tasks(config)
    build(config)
    assert (plan.work.num_parts, plan.work.num_parts_open) == (len(tasks), len(tasks))
    assert plan.traffic.num_objects == len(files(cache_section(config).url))


def test_committed_parts_are_not_planned_again(tiny_config: TinyConfig) -> None:
    config = tiny_config()
    prepare(config)
    first, *rest = open_tasks(config)
    committed = build_part(first)
    work = plan_cache(inputs_of(config)).work
    assert work.num_parts_open == len(rest)
    assert work.forwards_open.expected == NUM_DIGITS * (NUM_VIEWS + 1) - committed.num_ok * len(committed.views)
    for task in rest:
        build_part(task)
    plan = plan_cache(inputs_of(config))
    assert (plan.work.forwards_open.high, plan.size.parts_open.high, plan.size.read) == (0, 0, 0)
    assert plan.size.parts.low == sum(
        commit.part_size_bytes for commit in read_commit_summaries(cache_section(config).url)
    )


def test_a_plan_of_more_views_counts_only_the_new_views(built_cache: TinyCache) -> None:
    views = built_cache.config.views.model_copy(update={"count": 7})
    plan = plan_cache(inputs_of(built_cache.config.model_copy(update={"views": views})))
    assert plan.work.forwards_open.expected == NUM_DIGITS * 4
    assert plan.size.is_measured


@pytest.mark.slow
@pytest.mark.parametrize("logits", ["fp32", "fp16"])
def test_the_bytes_of_a_built_part_lie_within_the_planned_ones(
    tiny_config: TinyConfig, tmp_path: Path, logits: str
) -> None:
    shards = pack_shards(digit_samples(300), f"{tmp_path}/a-%d.tar", shard_size=300)
    cache = {"logits": logits, "embeddings": "none", "class_means": "none"}
    config = tiny_config(data={"shards": shards, "num_classes": 500}, views={"count": 1}, cache=cache)
    size = plan_cache(inputs_of(config)).size
    manifest = build(config)
    assert size.outputs == {"logits": 500 * (4 if logits == "fp32" else 2)}
    assert size.parts.low < manifest.size_bytes < size.parts.high
    assert size.parts.expected == pytest.approx(manifest.size_bytes, rel=0.25)


def test_rows_of_shards_outside_the_sample_are_estimated_by_their_size(tiny_config: TinyConfig, tmp_path: Path) -> None:
    shards = pack_shards(digit_samples(203), f"{tmp_path}/a-%02d.tar", shard_size=10)
    inputs = inputs_of(tiny_config(data={"shards": shards}))
    rows = plan_cache(inputs).work.rows
    assert rows.low < 203 < rows.high
    assert rows.expected == pytest.approx(203, rel=0.05)
    assert inputs.survey.num_counted == 0


def test_usable_images_are_counted_from_an_index(
    tiny_config: TinyConfig, digits_shards: list[str], tmp_path: Path
) -> None:
    members = [("a.png", b"no image"), ("a.cls", b"1"), ("b.png", next(digit_samples(1))[1]["png"]), ("b.cls", b"1")]
    (tmp_path / "bad.tar").write_bytes(make_tar(members))
    skip = {"bad_samples": "skip", "max_bad_share": 0.5}
    data = {"shards": [*digits_shards, f"{tmp_path}/bad.tar"], "index": f"{tmp_path}/index", **skip}
    config = tiny_config(data=data)
    assert plan_cache(inputs_of(config)).work.rows.expected == NUM_DIGITS + 2
    for url in shard_urls(config).values():
        publish_shard_index(url, data=config.data, folder_url=f"{tmp_path}/index", threads=1)
    work = plan_cache(inputs_of(config)).work
    assert (work.rows.expected, work.num_counted) == (NUM_DIGITS + 1, NUM_SHARDS + 1)


def test_a_plan_refuses_a_shard_without_images(tiny_config: TinyConfig, tmp_path: Path) -> None:
    (tmp_path / "text.tar").write_bytes(make_tar([("a.txt", b"x")]))
    with pytest.raises(ShardError) as caught:
        inputs_of(tiny_config(data={"shards": f"{tmp_path}/text.tar"}))
    assert (caught.value.code, caught.value.where) == ("shard.no-samples", f"{tmp_path}/text.tar")


def test_the_embedding_width_is_resolved_without_reading_weights(
    tiny_config: TinyConfig, built_cache: TinyCache
) -> None:
    missing_weights = inputs_of(tiny_config(teacher={"weights": "/nowhere/teacher.pt", "sha256": "0" * 64}))
    assert missing_weights.embedding_dim is None
    assert resolve_embedding_dim(missing_weights).embedding_dim == 7
    assert inputs_of(built_cache.config).embedding_dim == 7
    not_needed = inputs_of(tiny_config(cache={"embeddings": "none", "class_means": "none"}))
    assert resolve_embedding_dim(not_needed) is not_needed


@pytest.mark.parametrize(
    ("views", "means", "epochs", "forwards", "students"),
    [(50, "none", 300, 50, 1), (50, "eval", 10, 51, 6), (10, "none", 10, 10, 2), (10, "none", None, 10, None)],
)
def test_a_cache_pays_off_from_the_first_student_with_views_below_students_times_epochs(
    tiny_config: TinyConfig, views: int, means: str, epochs: int | None, forwards: int, students: int | None
) -> None:
    train = {} if epochs is None else {"train": {"epochs": epochs}}
    config = tiny_config(views={"count": views}, cache={"class_means": means}, **train)
    even = plan_cache(inputs_of(config)).break_even
    assert (even.forwards_per_image, even.epochs, even.num_students) == (forwards, epochs, students)


def test_label_spread_is_one_for_shuffled_and_zero_for_sorted_labels() -> None:
    label_N = np.repeat(np.arange(40, dtype=np.int32), 100)
    assert label_spread([label_N], 50) == 0
    shuffled = np.random.default_rng(0).permutation(label_N)
    assert label_spread([shuffled], 50) == pytest.approx(1, abs=0.02)
    # A run of two classes has entropy ln 2; 50 random rows of 40 classes hold about 29 classes, so nearly ln 29.
    pairs = np.concatenate([np.tile([first, first + 1], 100) for first in range(0, 40, 2)]).astype(np.int32)
    assert label_spread([pairs], 50) == pytest.approx(np.log(2) / np.log(29), abs=0.05)


@pytest.mark.parametrize("labels", [[], [[]], [[3]], [[3, 3, 3, 3]]])
def test_label_spread_is_unknown_for_too_few_labels_or_a_single_class(labels: list[list[int]]) -> None:
    assert label_spread([np.array(label_N, np.int32) for label_N in labels], 256) is None


def sorted_digits(count: int) -> list[tuple[str, dict[str, bytes]]]:
    return sorted(((key, dict(members)) for key, members in digit_samples(count)), key=lambda item: item[1]["cls"])


def warnings_of(config: Config) -> str:
    """All but the warning that the tests' teacher has random weights."""
    inputs = inputs_of(config)
    return "\n".join(text for text in plan_warnings(inputs, plan_cache(inputs)) if "weights is random" not in text)


@pytest.mark.parametrize(
    ("kind", "harm"), [("function_matching", "mixed within few classes"), ("crop", "a batch has few classes")]
)
def test_shards_sorted_by_class_give_a_warning(tiny_config: TinyConfig, tmp_path: Path, kind: str, harm: str) -> None:
    pack_shards(sorted_digits(80), f"{tmp_path}/sorted-%d.tar", shard_size=40)
    config = tiny_config(data={"shards": f"{tmp_path}/sorted-{{0..1}}.tar"}, views={"kind": kind})
    assert harm in warnings_of(config)
    assert "sorted" not in warnings_of(tiny_config())


def test_labels_outside_the_classes_give_a_warning(tiny_config: TinyConfig, tmp_path: Path) -> None:
    shards = pack_shards(digit_samples(150), f"{tmp_path}/a-%d.tar", shard_size=150)
    assert "none of 150 sampled labels is above 9" in warnings_of(
        tiny_config(data={"shards": shards, "num_classes": 12})
    )
    assert "a label is 9, and data.num_classes is 8" in warnings_of(tiny_config(data={"num_classes": 8}))
    assert not warnings_of(tiny_config())


@pytest.mark.slow
def test_more_than_a_million_objects_give_a_warning(tiny_config: TinyConfig, tmp_path: Path) -> None:
    shards = pack_shards(digit_samples(10), f"{tmp_path}/a-%d.tar", shard_size=1)
    views = {"count": 50_001}
    config = tiny_config(data={"shards": shards}, views=views, cache={"class_means": "none", "views_per_part": 1})
    # 10 shards of 50,001 parts and commits, 10 indexes, header, manifest and two tables.
    assert "1000034 objects" in warnings_of(config)
    assert "objects" not in warnings_of(tiny_config(data={"shards": shards}, views=views, cache={"views_per_part": 2}))


def test_images_without_labels_give_a_warning_if_class_means_need_them(tiny_config: TinyConfig, tmp_path: Path) -> None:
    samples = [
        (key, {"png": members["png"]} if row < 4 else members) for row, (key, members) in enumerate(digit_samples(9))
    ]
    data = {"shards": pack_shards(samples, f"{tmp_path}/a-%d.tar", shard_size=9)}
    assert "4 of 9 sampled images have no label" in warnings_of(tiny_config(data=data))
    assert not warnings_of(tiny_config(data={**data, "missing_labels": "ignore"}))
    assert warnings_of(tiny_config(data=data, cache={"class_means": "none"})) == (
        "labels: 4 of 9 images have none (data.label is cls)"
    )


def test_remote_shards_that_are_fetched_many_times_give_a_warning(tiny_config: TinyConfig) -> None:
    shards = pack_shards(digit_samples(8), "memory://plan/a-%d.tar", shard_size=8)
    config = tiny_config(data={"shards": shards}, views={"count": 20})
    plan = plan_cache(inputs_of(config))
    assert plan.size.read == 11 * storage.size(shards[0])
    assert "fetched 11 times" in warnings_of(config)
    assert "fetched" not in warnings_of(tiny_config(data={"shards": shards}))


def test_a_cache_of_another_plan_gives_a_warning_with_the_difference(built_cache: TinyCache) -> None:
    views = built_cache.config.views.model_copy(update={"seed": 5})
    assert "views.seed: 0 -> 5" in warnings_of(built_cache.config.model_copy(update={"views": views}))
    assert not warnings_of(built_cache.config)


def test_int8_logits_of_many_classes_give_a_warning_with_their_bytes(built_cache: TinyCache) -> None:
    config = built_cache.config
    data = config.data.model_copy(update={"num_classes": 21_841})
    cache = cache_section(config).model_copy(update={"logits": "int8"})
    warned = warnings_of(config.model_copy(update={"data": data, "cache": cache}))
    assert "int8 spreads 256 levels over 21841 logits and stores 40 bytes per row" in warned


def huge(tiny_config: TinyConfig, **cache: object) -> Config:
    """A cache larger than any disk: 65,535 views of 35 rows of 4 TB."""
    keys = {"embeddings": "none", "class_means": "none", "views_per_part": 1, **cache}
    return tiny_config(data={"num_classes": 10**12}, views={"count": 65_535}, cache=keys)


def test_a_cache_that_cannot_fit_on_its_disk_is_refused(tiny_config: TinyConfig) -> None:
    with raises("storage.not-enough-room", StorageInputError) as caught:
        check_space(inputs_of(huge(tiny_config)), num_tasks=0)
    assert "cache.url" in str(caught.value.next_step)


def test_a_part_that_cannot_fit_into_scratch_is_refused_even_if_the_cache_is_remote(tiny_config: TinyConfig) -> None:
    inputs = inputs_of(huge(tiny_config, url="memory://plan/huge"))
    assert check_space(inputs, num_tasks=0) == []
    with raises("storage.not-enough-room", StorageInputError) as caught:
        check_space(inputs, num_tasks=8)
    assert "8 parts" in caught.value.what
    assert "TMPDIR" in str(caught.value.next_step)


@pytest.mark.parametrize(("share_of_disk", "num_warnings"), [(1.4, 1), (0.6, 0)])
def test_a_cache_that_may_not_fit_gives_a_warning(
    tiny_config: TinyConfig, tmp_path: Path, share_of_disk: float, num_warnings: int
) -> None:
    # The lower bound of a cache of 1.4 times the free bytes is 0.7 times the free bytes.
    views, rows = 65_535, NUM_DIGITS
    num_classes = int(share_of_disk * shutil.disk_usage(tmp_path).free / (4 * views * rows))
    keys = {"embeddings": "none", "class_means": "none"}
    inputs = inputs_of(tiny_config(data={"num_classes": num_classes}, views={"count": views}, cache=keys))
    assert len(check_space(inputs, num_tasks=0)) == num_warnings


def test_a_cache_that_fits_is_neither_refused_nor_warned_of(tiny_config: TinyConfig) -> None:
    assert check_space(inputs_of(tiny_config()), num_tasks=2) == []


@pytest.mark.parametrize("pixels", ["raw", "jpeg:90"])
def test_a_plan_counts_the_stored_views(tiny_config: TinyConfig, pixels: str) -> None:
    config = tiny_config(views={"pixels": pixels})
    inputs = sample_pixels(inputs_of(config))
    plan = plan_cache(inputs)
    build(config)
    rows, views = NUM_DIGITS * (NUM_VIEWS + 1), NUM_DIGITS * NUM_VIEWS
    parts = [pq.read_table(path) for path in Path(cache_section(config).url).glob("parts/*/v*.parquet")]
    stored = sum(len(value) for part in parts for value in part["pixels"].to_pylist())
    assert plan.size.pixels is not None
    if pixels == "raw":
        assert plan.size.pixels.size_bytes == stored / views == 3 * 16 * 16
    else:
        # Sixteen images stand for all.
        assert plan.size.pixels.size_bytes == pytest.approx(stored / views, rel=0.1)
        assert (plan.size.pixels.num_sampled, plan.size.pixels.encode_s > 0) == (16, True)
    without = plan_cache(replace(inputs, pixels=None))
    assert (plan.size.row.expected - without.size.row.expected) * rows == pytest.approx(stored, rel=0.1)
    assert plan.traffic.epoch.get == 3 * NUM_SHARDS
