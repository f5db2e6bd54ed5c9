"""Validation samples are checked before the first step; a failing evaluation loses no step."""

from __future__ import annotations

import logging
import os
import tarfile
from pathlib import Path
from typing import Any

import pytest

from jobs.run_ops import evaluate
from pipeline.core.errors import ShardError, StorageInputError
from pipeline.shards.writer import pack_shards
from pipeline.student.distributed import DistributedContext
from pipeline.student.evaluation.evaluator import build_evaluator
from pipeline.student.evaluation.validation import read_validation
from pipeline.student.run import checkpoint
from pipeline.student.training.trainer import train
from schemas.config import Config, RunConfig
from tests.errors import raises
from tests.pipeline.caches import digit_samples
from tests.pipeline.student.conftest import Replay
from tests.pipeline.student.runs import (
    CE,
    evaluations,
    index_shards,
    metrics,
    run_config,
    state_of,
    summary_of,
    train_until,
)

Event = dict[str, Any]


def shard(folder: Path, *, junk: int = 0, unlabelled: int = 0, label: bytes | None = None) -> str:
    """Twelve digits outside the training set; some have a broken image, or another label or none."""
    folder.mkdir(exist_ok=True)
    samples = [members for row, (_, members) in enumerate(digit_samples(52)) if row >= 40]
    for row in range(junk):
        samples[row] = {**samples[row], "png": b"junk"}
    for row in range(12 - unlabelled, 12):
        samples[row] = {"png": samples[row]["png"]}
    if label is not None:
        samples[5] = {**samples[5], "cls": label}
    named = ((f"held-out-{row:02d}", members) for row, members in enumerate(samples))
    (url,) = pack_shards(named, f"{folder}/val-%02d.tar", shard_size=12)
    return url


def run(config: Config) -> list[Event]:
    events: list[Event] = []
    train(config, report=events.append)
    return events


def texts(events: list[Event]) -> list[str]:
    """Warnings about validation."""
    return [event["text"] for event in events if event.get("text", "").startswith("validation: ")]


@pytest.fixture
def config(replays: Replay, tmp_path: Path) -> Config:
    """Two epochs of five steps; an evaluation after each."""
    return run_config(replays("crop").config, tmp_path / "run", loss=CE)


def changed(config: Config, **data: Any) -> Config:
    return config.model_copy(update={"data": config.data.model_copy(update=data)})


@pytest.mark.parametrize(
    ("fault", "text", "epochs"), [({"junk": 1}, "undecodable", 0), ({"label": b"77"}, "77", 1)], ids=str
)
def test_a_bad_validation_sample_is_refused_before_the_first_step(
    config: Config, tmp_path: Path, fault: dict[str, Any], text: str, epochs: int
) -> None:
    config = changed(config, val_shards=shard(tmp_path / "val", **fault))
    config = config.model_copy(update={"train": config.train.model_copy(update={"eval_every_epochs": epochs})})
    events: list[Event] = []
    with pytest.raises(ShardError) as caught:
        train(config, report=events.append)
    assert caught.value.exit_code == 2
    assert "val-00.tar" in str(caught.value.where)
    assert text in f"{caught.value.what} {caught.value.got}"
    assert events == []
    assert not (tmp_path / "run").exists()


def test_bad_validation_samples_are_left_out_with_their_number_and_reason(config: Config, tmp_path: Path) -> None:
    url = shard(tmp_path / "val", junk=2)
    config = changed(config, val_shards=url, bad_samples="skip", max_bad_share=0.5)
    events = run(config)
    assert "validation: 2 of 12 samples are left out: 2 undecodable" in texts(events)
    assert [event["num_rows"] for event in events if event["kind"] == "eval"] == [10, 10]


def test_shards_without_a_usable_image_are_refused(config: Config, tmp_path: Path) -> None:
    url = shard(tmp_path / "val", junk=12)
    with raises("data.no-validation-images") as caught:
        run(changed(config, val_shards=url, bad_samples="skip", max_bad_share=1.0))
    assert "12 samples" in str(caught.value.got)


def stop_at(config: Config, step: int) -> list[Event]:
    return train_until(config, lambda event: event.get("step", -1) >= step)


def test_validation_is_read_once_in_a_run_unless_it_changes(config: Config, tmp_path: Path) -> None:
    config = changed(config, val_shards=shard(tmp_path / "val"))
    first = [event for event in stop_at(config, 4) if event["kind"] == "validation"]
    assert [(event["samples"], event["shards"]) for event in first] == [(12, 1)]
    assert not [event for event in stop_at(config, 9) if event["kind"] == "validation"]
    assert config.data.val_shards is not None
    os.utime(str(config.data.val_shards), (1, 1))
    (again,) = [event for event in run(config) if event["kind"] == "validation"]
    assert again["samples"] == 12


def test_a_shard_that_breaks_between_two_starts_is_refused_at_the_second(config: Config, tmp_path: Path) -> None:
    """The rule for bad samples may change in a run, so that the run can continue."""
    config = changed(config, val_shards=shard(tmp_path / "val"))
    stop_at(config, 4)
    before = (tmp_path / "run" / checkpoint.LAST).exists()
    shard(tmp_path / "val", junk=1)
    with raises("shard.bad-samples"):
        run(config)
    assert (tmp_path / "run" / checkpoint.LAST).exists() == before
    events = run(changed(config, bad_samples="skip", max_bad_share=0.1))
    assert [event["num_rows"] for event in events if event["kind"] == "eval"][-1] == 11


def outcome(run_url: Path) -> dict[str, Any]:
    """The summary without its seconds."""
    return {name: value for name, value in summary_of(run_url).items() if name != "seconds"}


def test_an_evaluation_that_fails_loses_no_step_and_runs_at_the_next_start(config: Config, tmp_path: Path) -> None:
    url, hidden = Path(shard(tmp_path / "val")), tmp_path / "hidden.tar"
    config = changed(config, val_shards=str(url))
    run(config.model_copy(update={"run": RunConfig(url=str(tmp_path / "undisturbed"))}))
    starts: list[list[Event]] = []
    for epoch in (1, 2):
        events: list[Event] = []

        def report(event: Event, events: list[Event] = events, epoch: int = epoch) -> None:
            """The store loses the shard in the last step of an epoch."""
            events.append(event)
            if event.get("step") == 5 * epoch - 1:
                url.rename(hidden)

        with pytest.raises(StorageInputError):
            train(config, report=report)
        starts.append(events)
        assert state_of(tmp_path / "run")["step"] == 5 * epoch
        assert checkpoint.read_summary(str(tmp_path / "run")) is None
        hidden.rename(url)
    starts.append(run(config))
    assert [[event["first_step"] for event in events if event["kind"] == "begin"] for events in starts] == [
        [0],
        [5],
        [10],
    ]
    assert [[event["epoch"] for event in events if event["kind"] == "eval"] for events in starts] == [[], [1], [2]]
    assert evaluations(tmp_path / "run") == evaluations(tmp_path / "undisturbed")
    assert metrics(tmp_path / "run") == metrics(tmp_path / "undisturbed")
    assert outcome(tmp_path / "run") == outcome(tmp_path / "undisturbed")


def test_validation_without_labels_and_teacher_warns_and_selects_no_best_checkpoint(
    config: Config, tmp_path: Path
) -> None:
    events = run(changed(config, val_shards=shard(tmp_path / "val", unlabelled=12)))
    (text,) = texts(events)
    assert text.startswith("validation: labels: 0 of 12 samples")
    assert "there will be no checkpoints/best.pt" in text
    summary = summary_of(tmp_path / "run")
    assert (summary["top1"], summary["best_metric"], summary["best_value"]) == (None, None, None)
    assert checkpoint.load(str(tmp_path / "run"), checkpoint.BEST) is None


def test_missing_labels_are_counted(config: Config, tmp_path: Path) -> None:
    url = shard(tmp_path / "val", unlabelled=3)
    evaluator = build_evaluator(url, config.data, config.views, DistributedContext(), num_threads=1)
    samples = read_validation(evaluator, str(tmp_path / "run"))
    (text,) = samples.warnings(head_trained=True, best_by=None)
    assert text.startswith("validation: labels: 9 of 12 samples")


def test_without_labels_the_best_checkpoint_is_that_of_the_best_agreement(replays: Replay, tmp_path: Path) -> None:
    base, url = replays("crop").config, shard(tmp_path / "val", unlabelled=12)
    keys: dict[str, Any] = {"data": {"val_shards": url}, "train": {"epochs": 6, "lr": 0.05}}
    config = run_config(base, tmp_path / "run", mode="online", **keys)
    index_shards(config, tmp_path / "run" / "index")
    (text,) = texts(run(config))
    assert "checkpoints/best.pt follows the agreement with the teacher" in text
    agreement = [line["agreement"] for line in evaluations(tmp_path / "run")]
    assert len({*agreement}) > 1
    best, summary = state_of(tmp_path / "run", checkpoint.BEST), summary_of(tmp_path / "run")
    assert best["step"] == 5 * (agreement.index(max(agreement)) + 1)
    assert best["best"] == {"metric": "agreement", "value": max(agreement)}
    assert (summary["best_metric"], summary["best_value"], summary["best_top1"]) == ("agreement", max(agreement), None)


def test_members_that_are_left_out_of_validation_shards_are_reported_with_counts(
    config: Config, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    url = shard(tmp_path / "val", junk=1)
    with tarfile.open(url, "a") as tar:
        for name in ("._a.png", "._b.png"):
            tar.addfile(tarfile.TarInfo(name))
    config = changed(config, val_shards=url, bad_samples="skip", max_bad_share=0.5)
    hidden = "left out 2 hidden members (._a.png, ._b.png)"
    assert f"validation: {hidden}" in texts(run(config))
    assert (tmp_path / "run" / "validation.json").is_file()
    (tmp_path / "run" / checkpoint.SUMMARY).unlink()
    # From the record of the first start.
    assert f"validation: {hidden}" in texts(run(config))
    with caplog.at_level(logging.WARNING):
        evaluate(str(tmp_path / "run"), url)
    assert f"evaluate: {hidden}" in caplog.text
    assert "evaluate: left out 1 undecodable samples" in caplog.text
