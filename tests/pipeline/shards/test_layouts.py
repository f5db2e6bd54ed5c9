"""Every row of the table in docs/how-to/your-layout.md, from three writers; and the errors that name its lines."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import webdataset
import yaml

from pipeline.shards.index import data_keys, decode_index, encode_index, index_settings, index_shard
from pipeline.shards.labels import LabelCount, check_label_member
from pipeline.shards.shard_head import read_shard_head
from pipeline.tasks import task_of
from schemas.config import DataConfig
from tests.errors import raises
from tests.pipeline.shards.tars import data_config, image_bytes, make_tar

PAGE = Path(__file__).resolve().parents[3] / "docs" / "how-to" / "your-layout.md"
_ROW = re.compile(r"\| (?P<members>`.+`) \| `(?P<data>\{.*\})` \| (?P<label>\w+) \|")
_IMAGE = {name: image_bytes(form) for name, form in (("jpg", "JPEG"), ("jpeg", "JPEG"), ("png", "PNG"))}
Members = dict[str, bytes]


def _members(cell: str) -> Members:
    named = re.findall(r"`([^`]+)`(?: = `([^`]+)`)?", cell)
    return {name: text.encode() or _IMAGE[name.lower().rpartition(".")[2]] for name, text in named}


ROWS = [match.groupdict() for match in map(_ROW.fullmatch, PAGE.read_text().splitlines()) if match]


def _by_tarfile(path: Path, members: Members) -> None:
    path.write_bytes(make_tar(members.items()))


def _by_tar(path: Path, members: Members) -> None:
    folder = path.parent / "members"
    folder.mkdir()
    for name, content in members.items():
        (folder / name).write_bytes(content)
    subprocess.run(["tar", "-cf", str(path), "-C", str(folder), "."], check=True)


def _by_webdataset(path: Path, members: Members) -> None:
    keys = {name.split(".")[0] for name in members}
    (key,) = keys
    sample = {name.split(".", 1)[1]: content for name, content in members.items()}
    with webdataset.TarWriter(str(path), encoder=False) as writer:
        writer.write({"__key__": key, **sample})


def _label(path: Path, data: DataConfig) -> int | None:
    """Read as a build does, and again from the stored index by the rules that it names."""
    head = read_shard_head(str(path), data, size_bytes=path.stat().st_size)
    settings = index_settings(data)
    assert index_settings(DataConfig.model_validate(data_keys(settings))) == settings
    index = decode_index(encode_index(index_shard(path, data, where=str(path)), settings), where="x", settings=settings)
    assert index.num_ok == head.num_samples == 1
    label = int(index.targets["label"][0])
    assert [label] == head.targets["label"].tolist()
    return None if label == -1 else label


_DENSE_ROW = re.compile(r"\| (?P<members>`.+`) \| `(?P<data>\{.*\})` \| `0001\.(?P<target>[a-z.]+)` \|")
DENSE_ROWS = [match.groupdict() for match in map(_DENSE_ROW.fullmatch, PAGE.read_text().splitlines()) if match]


def test_the_tables_have_rows() -> None:
    assert len(ROWS) + len(DENSE_ROWS) == PAGE.read_text().count("\n| `")
    assert len(ROWS) > len(DENSE_ROWS) > 0


@pytest.mark.parametrize("row", DENSE_ROWS, ids=lambda row: f"{row['members']} {row['data']}")
def test_masks_and_boxes_are_read_by_the_lines_of_the_table(tmp_path: Path, row: Mapping[str, str]) -> None:
    target = b'{"boxes": [[0, 0, 7, 5]], "labels": [3]}' if row["target"] == "json" else image_bytes(mode="L")
    members = {f"0001.{row['target']}": target}
    for name in {*re.findall(r"`([^`]+)`", row["members"])} - {*members}:
        members[name] = image_bytes("JPEG" if name.endswith("jpg") else name.rpartition(".")[2])
    path = tmp_path / "s.tar"
    path.write_bytes(make_tar(sorted(members.items())))
    keys = yaml.safe_load(row["data"])
    data = DataConfig.model_validate({**keys, "num_classes": 256} if keys["task"] == "segmentation" else keys)
    index = index_shard(path, data, where=str(path))
    offset, size = int(index.targets["target_offset"][0]), int(index.targets["target_size"][0])
    assert (index.num_ok, path.read_bytes()[offset : offset + size]) == (1, target)


@pytest.mark.parametrize("write", [_by_tarfile, _by_tar, _by_webdataset])
@pytest.mark.parametrize("row", ROWS, ids=lambda row: row["data"])
def test_every_layout_of_the_table_is_read_by_its_lines(
    tmp_path: Path, row: Mapping[str, str], write: Callable[[Path, Members], None]
) -> None:
    path = tmp_path / "a.tar"
    write(path, _members(row["members"]))
    label = _label(path, DataConfig.model_validate(yaml.safe_load(row["data"])))
    assert str(label).lower() == row["label"]


def test_the_heads_of_the_page_read_names() -> None:
    (block,) = re.findall(r"```yaml\n# 0001.json: (.+)\n((?:.+\n)+)```", PAGE.read_text())
    task = task_of(DataConfig.model_validate(yaml.safe_load(block[1])["data"]))
    target = task.parse({"json": block[0].encode()})
    assert target == (1, (0, 1))
    assert task.parse(task.encode(target)) == target
    assert task_of(json.loads(json.dumps({**task.settings, "task": "heads"}))) == task


def _shard(tmp_path: Path, extension: str, texts: list[str], image: str = "jpg") -> Path:
    path = tmp_path / "a.tar"
    pairs = [
        member
        for number, text in enumerate(texts)
        for member in ((f"{number}.{image}", _IMAGE["jpg"]), (f"{number}.{extension}", text.encode()))
    ]
    path.write_bytes(make_tar(pairs))
    return path


def _check(path: Path, data: DataConfig) -> None:
    head = read_shard_head(str(path), data, size_bytes=path.stat().st_size)
    check_label_member(LabelCount.of_heads([head], data), data, where="x")
    index_shard(path, data, where=str(path))


# Extension and texts of the labels, keys of the config; code, a part of the next step that the config takes as keys.
CORRECTED: dict[str, tuple[str, list[str], dict[str, Any], str, dict[str, Any]]] = {
    "txt": ("txt", ["0", "1"], {}, "data.label-not-found", {"label": "txt"}),
    "field": ("json", ['{"label": 1, "width": 0}'] * 2, {}, "data.label-not-found", {"label": "json:label"}),
    "object": ("json", ['{"label": 1}'] * 2, {"label": "json"}, "data.label-not-found", {"label": "json:label"}),
    "typing error": ("json", ['{"a": {"y": 1}}'], {"label": "json:a.z"}, "data.label-not-found", {"label": "json:a.y"}),
    "from one": ("cls", ["1", "2", "3"], {}, "shard.bad-label", {"label_offset": 1}),
    "more": ("cls", ["0", "2", "4"], {}, "shard.bad-label", {"num_classes": 5}),
}


@pytest.mark.parametrize("name", CORRECTED)
def test_the_next_step_of_an_error_reads_the_shard(tmp_path: Path, name: str) -> None:
    extension, texts, keys, code, correction = CORRECTED[name]
    path = _shard(tmp_path, extension, texts)
    keys = {"num_classes": 3, **keys}
    with raises(code) as caught:
        _check(path, data_config(**keys))
    ((key, value),) = correction.items()
    assert f"data.{key}={value}" in str(caught.value.next_step)
    _check(path, data_config(**{**keys, **correction}))


def test_names_in_a_field_need_classes(tmp_path: Path) -> None:
    path = _shard(tmp_path, "json", ['{"label": "cat"}', '{"label": "dog"}'])
    with raises("shard.bad-label") as caught:
        _check(path, data_config(num_classes=2, label="json:label"))
    assert "data.classes" in str(caught.value.next_step)
    _check(path, data_config(classes=["cat", "dog"], label="json:label"))


@pytest.mark.parametrize("label", ["json", "JSON:Mata"])
def test_the_object_with_the_fields_of_heads_is_named(tmp_path: Path, label: str) -> None:
    path = _shard(tmp_path, "json", ['{"Meta": {"color": 1}}', '{"Meta": {"color": null}}'])
    keys: dict[str, Any] = {"task": "heads", "heads": {"color": {"num_classes": 2}}}
    with raises("data.label-not-found") as caught:
        _check(path, data_config(label=label, **keys))
    assert "data.label=json:Meta, " in str(caught.value.next_step)
    _check(path, data_config(label="json:Meta", **keys))


def test_members_are_named_with_counts_where_none_is_an_image(tmp_path: Path) -> None:
    path = _shard(tmp_path, "cls", ["0", "1"], image="input.jpg")
    got, next_step = "2 samples; members seen: 2 input.jpg, 2 cls", "set data.image=input.jpg"
    with raises("shard.no-samples", got=got, next_step=next_step):
        _check(path, data_config(num_classes=2))
    _check(path, data_config(num_classes=2, image="input.jpg"))


def test_labels_that_are_not_in_the_map_are_counted(tmp_path: Path) -> None:
    path = _shard(tmp_path, "cls", ["a", "x", "b", "y", "y"])
    with raises("shard.bad-label") as caught:
        _check(path, data_config(num_classes=2, label_map={"a": 0, "b": 1}))
    assert caught.value.got == "'x'; in this shard 3 of 5 labels are such: 'y' (2), 'x' (1)"
    assert "data.label_map" in str(caught.value.next_step)


def test_unknown_names_of_a_head_are_counted(tmp_path: Path) -> None:
    data = data_config(task="heads", label="json", heads={"color": {"classes": ["red", "blue"]}})
    path = _shard(tmp_path, "json", ['{"color": "red"}', '{"color": "rde"}', '{"color": "rde"}'])
    with raises("shard.bad-label") as caught:
        _check(path, data)
    assert str(caught.value.got).endswith("2 of 3 labels are such: 'rde' (2)")
    assert "data.heads.color.classes" in str(caught.value.next_step)
