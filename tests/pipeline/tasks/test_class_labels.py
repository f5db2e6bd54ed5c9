"""Labels as names, from 1, or with other ids; the files that hold names and maps."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from pipeline.core.errors import ConfigError
from pipeline.storage.config_files import load_config
from pipeline.tasks import task_of, task_settings
from pipeline.tasks.class_labels import ClassLabels
from tests.errors import raises
from tests.pipeline.shards.tars import data_config

NAMES = ("cat", "dog", "eel")


def test_names_numbers_and_spaces_around_them_are_read() -> None:
    labels = ClassLabels.of({"classes": NAMES})
    assert [labels.find(label) for label in ("dog", " eel\n", "0", 2, "002", 7)] == [1, 2, 0, 2, 2, 7]


@pytest.mark.parametrize("label", ["Dog", "", "-1", "1.0", 1.0, True, None, ["dog"], {"dog": 1}, -1, 2**31, "٣"])
def test_other_values_are_no_labels(label: object) -> None:
    with pytest.raises(ValueError, match=r"^$"):
        ClassLabels.of({"classes": NAMES}).find(label)


def test_a_map_has_every_label_and_null_is_none() -> None:
    labels = ClassLabels.of({"classes": NAMES, "label_map": {"n1": 2, 17: "cat", "-1": None}})
    assert [labels.find(label) for label in ("n1", "17", 17, "-1", -1)] == [2, 0, 0, None, None]
    for label in ("cat", "0", "n2"):
        with pytest.raises(ValueError, match=r"^$"):
            labels.find(label)


@given(
    st.sampled_from([{}, {"label_offset": 1}, {"classes": NAMES}, {"label_map": {"a": 0, "b": 0, "c": 1, "d": 2}}]),
    st.integers(0, 2),
    st.sampled_from(["cls", "json", "json:Meta.Label"]),
)
def test_an_encoded_class_is_read_as_the_same_class(keys: dict[str, Any], index: int, member: str) -> None:
    task = task_of(data_config(num_classes=3, label=member, **keys))
    assert task.parse(task.encode(index)) == index
    assert task_of(json.loads(json.dumps(task.settings))) == task


def test_settings_have_the_keys_that_differ_from_their_defaults() -> None:
    """The settings of a numeric cache of format v1 have no others."""
    assert task_settings(data_config(num_classes=3)) == {"label": "cls", "num_classes": 3}
    keys = {"classes": NAMES, "label_map": {"n1": "eel"}}
    stored = {"label": "cls", "num_classes": 3, "classes": [*NAMES], "label_map": {"n1": 2}}
    assert task_settings(data_config(**keys)) == stored
    head = {"kind": "multilabel", "classes": [*NAMES], "num_classes": 3, "label_offset": 1}
    heads = task_settings(data_config(task="heads", label="json", heads={"tags": head}))["heads"]
    assert heads == {"tags": head}


@pytest.mark.parametrize(
    "keys",
    [
        {"classes": ["a"]},
        {"classes": ["a", "b", "a"]},
        {"classes": ["a", " b"]},
        {"classes": ["a", ""]},
        {"classes": ["a", "b"], "num_classes": 3},
        {"classes": ["1", "2"]},
        {"label_offset": -1},
        {"label_offset": 1, "label_map": {"a": 0}},
        {"label_map": {}},
        {"label_map": {"a": 3}, "num_classes": 3},
        {"label_map": {"a": -1}},
        {"label_map": {"a": "frog"}, "classes": NAMES},
        {"label_map": {"a": "cat"}, "num_classes": 3},
        {"label_map": {True: 1}},
        {"label_map": {"a": False}},
        {"label": "txt:label"},
        {"task": "heads", "label": "json", "heads": {"a": {"classes": NAMES}}, "label_offset": 1},
        {"task": "heads", "label": "json", "heads": {"a": {}}},
    ],
)
def test_forms_that_contradict_themselves_are_refused(keys: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        data_config(**keys)


def test_names_of_digits_are_those_of_their_numbers() -> None:
    assert data_config(classes=["0", "1"]).num_classes == 2
    assert task_of(data_config(classes=["1", "2"], label_offset=1)).parse({"cls": b"2"}) == 1
    assert task_of(data_config(classes=["7", "5"], label_map={"5": "5", "7": "7"})).parse({"cls": b"7"}) == 0


FILES = {
    "text": ("cat\ndog\neel\n\n", NAMES),
    "windows": ("\ufeffcat\r\ndog\r\neel", NAMES),
    "list": ('["cat", "dog", "eel"]', NAMES),
    "packing": ('{"dog": 1, "cat": 0, "eel": 2}', NAMES),
}


def _load(folder: Path, data: dict[str, Any]) -> Any:
    (folder / "config.yaml").write_text(yaml.safe_dump({"data": data}))
    return load_config(str(folder / "config.yaml")).data


@pytest.mark.parametrize("name", FILES)
def test_files_of_names_are_read_where_the_config_is_loaded(tmp_path: Path, name: str) -> None:
    text, names = FILES[name]
    path = tmp_path / "classes"
    path.write_bytes(text.encode())
    data = _load(tmp_path, {"classes": str(path)})
    assert (data.classes, data.num_classes) == (names, 3)
    data = _load(tmp_path, {"task": "heads", "label": "json", "heads": {"a": {"classes": str(path)}}})
    assert task_of(data).widths == {"logits.a": 3}


@pytest.mark.parametrize("text", ['{"n1": 2, "n2": "cat", "x": null}', "n1 2\nn2\tcat\nx null\n"])
def test_files_of_a_map_are_read(tmp_path: Path, text: str) -> None:
    (tmp_path / "map").write_text(text)
    data = _load(tmp_path, {"classes": NAMES, "label_map": str(tmp_path / "map")})
    assert data.label_map == {"n1": 2, "n2": "cat", "x": None}


@pytest.mark.parametrize("text", ['{"cam-0": "1", "cam-*": "far north"}', "cam-0 1\ncam-*\tfar north\n"])
def test_files_of_domains_are_read(tmp_path: Path, text: str) -> None:
    (tmp_path / "domains").write_text(text)
    data = _load(tmp_path, {"domain": str(tmp_path / "domains")})
    assert data.domain == {"cam-0": "1", "cam-*": "far north"}
    domains = [task_of(data).of_shard(shard).rows([None])["domain"].tolist() for shard in ("cam-0", "cam-7", "x")]
    assert domains == [["1"], ["far north"], [None]]


@pytest.mark.parametrize(
    ("key", "text", "code"),
    [
        ("domain", None, "config.label-file-unreadable"),
        ("domain", "cam-0\ncam-1 far", "config.label-file-form"),
        ("domain", '{"a": "b", "a": "c"}', "config.label-file-form"),
        ("domain", '{"a": " "}', "config.wrong-value"),
        ("domain", "", "config.wrong-value"),
        ("classes", None, "config.label-file-unreadable"),
        ("classes", '["a", ', "config.label-file-form"),
        ("classes", '{"a": 0, "b": 2}', "config.label-file-form"),
        ("classes", "a\na", "config.wrong-value"),
        ("classes", "a\n\nb", "config.wrong-value"),
        ("classes", "", "config.wrong-value"),
        ("label_map", None, "config.label-file-unreadable"),
        ("label_map", '{"a": ', "config.label-file-form"),
        ("label_map", '{"a": 0, "a": 1}', "config.label-file-form"),
        ("label_map", "n1\nn2 1", "config.label-file-form"),
        ("label_map", "a 3", "config.conflicting-values"),
        ("label_map", "", "config.wrong-value"),
    ],
)
def test_files_of_another_form_are_refused(tmp_path: Path, key: str, text: str | None, code: str) -> None:
    if text is not None:
        (tmp_path / "file").write_text(text)
    keys = {"num_classes": 3} if key == "label_map" else {}
    with raises(code, ConfigError):
        _load(tmp_path, {key: str(tmp_path / "file"), **keys})
