"""Lines for people, objects for machines."""

from __future__ import annotations

import json
import logging
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from jobs.build_cache import build_cache
from jobs.entry import run_command
from jobs.observability.log import emit
from pipeline.core.errors import ConfigError, ShardError
from tests.jobs.conftest import Tree, config_of

Captured = pytest.CaptureFixture[str]


def objects(captured: Captured) -> list[dict[str, Any]]:
    """Every line of standard error as JSON."""
    return [json.loads(line) for line in captured.readouterr().err.splitlines()]


@pytest.fixture
def as_json(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STILLROOM_LOG", "json")


def test_people_are_told_the_text_alone_and_not_of_every_task(capsys: Captured) -> None:
    emit("a part is done", event="done", level=logging.DEBUG, shard="a")
    emit("the cache is done", event="end", parts=3)
    captured = capsys.readouterr()
    assert (captured.err, captured.out) == ("the cache is done\n", "")


@pytest.mark.usefixtures("as_json")
def test_machines_are_told_everything_an_object_a_line(capsys: Captured) -> None:
    emit("two\nlines", event="done", level=logging.DEBUG, shard="a", where=Path("b"))
    (told,) = objects(capsys)
    at = datetime.fromisoformat(told.pop("time"))
    assert timedelta(0) <= datetime.now(UTC) - at < timedelta(minutes=1)
    assert told == {"level": "debug", "event": "done", "message": "two\nlines", "shard": "a", "where": "b"}


@pytest.mark.usefixtures("as_json")
def test_the_error_that_ends_a_command_is_an_object_too(capsys: Captured) -> None:
    def command() -> None:
        raise ConfigError("no such key", where="train.lrr", next_step="correct it")

    assert run_command(command) == 2
    (told,) = objects(capsys)
    assert (told["level"], told["event"], told["exit_code"]) == ("error", "error", 2)
    assert "train.lrr" in told["message"]


@pytest.mark.usefixtures("as_json")
def test_a_build_tells_of_each_part_once_and_names_the_shard_that_failed(
    tree: Tree, shards: list[str], tmp_path: Path, capsys: Captured
) -> None:
    cut = tmp_path / "cut.tar"
    cut.write_bytes(Path(shards[0]).read_bytes()[:5000])
    with pytest.raises(ShardError):
        build_cache(config_of(tree(data={"shards": [*shards[1:], str(cut)]})))
    told = objects(capsys)
    parts = {(item["shard"], item["part"]): item["event"] for item in told if "part" in item}
    blocks = ("eval", "v0000-0001", "v0002-0002")
    good = {(f"digits-0{number}", block): "done" for number in (1, 2, 3) for block in blocks}
    assert parts == {**good, **{("cut", block): "failed" for block in blocks}}
    assert len([item for item in told if "part" in item]) == 12
    assert {item["attempt"] for item in told if "part" in item} == {1}
    assert all(item["node"] for item in told if "part" in item)
    (summary,) = [item for item in told if item["event"] == "summary"]
    # Three shards of 24 images, their evaluation view and three crops.
    assert (summary["parts"], summary["failed"], summary["images"]) == (9, 3, 3 * 24 * 4)
    assert summary["size_bytes"] == sum(path.stat().st_size for path in (tmp_path / "cache").glob("parts/*/*"))
