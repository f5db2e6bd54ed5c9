"""Shards that have moved: one error, with the option of the command by which the user passes their new location."""

from __future__ import annotations

import shutil
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
from pipeline.core.errors import ConfigError, StillroomError, StorageInputError
from pipeline.shards.shard_urls import new_place, report_moved
from pipeline.student.evaluation.evaluator import evaluate_run
from pipeline.student.run.checkpoint import check_same_config
from pipeline.student.training.config_checks import check_training
from pipeline.student.training.trainer import train
from schemas.config import Config
from stillroom import CachedDataset
from tests.pipeline.caches import TinyCache, build, cache_section, shard_urls
from tests.pipeline.conftest import TinyConfig
from tests.pipeline.student.runs import CE, run_config

NEW = "'NEW_FOLDER/digits-{00..01}.tar'"
ALL = "2 of 2 shards are not where they are expected"


@pytest.fixture
def base(tiny_config: TinyConfig, digits_shards: list[str], tmp_path: Path) -> Config:
    """Of a cache whose shards can be moved."""
    here = tmp_path / "here"
    here.mkdir()
    config = tiny_config(
        data={"shards": [shutil.copy(url, here) for url in digits_shards]},
        views={"kind": "crop", "count": 1},
        cache={"class_means": "none"},
    )
    build(config)
    return config


def moved(tmp_path: Path) -> str:
    (tmp_path / "here").rename(tmp_path / "there")
    return f"{tmp_path}/there/digits-{{00..01}}.tar"


def assert_moved(error: StillroomError, tmp_path: Path, *, got: str, option: str) -> None:
    assert (error.code, error.exit_code, error.got) == ("data.shards-moved", 2, got)
    assert error.where is not None
    assert error.where.startswith(f"{tmp_path}/here/digits-0")
    assert error.next_step is not None
    assert option in error.next_step


def of_cache_alone(base: Config, url: Path, **data: Any) -> Config:
    config = run_config(base, url, loss=CE)
    assert config.data.cache is not None
    return config.model_copy(update={"data": type(config.data)(cache=config.data.cache, **data)})


def test_training_from_a_cache_names_data_shards_and_continues_from_the_new_place(base: Config, tmp_path: Path) -> None:
    there = moved(tmp_path)
    with pytest.raises(StorageInputError) as caught:
        train(of_cache_alone(base, tmp_path / "run"))
    assert_moved(caught.value, tmp_path, got=ALL, option=f"append data.shards={NEW}")
    assert train(of_cache_alone(base, tmp_path / "run", shards=there))["steps"] > 0


def test_a_run_continues_with_moved_shards_but_not_with_other_shards(base: Config, tmp_path: Path) -> None:
    run = tmp_path / "run"
    train(of_cache_alone(base, run))
    there = moved(tmp_path)
    check_same_config(str(run), of_cache_alone(base, run, shards=there))
    with pytest.raises(ConfigError) as caught:
        check_same_config(str(run), of_cache_alone(base, run, shards=there.replace("00..01", "00..00")))
    assert caught.value.code == "run.other-config"
    check_same_config(str(run), of_cache_alone(base, run))


def test_a_dataset_names_its_own_option(base: Config, tmp_path: Path) -> None:
    (tmp_path / "here" / "digits-01.tar").unlink()
    with pytest.raises(StorageInputError) as caught:
        CachedDataset(cache_section(base).url, global_batch_size=8)
    got = "1 of 2 shards are not where they are expected"
    assert_moved(caught.value, tmp_path, got=got, option=f"shards={NEW}")


def test_relabelling_names_its_own_option(base: Config, tmp_path: Path) -> None:
    moved(tmp_path)
    with pytest.raises(StorageInputError) as caught:
        relabel(cache_section(base).url)
    assert_moved(caught.value, tmp_path, got=ALL, option=f"append --shards {NEW}")


def test_a_build_names_data_shards(base: Config, tmp_path: Path) -> None:
    moved(tmp_path)
    with pytest.raises(StorageInputError) as caught:
        check_shards(cache_section(base).url, shard_urls(base), [])
    assert_moved(caught.value, tmp_path, got=ALL, option=f"append data.shards={NEW}")


def test_validation_shards_have_an_option_in_each_command(base: Config, tmp_path: Path) -> None:
    there = moved(tmp_path)
    config = of_cache_alone(base, tmp_path / "run", shards=there, val_shards=base.data.shards)
    for command in (check_training, train):
        with pytest.raises(StorageInputError) as caught:
            command(config)
        assert_moved(caught.value, tmp_path, got=ALL, option="data.val_shards")
    train(of_cache_alone(base, tmp_path / "run", shards=there))
    with pytest.raises(StorageInputError) as caught:
        evaluate_run(
            str(tmp_path / "run"),
            tuple(shard_urls(base).values()),
            checkpoint_name="last",
            num_threads=1,
            device=torch.device("cpu"),
        )
    assert_moved(caught.value, tmp_path, got=ALL, option=f"--shards to their place now, {NEW}")


def test_a_verification_without_shards_names_its_option(base: Config, tmp_path: Path) -> None:
    url = cache_section(base).url
    assert "--shards" not in describe_verification(verify_cache(url))
    moved(tmp_path)
    report = verify_cache(url)
    assert report.ok
    assert "append --shards" in describe_verification(report)


@pytest.mark.parametrize("label", ["cls", None])
def test_an_index_names_the_option(base: Config, tmp_path: Path, label: str | None) -> None:
    moved(tmp_path)
    config = base.model_copy(update={"data": base.data.model_copy(update={"label": label})})
    with pytest.raises(StorageInputError) as caught:
        index_shards(config, str(tmp_path / "index"))
    assert_moved(caught.value, tmp_path, got=ALL, option=f"data.shards={NEW}")


def test_missing_files_that_are_no_shards_are_not_called_shards(built_cache: TinyCache, tmp_path: Path) -> None:
    urls = [*shard_urls(built_cache.config).values()]
    with pytest.raises(StorageInputError) as caught, report_moved(urls, "append --shards {}"):
        storage.size(str(tmp_path / "weights.pt"))
    assert caught.value.code == "storage.missing-file"


def test_of_very_many_shards_a_part_is_looked_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.shards.shard_urls.MAX_LOOK_UPS", 3)
    urls = [str(tmp_path / f"s-{number}.tar") for number in range(5)]
    Path(urls[1]).touch()
    with pytest.raises(StorageInputError) as caught, report_moved(urls, "append --shards {}"):
        storage.size(urls[0])
    assert caught.value.got == "2 of the first 3 of 5 shards are not where they are expected"


def test_new_places_are_one_quoted_pattern() -> None:
    assert new_place(["s3://b/x/a-0.tar", "s3://b/y/a-1.tar"]) == "'NEW_FOLDER/a-{0..1}.tar'"
    assert new_place(["a.tar", "b.tar"]) == "'NEW_FOLDER/{a,b}.tar'"
    assert storage.expand(new_place(["a-0.tar", "a-1.tar", "b.tar"])[1:-1]) == [
        f"NEW_FOLDER/{name}.tar" for name in ("a-0", "a-1", "b")
    ]
    assert new_place([f"{name}.tar" for name in "abcd"]) == "'NEW_FOLDER/{a,b,c,…}.tar'"
