"""Groups are the same for a first pass and an indexed pass over a shard, and contain no bad samples."""

from __future__ import annotations

import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.augment.params import EVAL_VIEW
from pipeline.core.errors import ShardError
from pipeline.shards.index import IndexBuilder, ShardIndex, index_shard
from pipeline.shards.tar import Sample, read_samples
from pipeline.tasks.classification import Classification
from pipeline.teacher.rendering import GroupViews, Rendering, indexed_samples, read_groups
from schemas.cache_format import ViewBlock, aug_param_columns
from schemas.config import DataConfig, ViewsConfig
from tests.errors import raises
from tests.pipeline.caches import digit_samples
from tests.pipeline.shards.tars import make_tar

MIX_GROUP = 6
DATA = DataConfig.model_validate({"num_classes": 10})
PNG = next(digit_samples(1))[1]["png"]


OPTIONS = {"jitter": {"hue": 0.1}, "randaugment": {}, "erasing": {"probability": 0.5}, "cutmix": 0.5}


def rendering(*, kind: str = "function_matching", views: int = 2, is_eval: bool = False) -> Rendering:
    options = OPTIONS if kind == "function_matching" else {}
    plan = ViewsConfig.model_validate({"kind": kind, "count": views, "size": 8, "mix_group": MIX_GROUP, **options})
    block = ViewBlock(start=0, stop=1 if is_eval else views, is_eval=is_eval)
    return Rendering(
        shard_id="s",
        plan=plan,
        block=block,
        size=8,
        interpolation="bilinear",
        task=Classification(),
        max_pixels=10_000,
    )


def groups_of(samples: Iterator[Sample], spec: Rendering, builder: IndexBuilder | None) -> list[GroupViews]:
    with ThreadPoolExecutor(2) as pool:
        return list(read_groups(samples, spec, pool, builder=builder))


def sample(row: int, data: bytes) -> Sample:
    return Sample(row=row, key=str(row), status="ok" if data else "empty", target=row % 10, offset=0, size=1, data=data)


def index_of(url: str) -> ShardIndex:
    return index_shard(Path(url), DATA, where=url)


@settings(max_examples=25)
@given(st.lists(st.sampled_from(["good", "good", "garbage", "empty"]), max_size=25))
def test_every_group_but_the_last_is_full_despite_bad_samples(kinds: list[str]) -> None:
    payload = {"good": PNG, "garbage": b"garbage", "empty": b""}
    builder = IndexBuilder("s", Classification())
    samples = iter([sample(row, payload[kind]) for row, kind in enumerate(kinds)])
    groups = groups_of(samples, rendering(kind="crop", views=1), builder)
    good = [row for row, kind in enumerate(kinds) if kind == "good"]
    assert [group.row_N.tolist() for group in groups] == [
        good[start : start + MIX_GROUP] for start in range(0, len(good), MIX_GROUP)
    ]
    index = builder.finish()
    assert len(index) == len(kinds)
    assert index.ok.tolist() == good


@pytest.mark.slow
@settings(max_examples=25, deadline=None)
@given(st.lists(st.sampled_from([True, True, False]), max_size=25))
def test_bad_samples_between_good_ones_change_no_pixel(good: list[bool]) -> None:
    images = [members["png"] for _, members in digit_samples(len(good))]
    mixed = [sample(row, image if ok else b"garbage") for row, (ok, image) in enumerate(zip(good, images, strict=True))]
    groups = groups_of(iter(mixed), rendering(), IndexBuilder("s", Classification()))
    # The key of a view is that of its sample, so a group of one good image has the same views.
    for group in groups:
        for row, good_sample in enumerate(group.samples):
            (single,) = groups_of(iter([good_sample]), rendering(), None)
            assert torch.equal(group.pixels_VNCHW[:, row], single.pixels_VNCHW[:, 0])
    assert sum(len(group.samples) for group in groups) == sum(good)


def test_the_pixels_of_a_group_are_one_tensor_in_channels_last_memory(digits_shards: list[str]) -> None:
    url = digits_shards[0]
    for group in groups_of(read_samples(Path(url), DATA, where=url), rendering(), IndexBuilder("s", Classification())):
        for pixels_NCHW in group.pixels_VNCHW:
            assert pixels_NCHW.is_contiguous(memory_format=torch.channels_last)
        num_bytes = group.pixels_VNCHW.untyped_storage().nbytes()
        assert num_bytes == 2 * len(group.samples) * 8 * 8 * 3


def test_a_first_pass_and_an_indexed_pass_give_the_same_groups(digits_shards: list[str]) -> None:
    url, index = digits_shards[0], index_of(digits_shards[0])
    fresh = groups_of(read_samples(Path(url), DATA, where=url), rendering(), IndexBuilder("s", Classification()))
    indexed = groups_of(indexed_samples(Path(url), index, DATA, where=url), rendering(), None)
    assert [len(group.samples) for group in fresh] == [6, 6, 6, 2]
    for first, second in zip(fresh, indexed, strict=True):
        assert torch.equal(first.pixels_VNCHW, second.pixels_VNCHW)
        for name in ("row_N", "content_hash_N", "box_VN4", "flip_VN", "partner_VN", "mix_lambda_VN"):
            assert np.array_equal(getattr(first, name), getattr(second, name))
        assert np.array_equal(first.targets["label"], second.targets["label"])
        assert [*first.aug_params_VN] == [*second.aug_params_VN] == [*aug_param_columns(rendering().plan)]
        assert all(np.array_equal(values, second.aug_params_VN[name]) for name, values in first.aug_params_VN.items())


def test_the_odd_row_of_a_group_has_no_box(digits_shards: list[str]) -> None:
    spec = rendering(views=8)
    spec = replace(spec, plan=spec.plan.model_copy(update={"mix_group": 5, "cutmix": 1.0}))
    url = digits_shards[0]
    for group in groups_of(read_samples(Path(url), DATA, where=url), spec, IndexBuilder("s", Classification())):
        single_VN = group.partner_VN == np.arange(5)
        assert single_VN.sum(axis=1).tolist() == [1] * 8
        assert np.array_equal(group.aug_params_VN["cut_width"] == 0, single_VN)
        assert np.array_equal(group.mix_lambda_VN == 1, single_VN)


def test_the_index_of_a_first_pass_equals_a_separate_index(digits_shards: list[str]) -> None:
    url, builder = digits_shards[1], IndexBuilder("digits-01", Classification())
    groups_of(read_samples(Path(url), DATA, where=url), rendering(), builder)
    fused, separate = builder.finish(), index_of(url)
    assert fused.keys.equals(separate.keys)
    for name in ("status", "offset", "size", "width", "height", "content_hash"):
        assert np.array_equal(getattr(fused, name), getattr(separate, name))
    assert np.array_equal(fused.targets["label"], separate.targets["label"])


def test_a_block_of_one_view_has_the_view_of_the_larger_block(digits_shards: list[str]) -> None:
    url = digits_shards[0]
    both = groups_of(read_samples(Path(url), DATA, where=url), rendering(), IndexBuilder("s", Classification()))
    spec = replace(rendering(), block=ViewBlock(start=1, stop=2))
    second = groups_of(read_samples(Path(url), DATA, where=url), spec, IndexBuilder("s", Classification()))
    for group, group_of_one_view in zip(both, second, strict=True):
        assert torch.equal(group.pixels_VNCHW[1], group_of_one_view.pixels_VNCHW[0])
        assert np.array_equal(group.partner_VN[1], group_of_one_view.partner_VN[0])
        assert np.array_equal(group.mix_lambda_VN[1], group_of_one_view.mix_lambda_VN[0])


def test_the_eval_pass_of_a_mixing_plan_is_neither_mixed_nor_flipped(digits_shards: list[str]) -> None:
    url, spec = digits_shards[0], rendering(is_eval=True)
    assert spec.view_numbers == [EVAL_VIEW]
    for group in groups_of(read_samples(Path(url), DATA, where=url), spec, IndexBuilder("s", Classification())):
        assert not group.mixes
        assert not group.flip_VN.any()
        assert group.partner_VN.tolist() == [list(range(len(group.samples)))]
        assert group.aug_params_VN == {}


def test_an_image_beyond_the_pixel_limit_is_recorded_and_skipped() -> None:
    builder = IndexBuilder("s", Classification())
    assert groups_of(iter([sample(0, PNG)]), replace(rendering(kind="crop"), max_pixels=10), builder) == []
    assert builder.finish().num_ok == 0


def test_an_indexed_image_that_no_longer_decodes_is_an_error_and_not_skipped() -> None:
    with pytest.raises(ShardError) as caught:
        groups_of(iter([sample(0, b"garbage")]), rendering(kind="crop"), None)
    assert (caught.value.code, caught.value.where) == ("shard.image-undecodable-now", "s/0")
    assert str(caught.value.got).startswith("undecodable")


def test_bytes_that_differ_from_the_indexed_ones_are_an_error(digits_shards: list[str], tmp_path: Path) -> None:
    index = index_of(digits_shards[0])
    data = bytearray(Path(digits_shards[0]).read_bytes())
    data[int(index.offset[4]) + 40] ^= 1
    changed = tmp_path / "digits-00.tar"
    changed.write_bytes(data)
    with raises("shard.changed-since-index", ShardError) as caught:
        list(indexed_samples(changed, index, DATA, where="here"))
    assert "digit-0004" in str(caught.value.where)
    assert "content_hash" in str(caught.value.got)


MEMBERS = [("a.png", PNG), ("a.cls", b"1"), ("b.png", PNG), ("b.cls", b"2"), ("c.png", b"no image")]


@pytest.mark.parametrize(
    ("members", "where", "got"),
    [
        ([*MEMBERS[:3], ("b.cls", b"3"), *MEMBERS[4:]], "here, key 'b'", r"label: 2 -> 3"),
        ([*MEMBERS[:3], ("b.txt", b"2"), *MEMBERS[4:]], "here, key 'b'", r"label: 2 -> -1"),
        ([*MEMBERS[:4], ("d.png", b"no image")], "here, key 'c'", r"key: c -> d"),
        ([*MEMBERS, ("d.cls", b"1")], "here", r"a sample 'd' beyond the 3 indexed"),
        (MEMBERS[:4], "here", r"2 samples"),
        ([*MEMBERS, ("c.PNG", b"")], "here, key 'c'", r"status: undecodable -> duplicate_key"),
        ([*MEMBERS[:2], MEMBERS[3], MEMBERS[2], *MEMBERS[4:]], "here, key 'b'", r"offset"),
        ([*MEMBERS[:4], ("c.png", b"no picture")], "here, key 'c'", r"content_hash.*size"),
    ],
    ids=["label", "no label", "key", "added", "removed", "repeated", "moved", "bad image"],
)
def test_every_change_of_a_tar_of_the_same_size_is_found(
    members: list[tuple[str, bytes]], where: str, got: str, tmp_path: Path
) -> None:
    path = tmp_path / "s.tar"
    path.write_bytes(make_tar(MEMBERS))
    index, size_bytes = index_of(str(path)), path.stat().st_size
    assert [sample.key for sample in indexed_samples(path, index, DATA, where="here")] == ["a", "b"]
    path.write_bytes(make_tar(members))
    assert path.stat().st_size == size_bytes
    with pytest.raises(ShardError) as caught:
        list(indexed_samples(path, index, DATA, where="here"))
    assert (caught.value.code, caught.value.where) == ("shard.changed-since-index", where)
    assert re.search(got, str(caught.value.got))
