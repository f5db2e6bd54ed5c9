"""Derivations by Ray tasks have the bytes of a plain loop; a killed command leaves no cache, and continues."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from jobs.build_cache import build_cache
from jobs.cache_derive import average_main, convert_cache, main, merge_main
from jobs.cli import app
from pipeline.cache.format import layout
from pipeline.cache.verify import compare_with_sources, verify_cache
from pipeline.core.errors import ConfigError
from schemas.config import RayConfig
from tests.errors import raises
from tests.jobs.conftest import JsonLog, Tree, config_of, files_below
from tests.pipeline.caches import files
from tests.ranks import forked

INT8 = {"logits": "int8"}


@pytest.fixture
def cache(tree: Tree, tmp_path: Path) -> Path:
    """96 images in four shards, with two views and an eval pass."""
    build_cache(config_of(tree(cache={"logits": "fp32", "views_per_part": 1}, views={"count": 2})))
    return tmp_path / "cache"


@pytest.mark.usefixtures("ray_cluster")
def test_tasks_give_the_bytes_of_a_loop(cache: Path, tmp_path: Path) -> None:
    for name, address in (("loop", "none"), ("tasks", "auto")):
        convert_cache(str(cache), str(tmp_path / name), RayConfig.model_validate({"address": address}), encodings=INT8)
    assert files_below(tmp_path / "tasks") == files_below(tmp_path / "loop")
    assert verify_cache(str(tmp_path / "tasks")).ok


def test_the_command_says_what_was_converted_and_from_what(cache: Path, tmp_path: Path, json_log: JsonLog) -> None:
    options = {"views": "0-0", "shards": "digits-{00..01}.tar"}
    main(str(cache), str(tmp_path / "new"), [], encodings=INT8, **options)
    (end,) = [event for event in json_log() if event["event"] == "end"]
    assert (end["num_views"], end["num_shards"], end["num_ok"]) == (1, 2, 48)


def test_merged_shards_are_one_cache(cache: Path, tmp_path: Path, json_log: JsonLog) -> None:
    for name, shards in (("a", "digits-{00..01}.tar"), ("b", "digits-{02..03}.tar")):
        main(str(cache), str(tmp_path / name), [], encodings={}, views=None, shards=shards)
    merge_main([str(tmp_path / "a"), "ray.cpus_per_task=1", str(tmp_path / "b")], str(tmp_path / "out"))
    end = [event for event in json_log() if event["event"] == "end"][-1]
    assert (end["num_views"], end["num_shards"], end["num_ok"]) == (2, 4, 96)


def test_an_average_of_a_teacher_with_itself_in_another_encoding_is_of_that_teacher(
    cache: Path, tmp_path: Path, json_log: JsonLog
) -> None:
    main(str(cache), str(tmp_path / "int8"), [], encodings=INT8, views=None, shards=None)
    urls = [str(cache), str(tmp_path / "int8")]
    keys: dict[str, Any] = {"weights": "3,1", "logits": "fp32"}
    average_main(urls, str(tmp_path / "out"), probabilities=True, temperature=2.0, **keys)
    events = json_log()
    end = [event for event in events if event["event"] == "end"][-1]
    assert (end["num_views"], end["num_ok"], end["class_means"]) == (2, 96, None)
    left_out = {event["kind"]: event["count"] for event in events if event["event"] == "omitted"}
    assert left_out == {"class means": 2, "eval pass": 2}
    with raises("config.average-temperature"):
        average_main(urls, str(tmp_path / "no"), probabilities=True, temperature=None, **keys)
    with raises("config.average-weights"):
        average_main(urls, str(tmp_path / "no"), probabilities=False, temperature=None, weights="3;1", logits="fp32")


def test_wrong_options_are_refused(cache: Path, tmp_path: Path) -> None:
    url, new = str(cache), str(tmp_path / "new")
    for code, encodings, views, overrides in (
        ("config.only-ray-keys", INT8, None, ["cache.logits=int8"]),
        ("config.wrong-value", {"logits": "int7"}, None, []),
        ("config.nothing-to-convert", {"logits": "auto"}, None, []),
        ("config.views-range", INT8, "1-1", []),
        ("config.views-range", INT8, "3", []),
    ):
        with raises(code, ConfigError):
            main(url, new, overrides, encodings=encodings, views=views, shards=None)
    assert not Path(new).exists()


def run_and_die(arguments: list[str], path: str) -> None:
    """``stillroom`` with SIGKILL at the moment when a file whose path contains ``path`` is complete under a temporary
    name, and about to be published."""

    def kill(event: str, names: tuple[Any, ...]) -> None:
        if event in ("os.rename", "os.link") and path in str(names[1]):
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(kill)
    app(arguments)


def exit_code_of(arguments: list[str], path: str) -> int | None:
    process = forked().Process(target=run_and_die, args=(arguments, path))
    process.start()
    process.join(120)
    return process.exitcode


@pytest.mark.slow
@pytest.mark.parametrize(
    ("command", "sources", "options"),
    [
        ("convert", ["cache"], ["{out}", "--logits", "fp16"]),
        ("merge", ["first", "last"], ["--out", "{out}"]),
        ("average", ["cache", "int8"], ["--out", "{out}", "--weights", "3,1", "--logits", "int8"]),
    ],
)
def test_a_killed_command_leaves_no_cache_and_continues_to_the_same_bytes(
    cache: Path, tmp_path: Path, command: str, sources: list[str], options: list[str]
) -> None:
    for name, shards in (("first", "digits-{00..01}.tar"), ("last", "digits-{02..03}.tar")):
        main(str(cache), str(tmp_path / name), [], encodings={}, views=None, shards=shards)
    main(str(cache), str(tmp_path / "int8"), [], encodings=INT8, views=None, shards=None)
    urls = [str(tmp_path / name) for name in sources]

    def arguments(out: Path) -> list[str]:
        return ["cache", command, *urls, *(option.format(out=out) for option in options)]

    whole, target = tmp_path / "whole", tmp_path / "killed"
    assert CliRunner().invoke(app, arguments(whole)).exit_code == 0
    for number, folder in enumerate(("parts", "commits"), start=1):
        assert exit_code_of(arguments(target), f"killed/{folder}/digits-0{number}/v0001") == -signal.SIGKILL
        finished = {path.stem for path in target.glob(f"commits/digits-0{number}/*.json")}
        assert finished - {"eval"} == {"v0000-0000"}
        assert [*target.rglob(".tmp-*")]
        assert not (target / layout.MANIFEST).exists()
    assert CliRunner().invoke(app, arguments(target)).exit_code == 0
    # Without the temporary files of killed writers.
    assert files(str(target)) == files(str(whole))
    report = verify_cache(str(target))
    compare_with_sources(str(target), urls, report)
    assert report.ok, report.problems
