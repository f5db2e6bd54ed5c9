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


def tree_of(prefix: str) -> dict[str, Any]:
    """A config in which every key that takes a path has one with this prefix."""
    teacher = {"weights": f"{prefix}w.pt", "class_means": f"{prefix}means", "text_head": f"{prefix}head.safetensors"}
    return {
        "data": {
            "shards": f"{prefix}{{a,b}}.tar",
            "val_shards": [f"{prefix}c.tar", "s3://bucket/~/d.tar"],
            "cache": [f"{prefix}e", "s3://bucket/~/f", "/g"],
            "index": f"{prefix}index",
            "local_dir": f"{prefix}local",
        },
        "teacher": {**teacher, "others": [teacher]},
        "student": {"weights": f"{prefix}w.pt"},
        "cache": {"url": f"{prefix}cache", "class_means": f"{prefix}means.json"},
        "run": {"url": f"{prefix}run"},
    }


@pytest.mark.parametrize("prefix", ["", "some/where/", "~/"])
def test_every_path_becomes_absolute_a_tilde_is_the_users_home_and_urls_stay(
    prefix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    folder = f"{tmp_path}/{prefix}".replace("~", "home")
    text = with_absolute_paths(Config.model_validate(tree_of(prefix))).model_dump_json(exclude_unset=True)
    assert json.loads(text) == tree_of(folder)


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
