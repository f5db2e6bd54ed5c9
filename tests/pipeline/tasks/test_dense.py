"""Samples with masks or boxes: where their targets are, and those that cannot be used."""

from __future__ import annotations

import io
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xxhash
from PIL import Image

from pipeline.core.errors import ShardError
from pipeline.shards.index import (
    STATUSES,
    IndexBuilder,
    ShardIndex,
    check_samples,
    data_keys,
    decode_index,
    encode_index,
    index_settings,
    index_shard,
)
from pipeline.shards.shard_head import read_shard_head
from pipeline.shards.tar import read_samples
from pipeline.shards.writer import Members, pack_shards
from pipeline.student.data.local_store import NodeStore
from pipeline.student.data.shard_files import ShardFiles
from pipeline.tasks import task_of
from pipeline.teacher.rendering import Rendering, indexed_samples, read_groups
from schemas.cache_format import ViewBlock
from schemas.config import DataConfig, ViewsConfig
from tests.errors import raises

SIZE = (20, 14)  # width, height


def encoded(pixels: np.ndarray, kind: str = "PNG", **keys: Any) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind, **keys)
    return buffer.getvalue()


def photograph(width: int = SIZE[0], height: int = SIZE[1], **keys: Any) -> bytes:
    return encoded(np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8), "JPEG", **keys)


def mask(value: int = 2, width: int = SIZE[0], height: int = SIZE[1]) -> bytes:
    return encoded(np.full((height, width), value, np.uint8))


def rotated() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    return photograph(exif=exif)


def boxes(*sides: list[float], label: int = 0) -> bytes:
    return json.dumps({"boxes": sides, "labels": [label] * len(sides)}).encode()


MASK_SAMPLES: dict[str, tuple[Members, str]] = {
    "good": ({"jpg": photograph(), "png": mask()}, "ok"),
    "ignored": ({"jpg": photograph(), "mask.png": mask(255)}, "ok"),
    "none": ({"jpg": photograph()}, "ok"),
    "upright": ({"jpg": rotated(), "png": mask(2, SIZE[1], SIZE[0])}, "ok"),
    "rotated": ({"jpg": rotated(), "png": mask()}, "bad_target"),
    "small": ({"jpg": photograph(), "png": mask(2, 10, 7)}, "bad_target"),
    "class": ({"jpg": photograph(), "png": mask(3)}, "bad_target"),
    "colours": ({"jpg": photograph(), "png": encoded(np.zeros((*SIZE[::-1], 3), np.uint8))}, "bad_target"),
    "truncated": ({"jpg": photograph(), "png": mask()[:45]}, "bad_target"),
    "image": ({"jpg": b"nothing", "png": mask()}, "undecodable"),
}
BOX_SAMPLES: dict[str, tuple[Members, str]] = {
    "good": ({"jpg": photograph(), "json": boxes([1, 2, 3, 4], [0, 0, 20, 14])}, "ok"),
    "empty": ({"jpg": photograph(), "json": boxes()}, "ok"),
    "none": ({"jpg": photograph()}, "ok"),
    "outside": ({"jpg": photograph(), "json": boxes([1, 2, 30, 4])}, "bad_target"),
    "no area": ({"jpg": photograph(), "json": boxes([1, 2, 0, 4])}, "bad_target"),
    "nan": ({"jpg": photograph(), "json": boxes([1, 2, float("nan"), 4])}, "bad_target"),
    "class": ({"jpg": photograph(), "json": boxes([1, 2, 3, 4], label=3)}, "bad_target"),
    "no JSON": ({"jpg": photograph(), "json": b"{"}, "bad_target"),
}
CASES = {"segmentation": MASK_SAMPLES, "detection": BOX_SAMPLES}


@pytest.fixture(params=CASES)
def shard(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, DataConfig, dict[str, Any]]:
    samples = CASES[request.param]
    (path,) = pack_shards(
        ((name.replace(" ", "-"), members) for name, (members, _) in samples.items()),
        str(tmp_path / "scenes-%d.tar"),
        shard_size=100,
    )
    data = DataConfig.model_validate({"task": request.param, "num_classes": 3, "bad_samples": "skip"})
    return Path(path), data, samples


def check(index: ShardIndex, path: Path, samples: dict[str, tuple[Members, str]]) -> None:
    tar = path.read_bytes()
    assert [STATUSES[status] for status in index.status] == [status for _, status in samples.values()]
    for row, (members, status) in enumerate(samples.values()):
        offset, size, content_hash = (int(index.targets[f"target_{name}"][row]) for name in ("offset", "size", "hash"))
        (target,) = [data for name, data in members.items() if name != "jpg"] or [None]
        if target is None:
            assert (offset, size) == (-1, -1)
        else:
            assert tar[offset : offset + size] == target
            assert content_hash == xxhash.xxh3_64_intdigest(target)
        if status == "bad_target":
            assert (index.width[row], index.height[row]) == (0, 0)
            assert index.reasons[row]


def test_an_index_has_places_and_hashes_of_targets_and_the_status_of_bad_ones(
    shard: tuple[Path, DataConfig, dict[str, Any]],
) -> None:
    path, data, samples = shard
    index = index_shard(path, data, where=str(path))
    check(index, path, samples)
    settings = index_settings(data)
    assert DataConfig.model_validate({**data_keys(settings), "bad_samples": "skip"}) == data
    stored = decode_index(encode_index(index, settings), where="index", settings=settings)
    for name, values in index.targets.items():
        assert stored.targets[name].tolist() == values.tolist()
        assert stored.targets[name].dtype == values.dtype
    assert stored.status.tolist() == index.status.tolist()
    assert stored.num_ok == [status for _, status in samples.values()].count("ok")


def test_rendering_builds_the_same_index_and_leaves_bad_targets_out(
    shard: tuple[Path, DataConfig, dict[str, Any]],
) -> None:
    path, data, samples = shard
    expected, plan = index_shard(path, data, where=str(path)), ViewsConfig(kind="scale_crop", size=8, mix_group=16)
    rendering = Rendering(
        shard_id=path.stem,
        plan=plan,
        block=ViewBlock(start=0, stop=2),
        size=8,
        interpolation="bilinear",
        task=expected.task,
        max_pixels=data.max_pixels,
    )
    builder = IndexBuilder(path.stem, expected.task)
    with ThreadPoolExecutor(1) as pool:
        groups = [*read_groups(read_samples(path, data, where="shard"), rendering, pool, builder=builder)]
        again = [*read_groups(indexed_samples(path, expected, data, where="shard"), rendering, pool, builder=None)]
    check(builder.finish(), path, samples)
    for group, same in zip(groups, again, strict=True):
        assert group.row_N.tolist() == same.row_N.tolist() == expected.ok.tolist()
        assert group.targets["target_offset"].tolist() == expected.ok_targets["target_offset"].tolist()
        assert (group.pixels_VNCHW == same.pixels_VNCHW).all()


def test_a_target_is_compared_with_its_hash_at_every_read(
    shard: tuple[Path, DataConfig, dict[str, Any]], tmp_path: Path
) -> None:
    path, data, samples = shard
    index = index_shard(path, data, where=str(path))
    row = next(iter(index.ok))
    place = tuple(int(index.targets[f"target_{name}"][row]) for name in ("offset", "size", "hash"))
    store = NodeStore.of(data.model_copy(update={"local_dir": str(tmp_path / "node")}))
    files = ShardFiles([str(path)], store, name_shards="data.shards")
    (expected,) = (content for name, content in samples["good"][0].items() if name != "jpg")
    task, target = index.task, files.target(0, place, index.task, sample_id="good")
    assert task.target_data(task.parse({task.default_member: expected})) == expected
    assert repr(target) == repr(task.decode_target(expected))
    with raises("shard.image-undecodable-now", where="good"):
        files.target(0, (place[0], 1, xxhash.xxh3_64_intdigest(expected[:1])), task, sample_id="good")
    with path.open("r+b") as file:
        file.seek(place[0] + 1)
        file.write(b"?")
    with raises("shard.target-changed", where="good"):
        files.target(0, place, task, sample_id="good")
    files.close()


def test_reasons_of_a_stored_index_are_read_again_from_the_shard(
    shard: tuple[Path, DataConfig, dict[str, Any]],
) -> None:
    path, data, samples = shard
    index = index_shard(path, data, where=str(path))
    stored = decode_index(encode_index(index, index_settings(data)), where="index")
    assert not stored.reasons
    strict = data.model_copy(update={"bad_samples": "fail"})
    messages: list[str] = []
    for each in (index, stored):
        with raises("shard.bad-samples", ShardError) as caught:
            check_samples(each, strict, where=str(path))
        messages.append(str(caught.value.got))
    num_bad = [status for _, status in samples.values()].count("bad_target")
    assert messages[0] == messages[1]
    assert f"{num_bad} bad_target" in messages[0]
    assert messages[0].count("bad_target: ") == min(num_bad, 5)


def test_a_member_that_is_the_image_is_no_target(tmp_path: Path) -> None:
    """PNG images with masks, one of which is missing."""
    pixels = np.random.default_rng(1).integers(0, 256, (14, 20, 3), np.uint8)
    samples = [("a", {"png": encoded(pixels), "mask.png": mask()}), ("b", {"png": encoded(pixels)})]
    (url,) = pack_shards(iter(samples), str(tmp_path / "scenes-%d.tar"), shard_size=9)
    data = DataConfig.model_validate({"task": "segmentation", "image": "png", "num_classes": 3})
    index = index_shard(Path(url), data, where=url)
    assert [STATUSES[status] for status in index.status] == ["ok", "ok"]
    assert index.targets["target_size"].tolist() == [len(mask()), -1]
    head = read_shard_head(url, data, size_bytes=Path(url).stat().st_size)
    assert index.task.has_target(head.targets).tolist() == [True, False]
    # A PNG without a JPEG is no image by default: it may be the mask of an image that is missing.
    by_default = DataConfig.model_validate({"task": "segmentation", "num_classes": 3})
    statuses = index_shard(Path(url), by_default, where=url).status
    assert [STATUSES[status] for status in statuses] == ["no_image", "no_image"]


def test_masks_and_boxes_may_have_a_domain(shard: tuple[Path, DataConfig, dict[str, Any]]) -> None:
    path, data, samples = shard
    with_domain = data.model_copy(update={"domain": {"scenes-*": "street"}})
    index = index_shard(path, with_domain, where=str(path))
    check(index, path, samples)
    assert {*index.targets["domain"]} == {"street"}
    (row,) = (row for row, name in enumerate(samples) if name == "class")
    stored = decode_index(encode_index(index, index_settings(with_domain)), where="index")
    with raises("shard.bad-samples", ShardError) as caught:
        check_samples(stored, with_domain.model_copy(update={"bad_samples": "fail"}), where=str(path))
    assert f"class (bad_target: {index.reasons[row]})" in str(caught.value.got)


@pytest.mark.parametrize(("keys", "dtype"), [({}, np.uint8), ({"ignore_index": 300}, np.uint16)])
@pytest.mark.parametrize("domain", [None, "domain.txt"])
def test_masks_of_views_have_one_shape_and_type(keys: dict[str, Any], dtype: type, domain: str | None) -> None:
    """Of images with a mask, whatever its bits, and without one."""
    task = task_of(DataConfig.model_validate({"task": "segmentation", "num_classes": 3, "domain": domain, **keys}))
    ignore = keys.get("ignore_index", 255)
    for type_of_png in (np.uint8, np.uint16):
        image_HW = np.array([[0, 1, 2], [2, 1, 0]], type_of_png)
        target = task.decode_target(encoded(image_HW))
        # Twice the size, two pixels below the image, and flipped.
        view_hw = task.target_of_view(target, (1, 0, 2, 3), True, (6, 4))
        shown = [[2, 2, 1, 1]] * 2 + [[0, 0, 1, 1]] * 2 + [[ignore] * 4] * 2
        assert view_hw.tolist() == shown
        assert view_hw.dtype == dtype
    none_hw = task.target_of_view(None, (1, 0, 2, 3), True, (6, 4))
    assert none_hw.tolist() == [[ignore] * 4] * 6
    assert none_hw.dtype == dtype
