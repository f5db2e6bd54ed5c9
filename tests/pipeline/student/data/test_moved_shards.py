"""Shards that have moved: one error, with the option of the command by which the user passes their new location."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from jobs.build_cache import check_shards
from jobs.cache_ops import describe_verification
from jobs.index_shards import index_shards
from pipeline import storage
from pipeline.cache.ops.relabel import relabel
from pipeline.cache.verify import verify_cache
from pipeline.core.errors import StillroomError, StorageInputError
from pipeline.shards.shard_urls import new_place, report_moved
from pipeline.student.evaluation.evaluator import evaluate_run
from pipeline.student.run.checkpoint import check_same_config
from pipeline.student.training.config_checks import check_training
from pipeline.student.training.trainer import train
from schemas.config import Config
from stillroom import CachedDataset
from tests.errors import raises
from tests.pipeline.caches import TinyCache, build, cache_section, shard_urls
from tests.pipeline.conftest import tiny_config_of
from tests.pipeline.student.runs import CE, run_config

NEW = "'NEW_FOLDER/digits-{00..01}.tar'"


@pytest.fixture(scope="module")
def base(digits_shards: list[str], tmp_path_factory: pytest.TempPathFactory) -> Config:
    """Of a cache over copies of the shards in the folder ``here``."""
    folder = tmp_path_factory.mktemp("moved")
    (folder / "here").mkdir()
    shards = [shutil.copy(url, folder / "here") for url in digits_shards]
    changes = {"views": {"kind": "crop", "count": 1}, "cache": {"class_means": "none"}}
    config = tiny_config_of(shards, str(folder / "cache"), changes)
    build(config)
    return config


@contextmanager
def moved(base: Config) -> Iterator[str]:
    """Inside, the shards are in the folder ``there``, by this pattern."""
    here = Path(cache_section(base).url).with_name("here")
    there = here.rename(here.with_name("there"))
    try:
        yield f"{there}/digits-{{00..01}}.tar"
    finally:
        there.rename(here)


def assert_moved(error: StillroomError, option: str) -> None:
    assert (error.code, error.exit_code) == ("data.shards-moved", 2)
    assert error.got == "2 of 2 shards are not where they are expected"
    assert "/here/digits-0" in str(error.where)
    assert option in str(error.next_step)


def of_cache_alone(base: Config, url: Path, **data: Any) -> Config:
    config = run_config(base, url, loss=CE)
    assert config.data.cache is not None
    return config.model_copy(update={"data": type(config.data)(cache=config.data.cache, **data)})


def without_labels(base: Config) -> Config:
    return base.model_copy(update={"data": base.data.model_copy(update={"label": None})})


COMMANDS: dict[str, tuple[Callable[[Config, Path], object], str]] = {
    "train": (lambda base, folder: train(of_cache_alone(base, folder)), "append data.shards="),
    "CachedDataset": (lambda base, _: CachedDataset(cache_section(base).url, global_batch_size=8), "shards="),
    "relabel": (lambda base, _: relabel(cache_section(base).url), "append --shards "),
    "build": (lambda base, _: check_shards(cache_section(base).url, shard_urls(base), []), "append data.shards="),
    "index": (lambda base, folder: index_shards(base, str(folder)), "data.shards="),
    "index without labels": (lambda base, folder: index_shards(without_labels(base), str(folder)), "data.shards="),
}


@pytest.mark.parametrize("command", COMMANDS)
def test_each_command_names_its_option(base: Config, tmp_path: Path, command: str) -> None:
    call, option = COMMANDS[command]
    with moved(base), pytest.raises(StorageInputError) as caught:
        call(base, tmp_path)
    assert_moved(caught.value, option + NEW)


def test_a_run_continues_with_moved_shards_but_not_with_other_shards(base: Config, tmp_path: Path) -> None:
    train(of_cache_alone(base, tmp_path))
    with moved(base) as there:
        check_same_config(str(tmp_path), of_cache_alone(base, tmp_path, shards=there))
        with raises("run.other-config"):
            check_same_config(str(tmp_path), of_cache_alone(base, tmp_path, shards=there.replace("00..01", "00..00")))
        check_same_config(str(tmp_path), of_cache_alone(base, tmp_path))


def test_validation_shards_have_an_option_in_each_command(base: Config, tmp_path: Path) -> None:
    with moved(base) as there:
        config = of_cache_alone(base, tmp_path / "run", shards=there, val_shards=base.data.shards)
        for command in (check_training, train):
            with pytest.raises(StorageInputError) as caught:
                command(config)
            assert_moved(caught.value, "data.val_shards")
        assert train(of_cache_alone(base, tmp_path / "run", shards=there))["steps"] > 0
        with pytest.raises(StorageInputError) as caught:
            evaluate_run(
                str(tmp_path / "run"),
                tuple(shard_urls(base).values()),
                checkpoint_name="last",
                num_threads=1,
                device=torch.device("cpu"),
            )
    assert_moved(caught.value, f"--shards to their place now, {NEW}")


def test_a_verification_without_shards_names_its_option(base: Config) -> None:
    url = cache_section(base).url
    assert "--shards" not in describe_verification(verify_cache(url))
    with moved(base):
        report = verify_cache(url)
    assert report.ok
    assert "append --shards" in describe_verification(report)


def test_missing_files_that_are_no_shards_are_not_called_shards(built_cache: TinyCache, tmp_path: Path) -> None:
    urls = [*shard_urls(built_cache.config).values()]
    with raises("storage.missing-file"), report_moved(urls, "append --shards {}"):
        storage.size(str(tmp_path / "weights.pt"))


def test_of_very_many_shards_a_part_is_looked_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.shards.shard_urls.MAX_LOOK_UPS", 3)
    urls = [str(tmp_path / f"s-{number}.tar") for number in range(5)]
    Path(urls[1]).touch()
    got = "2 of the first 3 of 5 shards are not where they are expected"
    with raises("data.shards-moved", got=got), report_moved(urls, "append --shards {}"):
        storage.size(urls[0])


def test_new_places_are_one_quoted_pattern() -> None:
    assert new_place(["s3://b/x/a-0.tar", "s3://b/y/a-1.tar"]) == "'NEW_FOLDER/a-{0..1}.tar'"
    assert new_place(["a.tar", "b.tar"]) == "'NEW_FOLDER/{a,b}.tar'"
    assert storage.expand(new_place(["a-0.tar", "a-1.tar", "b.tar"])[1:-1]) == [
        f"NEW_FOLDER/{name}.tar" for name in ("a-0", "a-1", "b")
    ]
    assert new_place([f"{name}.tar" for name in "abcd"]) == "'NEW_FOLDER/{a,b,c,…}.tar'"
