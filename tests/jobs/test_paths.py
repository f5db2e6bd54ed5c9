"""Bare paths become absolute, and URLs stay as they are."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import jobs
from jobs.demo import run_demo
from jobs.paths import with_absolute_paths
from jobs.recipes.document import load_recipe
from pipeline.core.config_loading import build_config
from pipeline.core.errors import ConfigError, StorageInputError
from schemas.config import Config
from tests.errors import raises


@pytest.mark.parametrize("key", ["shards", "val_shards", "cache"])
def test_one_path_or_a_list_of_them_becomes_absolute(key: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)

    def absolute(given: object) -> object:
        return getattr(with_absolute_paths(Config.model_validate({"data": {key: given}})).data, key)

    assert absolute("some/where") == f"{tmp_path}/some/where"
    assert absolute(["a", "s3://bucket/b", "/c"]) == (f"{tmp_path}/a", "s3://bucket/b", "/c")
    assert absolute(None) is None


def test_class_means_of_a_teacher_become_absolute_like_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    teacher = {"class_means": "caches/r50", "weights": "r50.pt"}
    first = with_absolute_paths(Config.model_validate({"teacher": {**teacher, "others": [teacher]}})).teacher
    for section in (first, *first.others):
        assert (section.class_means, section.weights) == (f"{tmp_path}/caches/r50", f"{tmp_path}/r50.pt")


def test_a_tilde_is_the_users_home_in_every_key_that_takes_a_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    teacher = {"weights": "~/w.pt", "class_means": "~/means"}
    tree: dict[str, Any] = {
        "data": {
            "shards": "~/{a,b}.tar",
            "val_shards": ["{~/c,~/d}.tar"],
            "cache": ["~/e", "s3://bucket/~/e"],
            "index": "~/index",
            "local_dir": "~/local",
        },
        "teacher": {**teacher, "others": [teacher]},
        "student": {"weights": "~/w.pt"},
        "cache": {"url": "~/cache", "class_means": "~/means.json"},
        "run": {"url": "~/run"},
    }
    text = with_absolute_paths(Config.model_validate(tree)).model_dump_json(exclude_unset=True)
    assert json.loads(text) == json.loads(
        json.dumps({**tree, "data": {**tree["data"], "val_shards": ["~/c.tar", "~/d.tar"]}}).replace(
            '"~', f'"{tmp_path}'
        )
    )


def test_a_folder_of_each_node_is_a_path_and_no_url() -> None:
    with pytest.raises(ConfigError) as caught:
        build_config({"data": {"local_dir": "s3://bucket/x"}}, where="config")
    assert caught.value.expected == "a local path"


def test_demo_and_recipes_take_a_tilde_and_refuse_a_url(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    recipe = str(Path(jobs.__file__).parent / "configs" / "demo.yaml")
    assert load_recipe(recipe, ["out=~/demo"]).out == tmp_path / "home" / "demo"
    with raises("recipe.invalid", ConfigError) as caught:
        load_recipe(recipe, ["out=s3://bucket/demo"])
    assert "local path" in str(caught.value.got)
    with pytest.raises(StorageInputError):
        run_demo(Path("s3://bucket/demo"))
    assert not any(tmp_path.iterdir())
