"""Bare paths become absolute, and URLs stay as they are."""

from __future__ import annotations

from pathlib import Path

import pytest

from jobs.paths import with_absolute_paths
from schemas.config import Config


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
    found = with_absolute_paths(Config.model_validate({"teacher": {**teacher, "others": [teacher]}})).teacher
    for one in (found, *found.others):
        assert (one.class_means, one.weights) == (f"{tmp_path}/caches/r50", f"{tmp_path}/r50.pt")
