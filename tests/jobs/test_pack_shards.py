"""From a folder of images to a finished cache, with the printed section of the config."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from jobs.build_cache import build_cache
from jobs.index_shards import index_shards
from jobs.pack_shards import describe, pack
from jobs.plan_cache import report
from pipeline.core.errors import ShardError
from pipeline.shards.pack_plan import PackSettings
from tests.errors import raises
from tests.jobs.conftest import Tree, config_of
from tests.pipeline.caches import digit_samples
from tests.pipeline.shards.tars import image_bytes


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """90 digits as PNG and ten JPEGs, in a folder a class, and a file that is no image."""
    root = tmp_path / "digits"
    for key, members in digit_samples(90):
        path = root / f"class {members['cls'].decode()}" / f"{key}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(members["png"])
    for number in range(10):
        (root / f"class {number}" / f"photo.{number}.JPG").write_bytes(image_bytes("JPEG", size=(30, 20 + number)))
    (root / "readme.txt").write_text("digits")
    return root


def test_a_folder_becomes_shards_that_are_indexed_and_built_from(
    folder: Path, tree: Tree, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = str(tmp_path / "packed")
    packing = pack(str(folder), out, PackSettings(shard_size=30, val_share=0.1))
    assert "skipped 1 .txt (readme.txt)" in capsys.readouterr().err
    data = yaml.safe_load(describe(packing, out))["data"]
    config = config_of(tree(data=data, train={"tail": "short"}))
    num_val = sum(len(images) for name, images in packing.shards.items() if name.startswith("val"))
    assert index_shards(config, str(tmp_path / "index")) == 100 - num_val
    # The teacher of these tests has random weights.
    assert [text for text in report(config, measured=False).warnings if "teacher.weights" not in text] == []
    manifest = build_cache(config)
    assert (manifest.num_ok, manifest.skipped) == (100 - num_val, {})
    assert config.data.num_classes == 10


def test_validation_images_of_another_folder_get_the_indexes_of_the_first(folder: Path, tmp_path: Path) -> None:
    pack(str(folder), f"{tmp_path}/train", PackSettings())
    for name in ("class 0", "class 3"):
        (folder / name).rename(tmp_path / name)
    packing = pack(
        str(folder), f"{tmp_path}/val", PackSettings(name="val"), classes_url=f"{tmp_path}/train/classes.json"
    )
    assert packing.classes == {f"class {number}": number for number in range(10)}
    labels = {image.label for images in packing.shards.values() for image in images}
    assert labels == {1, 2, 4, 5, 6, 7, 8, 9}


@pytest.mark.parametrize("text", ["[]", "{}x", '{"a": 0, "b": 2}', '{"a": "x"}'])
def test_a_file_that_is_no_list_of_classes_is_refused(folder: Path, tmp_path: Path, text: str) -> None:
    (tmp_path / "classes.json").write_text(text)
    with raises("pack.bad-classes-file", ShardError):
        pack(str(folder), f"{tmp_path}/out", PackSettings(), classes_url=f"{tmp_path}/classes.json")


def test_the_printed_pattern_names_every_shard(folder: Path, tmp_path: Path) -> None:
    out = str(tmp_path / "packed")
    packing = pack(str(folder), out, PackSettings(shard_size=7, labels="none"))
    data = yaml.safe_load(describe(packing, out))["data"]
    assert data == {"shards": f"{out}/train-{{00000..00014}}.tar", "label": None}
    assert json.loads(Path(out, "packing.json").read_text())["num_shards"] == 15
