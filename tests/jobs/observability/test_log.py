"""Plain lines and JSON objects of the log."""

from __future__ import annotations

import logging
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from jobs.build_cache import build_cache
from jobs.entry import run_command
from jobs.observability.log import emit
from pipeline.core.errors import ConfigError, ShardError
from tests.jobs.conftest import JsonLog, Tree, config_of


def test_plain_lines_have_the_text_alone_and_leave_out_finished_tasks(capsys: pytest.CaptureFixture[str]) -> None:
    emit("a part is done", event="done", level=logging.DEBUG, shard="a")
    emit("the cache is done", event="end", parts=3)
    captured = capsys.readouterr()
    assert (captured.err, captured.out) == ("the cache is done\n", "")


def test_json_lines_have_all_levels_and_fields(json_log: JsonLog) -> None:
    emit("two\nlines", event="done", level=logging.DEBUG, shard="a", where=Path("b"))
    (event,) = json_log()
    at = datetime.fromisoformat(event.pop("time"))
    assert timedelta(0) <= datetime.now(UTC) - at < timedelta(minutes=1)
    assert event == {"level": "debug", "event": "done", "message": "two\nlines", "shard": "a", "where": "b"}


def test_the_error_that_ends_a_command_is_an_object_too(json_log: JsonLog) -> None:
    def command() -> None:
        raise ConfigError("no such key", where="train.lrr", next_step="correct it")

    assert run_command(command) == 2
    (event,) = json_log()
    assert (event["level"], event["event"], event["exit_code"]) == ("error", "error", 2)
    assert "train.lrr" in event["message"]


def test_a_build_with_a_damaged_shard_publishes_no_manifest_and_logs_each_part_once(
    tree: Tree, shards: list[str], tmp_path: Path, json_log: JsonLog
) -> None:
    truncated = tmp_path / "cut.tar"
    truncated.write_bytes(Path(shards[0]).read_bytes()[:5000])
    with pytest.raises(ShardError) as caught:
        build_cache(config_of(tree(data={"shards": [*shards[1:], str(truncated)]})))
    assert "cut.tar" in str(caught.value)
    assert not (tmp_path / "cache" / "manifest.json").exists()
    assert not list((tmp_path / "cache").glob("*/cut*"))
    events = json_log()
    parts = {(item["shard"], item["part"]): item["event"] for item in events if "part" in item}
    blocks = ("eval", "v0000-0001", "v0002-0002")
    good = {(f"digits-0{number}", block): "done" for number in (1, 2, 3) for block in blocks}
    assert parts == {**good, **{("cut", block): "failed" for block in blocks}}
    assert len([item for item in events if "part" in item]) == 12
    assert {item["attempt"] for item in events if "part" in item} == {1}
    assert all(item["node"] for item in events if "part" in item)
    (summary,) = [item for item in events if item["event"] == "summary"]
    # Three shards of 24 images, their evaluation view and three crops.
    assert (summary["parts"], summary["failed"], summary["images"]) == (9, 3, 3 * 24 * 4)
    assert summary["size_bytes"] == sum(path.stat().st_size for path in (tmp_path / "cache").glob("parts/*/*"))
