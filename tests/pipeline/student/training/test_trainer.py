"""Training as a whole: it learns, replays exactly, resumes bitwise, and detects invalid input before it starts."""

from __future__ import annotations

import json
import math
import threading
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.cache.ops.export_means import export_means
from pipeline.core.errors import CacheError, ConfigError, TrainingError
from pipeline.shards.writer import pack_shards
from pipeline.student.distributed import DistributedContext
from pipeline.student.run import checkpoint
from pipeline.student.run.metrics_files import MetricsFile
from pipeline.student.training.setup import prepare
from pipeline.student.training.trainer import train
from schemas.config import Config
from tests.errors import raises
from tests.marks import slow
from tests.pipeline.caches import TinyCache, build, cache_section, digit_samples
from tests.pipeline.conftest import TinyConfig
from tests.pipeline.student.conftest import NUM_VIEWS, Replay
from tests.pipeline.student.runs import CE, KD, NORMALISED, SMALL, index_shards, metrics, run_config, training_error
from tests.tolerances import ulps

ALL_TERMS = [*CE, {"name": "kd", "temperature": 2.0, "warmup_epochs": 2}, {"name": "dist"}, {"name": "nd"}]
Event = dict[str, Any]


class ProcessKilledError(Exception):
    """Ends a training like the death of its process."""


def run(config: Config, *, stop: tuple[str, int] | None = None) -> list[Event]:
    """Trains; with ``stop`` the process dies at the n-th event of that kind. Returns what was reported."""
    assert config.run is not None
    if config.teacher.mode != "cache":
        index_shards(config, Path(config.run.url) / "index")
    events: list[Event] = []

    def report(event: Event) -> None:
        events.append(event)
        if stop is not None and sum(one["kind"] == stop[0] for one in events) == stop[1]:
            raise ProcessKilledError

    if stop is None:
        train(config, report=report)
    else:
        with pytest.raises(ProcessKilledError):
            train(config, report=report)
    return events


def first_step(events: list[Event]) -> int:
    return next(event["first_step"] for event in events if event["kind"] == "begin")


def losses(run_url: Path) -> list[float]:
    return [record["loss"] for record in metrics(run_url)]


def state(run_url: Path, name: str = checkpoint.LAST) -> dict[str, Any]:
    found = checkpoint.load(str(run_url), name)
    assert found is not None
    return found


def assert_bitwise(one: Any, other: Any, path: str = "") -> None:
    if isinstance(one, torch.Tensor):
        assert torch.equal(one, other), path
    elif isinstance(one, dict):
        assert one.keys() == other.keys(), path
        for key in one.keys() - {"seconds"}:
            assert_bitwise(one[key], other[key], f"{path}/{key}")
    elif isinstance(one, list):
        assert len(one) == len(other), path
        for place, (left, right) in enumerate(zip(one, other, strict=True)):
            assert_bitwise(left, right, f"{path}/{place}")
    else:
        assert one == other, path


@pytest.mark.parametrize(
    ("mode", "terms", "epochs"),
    [slow("none", CE, 30), slow("online", KD, 12), slow("cache", KD, 12), ("cache", ALL_TERMS, 12)],
    ids=["labels", "online", "cached", "cached, all terms"],
)
def test_training_learns(replays: Replay, tmp_path: Path, mode: str, terms: list[dict[str, Any]], epochs: int) -> None:
    config = run_config(
        replays("crop").config,
        tmp_path,
        mode=mode,
        loss=terms,
        student=NORMALISED,
        train={"epochs": epochs, "lr": 0.02},
    )
    run(config)
    curve = losses(tmp_path)
    assert len(curve) == epochs * 5
    assert sum(curve[-5:]) < 0.7 * sum(curve[:5])


EVERY_LOSS = [
    *CE,
    *({"name": name} for name in ("kd", "dkd", "hard", "nd", "sifn", "cosine", "mse")),
    {"name": "dist", "gather": True},
]


def test_parity_every_loss_of_a_cached_run_is_that_of_an_online_run(replays: Replay, tmp_path: Path) -> None:
    """Through projectors, whose Dropout and initial weights are equal in both runs; on mixed views."""
    cache = replays("function_matching")
    keys: dict[str, Any] = {"student": NORMALISED, "loss": EVERY_LOSS, "train": {"epochs": 4, "lr": 0.01}}
    run(run_config(cache.config, tmp_path / "cache", **keys))
    config = run_config(cache.config, tmp_path / "online", mode="online", **keys, teacher={"class_means": cache.url})
    run(config)
    cached, online = metrics(tmp_path / "cache"), metrics(tmp_path / "online")
    assert len(cached) == 20
    for one, other in zip(cached, online, strict=True):
        assert one.keys() == other.keys()
        assert len(one) == 4 + len(EVERY_LOSS)
        error = training_error(config, one["step"] + 1)
        for name in one:
            assert one[name] == pytest.approx(other[name], rel=error), name


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["crop", "function_matching", slow("everything")])
def test_parity_loss_of_a_cached_and_an_online_run(replays: Replay, tmp_path: Path, kind: str) -> None:
    """Over 205 steps, with different views in each epoch."""
    base = replays(kind, num_views=41).config
    student = {**NORMALISED, "size": 24} if kind == "everything" else NORMALISED
    # A slow descent: a loss near 0 is a difference of rounded logarithms, whose relative error has no bound.
    keys: dict[str, Any] = {
        "student": student,
        "train": {"epochs": 41, "optimizer": "sgd", "momentum": 0.0, "lr": 0.02},
    }
    for mode in ("cache", "online"):
        run(run_config(base, tmp_path / mode, mode=mode, **keys))
    cached, online = losses(tmp_path / "cache"), losses(tmp_path / "online")
    assert len(cached) == 205
    assert min(cached) > 1e-3
    assert max(cached) > 1.2 * min(cached)
    assert cached == pytest.approx(online, rel=training_error(run_config(base, tmp_path, **keys), 205))


@pytest.mark.parametrize(
    ("kind", "optimizer"), [slow("crop", "adamw"), ("function_matching", "adamw"), slow("function_matching", "sgd")]
)
@pytest.mark.parametrize("stop", [("step", 3), ("step", 8), slow(("eval", 2))], ids=str)
def test_parity_kill_and_resume_is_bitwise(
    replays: Replay, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop: tuple[str, int], kind: str, optimizer: str
) -> None:
    """In the middle of an epoch, at its end, and between its last step and its checkpoint; with BatchNorm, Dropout and
    a projector."""
    monkeypatch.setattr("pipeline.student.training.trainer.FLUSH_STEPS", 1)
    base = replays(kind).config
    keys: dict[str, Any] = {
        "data": {"val_shards": base.data.shards},
        "loss": ALL_TERMS,
        "student": NORMALISED,
        "train": {"epochs": 3, "optimizer": optimizer, "schedule": "cosine", "warmup_steps": 3, "clip_norm": 1.0},
    }
    run(run_config(base, tmp_path / "straight", **keys))
    stopped = run_config(base, tmp_path / "stopped", **keys)
    run(stopped, stop=stop)
    assert checkpoint.read_summary(str(tmp_path / "stopped")) is None
    events = run(stopped)
    assert first_step(events) == {("step", 3): 0, ("step", 8): 5, ("eval", 2): 10}[stop]
    for name in (checkpoint.LAST, checkpoint.BEST):
        assert_bitwise(state(tmp_path / "straight", name), state(tmp_path / "stopped", name))
    assert metrics(tmp_path / "stopped") == metrics(tmp_path / "straight")
    assert [record["step"] for record in metrics(tmp_path / "stopped")] == list(range(15))


def test_a_training_that_fails_has_ended_its_threads_before_its_error_arrives(replays: Replay, tmp_path: Path) -> None:
    """The error holds the loop's frames. A garbage collector that frees them must not wait for their threads."""
    before = {*threading.enumerate()}
    seen: list[str] = []

    def report(event: Event) -> None:
        if event["kind"] == "step":
            seen.extend(found.name for found in {*threading.enumerate()} - before)
            raise ProcessKilledError

    with pytest.raises(ProcessKilledError) as caught:
        train(run_config(replays("crop").config, tmp_path), report=report)
    assert any(name.startswith("look-ahead") for name in seen)
    left = [found.name for found in {*threading.enumerate()} - before]
    assert not [name for name in left if name.startswith(("look-ahead", "fetch"))]
    assert caught.tb is not None


@pytest.mark.parametrize(
    "options",
    [
        slow({"precision": "bf16", "ema": 0.9}),
        {"precision": "fp16", "accumulate": 2, "clip_norm": 1.0},
        slow({"optimizer": "lamb", "schedule": "step", "milestones": [1], "accumulate": 3}),
        slow({"optimizer": "rmsprop_tf", "schedule": "exponential", "decay_epochs": 0.5, "eps": 1e-3}),
        {"optimizer": "soap", "ema": 0.99, "freeze": ["conv1"], "deterministic": True},
    ],
    ids=str,
)
def test_a_resume_from_the_middle_of_an_epoch_is_bitwise_under_every_option(
    replays: Replay, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]
) -> None:
    """From a checkpoint one step into an epoch; the process had completed two more steps."""
    monkeypatch.setattr("pipeline.student.training.trainer.FLUSH_STEPS", 1)
    base = replays("function_matching").config
    # Steps of 12, 12 and 11 rows.
    train_keys = {"epochs": 5, "global_batch_size": 12, "warmup_steps": 2, "checkpoint_every_steps": 7, **options}
    keys: dict[str, Any] = {
        "data": {"val_shards": base.data.shards},
        "loss": ALL_TERMS,
        "student": NORMALISED,
        "train": train_keys,
    }
    run(run_config(base, tmp_path / "straight", **keys))
    stopped = run_config(base, tmp_path / "stopped", **keys)
    run(stopped, stop=("step", 9))
    assert first_step(run(stopped)) == 7
    for name in (checkpoint.LAST, checkpoint.BEST):
        assert_bitwise(state(tmp_path / "straight", name), state(tmp_path / "stopped", name))
    assert metrics(tmp_path / "stopped") == metrics(tmp_path / "straight")
    evaluations = [(tmp_path / name / checkpoint.EVALUATIONS).read_text() for name in ("straight", "stopped")]
    assert evaluations[0] == evaluations[1]


def test_a_run_on_a_node_to_be_preempted_saves_before_its_next_checkpoint(
    replays: Replay, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The notice arrives after step 6, the node is lost after step 8; without a notice, nothing would be saved."""
    monkeypatch.setattr("pipeline.student.training.trainer.FLUSH_STEPS", 2)
    base = replays("crop").config
    keys: dict[str, Any] = {"train": {"epochs": 5, "checkpoint_every_epochs": 5}, "student": NORMALISED}
    run(run_config(base, tmp_path / "straight", **keys))
    taken = run_config(base, tmp_path / "taken", **keys)
    reported: list[Event] = []

    def report(event: Event) -> None:
        reported.append(event)
        if event.get("step") == 8:
            raise ProcessKilledError

    with pytest.raises(ProcessKilledError):
        train(taken, DistributedContext(preemption_notice=lambda: reported[-1].get("step", 0) >= 6), report)
    assert [event["text"] for event in reported if "preempted" in event.get("text", "")] == [
        "a node will be preempted: checkpoints every 2 steps until then"
    ]
    assert first_step(run(taken)) == 7
    assert_bitwise(state(tmp_path / "straight"), state(tmp_path / "taken"))
    assert metrics(tmp_path / "taken") == metrics(tmp_path / "straight")


def test_an_evaluation_that_is_repeated_for_the_summary_is_recorded_once(
    replays: Replay, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = replays("crop").config
    config = run_config(base, tmp_path, loss=CE, data={"val_shards": base.data.shards})
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "write_summary", dies_at(checkpoint.write_summary, 1))
        with pytest.raises(ProcessKilledError):
            run(config)
    run(config)
    found = [json.loads(line) for line in (tmp_path / checkpoint.EVALUATIONS).read_text().splitlines()]
    summary = checkpoint.read_summary(str(tmp_path))
    assert summary is not None
    assert [(one["step"], one["epoch"]) for one in found] == [(4, 1), (9, 2)]
    assert (found[-1]["top1"], found[-1]["ece"]) == (summary["top1"], summary["ece"])


def test_checkpoints_are_saved_by_steps_and_some_are_never_replaced(replays: Replay, tmp_path: Path) -> None:
    """Five epochs of five steps. Each permanent checkpoint is the last one at its time."""
    base = replays("crop").config
    keys = {"epochs": 5, "checkpoint_every_epochs": 5, "checkpoint_every_steps": 4, "keep_every_epochs": 2}
    saved: list[tuple[str, int]] = []
    save = checkpoint.save

    def record(run_url: str, name: str, found: dict[str, Any]) -> None:
        saved.append((name, found["step"]))
        save(run_url, name, found)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint, "save", record)
        run(run_config(base, tmp_path, train=keys))
    kept = {name: step for name, step in saved if name != checkpoint.LAST}
    assert kept == {"checkpoints/epoch-0002.pt": 10, "checkpoints/epoch-0004.pt": 20}
    assert [step for name, step in saved if name == checkpoint.LAST] == [4, 8, 10, 12, 16, 20, 24, 25]
    for name, step in kept.items():
        assert state(tmp_path, name)["step"] == step


def test_fp16_training_stays_near_fp32_and_reports_its_scale(replays: Replay, tmp_path: Path) -> None:
    base = replays("crop").config
    for precision in ("fp32", "fp16"):
        run(run_config(base, tmp_path / precision, train={"precision": precision, "clip_norm": 1.0}))
    for one, other in zip(losses(tmp_path / "fp32"), losses(tmp_path / "fp16"), strict=True):
        assert math.isclose(one, other, rel_tol=0.01)
    assert losses(tmp_path / "fp32") != losses(tmp_path / "fp16")
    assert {record["scale"] for record in metrics(tmp_path / "fp16")} == {65536.0}
    assert all(record["grad_norm"] > 0 for record in metrics(tmp_path / "fp16"))


def test_a_loss_that_is_not_finite_is_reported_with_its_step_under_accumulation_and_fp16(
    replays: Replay, tmp_path: Path
) -> None:
    keys = {"lr": 1e30, "optimizer": "sgd", "accumulate": 2, "precision": "fp16"}
    with raises("train.not-finite-loss") as caught:
        run(run_config(replays("crop").config, tmp_path, train=keys))
    assert "seen between steps 0 and 4" in str(caught.value.where)


@pytest.mark.slow
@pytest.mark.parametrize(("module", "name"), [(MetricsFile, "publish"), (checkpoint, "write_summary")])
def test_a_run_killed_while_it_writes_loses_nothing_and_repeats_nothing(
    replays: Replay, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: Any, name: str
) -> None:
    base = replays("crop").config
    run(run_config(base, tmp_path / "straight"))
    stopped = run_config(base, tmp_path / "stopped")
    with monkeypatch.context() as patch:
        patch.setattr(module, name, dies_at(getattr(module, name), 2 if name == "publish" else 1))
        with pytest.raises(ProcessKilledError):
            run(stopped)
    run(stopped)
    assert metrics(tmp_path / "stopped") == metrics(tmp_path / "straight")
    assert_bitwise(state(tmp_path / "straight"), state(tmp_path / "stopped"))
    one, other = (checkpoint.read_summary(str(tmp_path / name)) for name in ("straight", "stopped"))
    assert_bitwise(one, other)


def dies_at(function: Any, number: int) -> Any:
    """The function, but at its n-th call the process ends before it does anything."""
    calls = count(1)

    def call(*arguments: Any) -> Any:
        if next(calls) == number:
            raise ProcessKilledError
        return function(*arguments)

    return call


def test_loader_processes_may_change_between_the_starts_of_a_run(replays: Replay, tmp_path: Path) -> None:
    base = replays("crop").config
    run(run_config(base, tmp_path / "straight"))
    run(run_config(base, tmp_path / "stopped"), stop=("step", 2))
    run(run_config(base, tmp_path / "stopped", train={"num_workers": 1}, ray={"cpus_per_worker": 1, "max_failures": 2}))
    assert metrics(tmp_path / "stopped") == metrics(tmp_path / "straight")


def test_a_finished_run_is_left_as_it_is(replays: Replay, tmp_path: Path) -> None:
    config = run_config(replays("crop").config, tmp_path)
    run(config)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}
    assert [event["kind"] for event in run(config)] == ["finished"]
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()} == before


def test_a_run_resumes_only_with_the_config_it_was_started_with(replays: Replay, tmp_path: Path) -> None:
    base = replays("crop").config
    run(run_config(base, tmp_path), stop=("step", 1))
    with raises("run.other-config") as caught:
        train(run_config(base, tmp_path, train={"lr": 0.5}, loss=[*KD, *CE]))
    assert "train.lr: 0.003 -> 0.5" in str(caught.value.got)
    assert "loss: " in str(caught.value.got)


def test_a_refused_config_leaves_no_run_behind(replays: Replay, tmp_path: Path) -> None:
    base = replays("crop").config
    with raises("train.batch-too-small"):
        train(run_config(base, tmp_path, student=NORMALISED, train={"global_batch_size": 34}))
    assert list(tmp_path.iterdir()) == []
    run(run_config(base, tmp_path))


def test_a_batch_too_small_for_the_ranks_that_may_join_later_is_refused_at_the_start(
    replays: Replay, tmp_path: Path
) -> None:
    ranks = {"num_workers": 2, "min_workers": 1}
    config = run_config(replays("crop").config, tmp_path, student=NORMALISED, train={"global_batch_size": 8}, ray=ranks)
    with raises("train.batch-too-small") as caught:
        train(config)
    assert caught.value.got == "1 of its 3 rows, over 2 ranks"


def test_one_row_is_enough_for_a_student_without_batchnorm(replays: Replay, tmp_path: Path) -> None:
    run(run_config(replays("crop").config, tmp_path, train={"global_batch_size": 34}))
    assert len(losses(tmp_path)) == 4


def test_a_projector_needs_two_rows_like_any_batchnorm(replays: Replay, tmp_path: Path) -> None:
    config = run_config(replays("crop").config, tmp_path, loss=ALL_TERMS, train={"global_batch_size": 34})
    with raises("train.batch-too-small") as caught:
        train(config)
    assert caught.value.where == "step 1 of 2 of every epoch"
    assert caught.value.got == "1 of its 1 rows, over 1 ranks"
    assert "train.tail: drop" in str(caught.value.next_step)


@pytest.mark.parametrize("rank", range(2))
@pytest.mark.parametrize(
    ("student", "batch", "got"),
    [(NORMALISED, 8, "1 of its 3 rows, over 2 ranks"), (SMALL, 34, "0 of its 1 rows, over 2 ranks")],
    ids=["one row under BatchNorm", "no row at all"],
)
def test_a_rank_with_too_few_rows_stops_every_rank_before_it_waits(
    replays: Replay, tmp_path: Path, rank: int, student: dict[str, Any], batch: int, got: str
) -> None:
    """The last step has the remainder of 35 rows."""
    config = run_config(replays("crop").config, tmp_path, student=student, train={"global_batch_size": batch})
    with raises("train.batch-too-small") as caught:
        prepare(config, DistributedContext(rank, 2))
    assert caught.value.got == got


def test_ordinary_batches_of_one_row_a_rank_are_refused_under_batchnorm(replays: Replay, tmp_path: Path) -> None:
    config = run_config(
        replays("crop").config, tmp_path, student=NORMALISED, train={"global_batch_size": 5, "tail": "drop"}
    )
    with raises("train.batch-too-small") as caught:
        prepare(config, DistributedContext(0, 5))
    assert caught.value.got == "1 of its 5 rows, over 5 ranks"
    assert "train.tail" not in str(caught.value.next_step)


@pytest.mark.slow
def test_a_run_uses_the_views_it_was_started_with_when_its_cache_grows(replay_copy: Replay, tmp_path: Path) -> None:
    cache = replay_copy("crop")
    keys: dict[str, Any] = {"train": {"epochs": NUM_VIEWS + 2}}
    run(run_config(cache.config, tmp_path / "straight", **keys))
    run(run_config(cache.config, tmp_path / "grown", **keys), stop=("step", 2))
    more = cache.config.views.model_copy(update={"count": NUM_VIEWS + 2})
    build(cache.config.model_copy(update={"views": more}))
    run(run_config(cache.config, tmp_path / "grown", **keys))
    assert metrics(tmp_path / "grown") == metrics(tmp_path / "straight")
    run(run_config(cache.config, tmp_path / "later", **keys))
    assert losses(tmp_path / "later")[:60] == losses(tmp_path / "straight")[:60]
    assert losses(tmp_path / "later")[60:] != losses(tmp_path / "straight")[60:]


@pytest.mark.slow
def test_a_rank_that_opened_a_later_state_of_the_cache_takes_the_one_that_was_pinned(
    replay_copy: Replay, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = replay_copy("crop")
    keys: dict[str, Any] = {"train": {"epochs": NUM_VIEWS + 1}}
    run(run_config(cache.config, tmp_path / "alone", **keys))
    first_rank = (Path(cache.url) / "manifest.json").read_bytes()
    build(cache.config.model_copy(update={"views": cache.config.views.model_copy(update={"count": NUM_VIEWS + 1})}))

    def claim(run_url: str, config: Config) -> None:
        """After this rank opened the cache and before its claim, another rank pins the state that it opened."""
        claim_run(run_url, config)
        checkpoint.pin_manifests(run_url, [first_rank])

    claim_run = checkpoint.claim_run
    monkeypatch.setattr(checkpoint, "claim_run", claim)
    run(run_config(cache.config, tmp_path / "raced", **keys))
    assert metrics(tmp_path / "raced") == metrics(tmp_path / "alone")


def test_missing_labels_are_found_before_the_first_step(replays: Replay, tmp_path: Path) -> None:
    base = replays("crop").config
    config = run_config(base, tmp_path, mode="none", loss=CE, data={"label": None})
    index_shards(config, tmp_path / "index")
    with raises("data.missing-labels") as caught:
        train(config)
    assert caught.value.got == "20 of 20 samples without a label"


def test_missing_labels_in_a_cache_stop_the_losses_that_need_them(replay_copy: Replay, tmp_path: Path) -> None:
    base = replay_copy("crop").config
    sections: dict[str, Any] = {"data": {"label": None}, "cache": {"url": str(tmp_path / "c"), "class_means": "none"}}
    tree = base.model_dump(mode="json", exclude_unset=True)
    unlabelled = Config.model_validate({**tree, **{key: {**tree[key], **keys} for key, keys in sections.items()}})
    build(unlabelled)
    with raises("data.no-labels"):
        train(run_config(unlabelled, tmp_path / "ce", loss=CE))
    run(run_config(unlabelled, tmp_path / "kd"))


@pytest.mark.parametrize("label", [None, "txt"], ids=["no member is read", "no sample has the member"])
@pytest.mark.parametrize("mode", ["cache", "none"])
def test_without_a_single_label_a_loss_that_needs_them_is_refused_at_the_start(
    tiny_config: TinyConfig, tmp_path: Path, mode: str, label: str | None
) -> None:
    """Also where missing labels are ignored: no row could be learned from."""
    base = tiny_config(data={"label": label}, views={"kind": "crop"}, cache={"class_means": "none"})
    if mode == "cache":
        build(base)
    config = run_config(base, tmp_path / "ce", mode=mode, loss=[*CE], data={"missing_labels": "ignore", "label": label})
    index_shards(config, tmp_path / "ce" / "index")
    with raises("data.no-labels") as caught:
        train(config)
    assert caught.value.got == f"{label}, in 35 samples"
    assert not (tmp_path / "ce" / "config.json").exists()


def test_labels_of_a_few_are_enough_where_missing_ones_are_ignored(tiny_config: TinyConfig, tmp_path: Path) -> None:
    samples = (
        (key, {name: data for name, data in members.items() if name == "png" or row % 5 == 4})
        for row, (key, members) in enumerate(digit_samples(35))
    )
    shards = pack_shards(samples, f"{tmp_path}/few-%02d.tar", shard_size=20)
    base = tiny_config(
        data={"shards": shards, "missing_labels": "ignore"}, views={"kind": "crop"}, cache={"class_means": "none"}
    )
    build(base)
    run(run_config(base, tmp_path / "run", loss=[*CE, *KD]))
    assert any(record["loss/ce"] > 1 for record in metrics(tmp_path / "run"))


def with_imported_means(base: Config, folder: Path, table: dict[str, list[float]]) -> Config:
    """A cache over the same views whose class means are this table; built."""
    (folder / "means.json").write_text(json.dumps(table))
    section = {"url": str(folder / "cache"), "class_means": str(folder / "means.json")}
    config = base.model_copy(update={"cache": cache_section(base).model_copy(update=section)})
    build(config)
    return config


@pytest.mark.slow
def test_nd_learns_the_same_from_exported_and_imported_means(replays: Replay, tmp_path: Path) -> None:
    base, out = replays("function_matching"), tmp_path / "out.json"
    export_means(base.url, str(out), full_precision=True)
    config = with_imported_means(base.config, tmp_path, json.loads(out.read_text()))
    terms = [{"name": "nd"}, *KD]
    run(run_config(base.config, tmp_path / "own", loss=terms))
    run(run_config(config, tmp_path / "imported", loss=terms))
    assert losses(tmp_path / "imported") == losses(tmp_path / "own")


@pytest.mark.slow
def test_nd_learns_from_the_means_that_were_imported(replays: Replay, tmp_path: Path) -> None:
    base, out = replays("crop"), tmp_path / "out.json"
    export_means(base.url, str(out), full_precision=True)
    reversed_table = {name: [-value for value in row] for name, row in json.loads(out.read_text()).items()}
    config = with_imported_means(base.config, tmp_path, reversed_table)
    terms = [{"name": "nd"}]
    run(run_config(base.config, tmp_path / "own", loss=terms))
    run(run_config(config, tmp_path / "imported", loss=terms))
    # Of one untrained student, the cosine with the opposite direction has the opposite sign.
    own, imported = losses(tmp_path / "own")[0], losses(tmp_path / "imported")[0]
    # Of each: products, norms and division of 7 numbers, and the mean of 8 rows.
    assert own + imported == pytest.approx(2, rel=0, abs=2 * ulps(3 * 7 + 6 + 8, 2))
    assert own != imported


def test_nd_refuses_imported_means_that_lack_a_class_that_occurs(replays: Replay, tmp_path: Path) -> None:
    base, out = replays("crop"), tmp_path / "out.json"
    export_means(base.url, str(out), full_precision=True)
    table = {name: row for name, row in json.loads(out.read_text()).items() if name not in ("3", "8")}
    config = with_imported_means(base.config, tmp_path, table)
    with pytest.raises(CacheError) as caught:
        train(run_config(config, tmp_path / "nd", loss=[{"name": "nd"}]))
    assert (caught.value.code, caught.value.got) == ("cache.missing-class-means", "2 without a mean: 3, 8")
    run(run_config(config, tmp_path / "kd"))


@pytest.mark.parametrize(
    ("mode", "terms", "code"),
    [
        ("none", KD, "config.loss-needs-teacher"),
        ("none", [{"name": "nd"}], "config.loss-needs-teacher"),
        ("online", [{"name": "nd"}], "config.no-class-means"),
    ],
)
def test_a_loss_that_this_teacher_cannot_serve_is_refused(
    replays: Replay, tmp_path: Path, mode: str, terms: list[dict[str, Any]], code: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        train(run_config(replays("crop").config, tmp_path, mode=mode, loss=terms))
    assert caught.value.code == code


def test_views_that_are_not_the_caches_are_refused(replays: Replay, tmp_path: Path) -> None:
    for kind, views, got in (
        ("crop", {"seed": 5}, "seed: 0 -> 5"),
        ("everything", {"jitter": {"probability": 0.8, "hue": 0.1}}, "jitter.hue: 0.2 -> 0.1"),
    ):
        with pytest.raises(CacheError) as caught:
            train(run_config(replays(kind).config, tmp_path, views=views))
        assert (caught.value.code, caught.value.got) == ("cache.other-views", got)


def test_reading_rules_that_are_not_the_caches_are_refused(replays: Replay, tmp_path: Path) -> None:
    with pytest.raises(CacheError) as caught:
        train(run_config(replays("crop").config, tmp_path, data={"max_pixels": 10**6}))
    assert caught.value.code == "cache.other-reading-rules"
    assert "max_pixels: 64000000 -> 1000000" in str(caught.value.got)


def test_a_loss_that_is_not_finite_stops_with_its_step_and_without_a_checkpoint(
    replays: Replay, tmp_path: Path
) -> None:
    config = run_config(replays("crop").config, tmp_path, train={"lr": 1e30, "optimizer": "sgd"})
    with raises("train.not-finite-loss") as caught:
        run(config)
    assert "seen between steps 0 and 4" in str(caught.value.where)
    assert caught.value.exit_code == 1
    assert checkpoint.load(str(tmp_path), checkpoint.LAST) is None


@pytest.mark.parametrize("options", [{}, {"ema": 0.9}, {"accumulate": 2}], ids=str)
def test_weights_that_are_not_finite_after_the_last_step_replace_no_checkpoint(
    replays: Replay, tmp_path: Path, options: dict[str, Any]
) -> None:
    """The loss of every step is finite: only the weights show what the last update did."""
    num_forwards = 10 * options.get("accumulate", 1)
    student = {**SMALL, "model": "python:tests.pipeline.student.small_networks:Breaking"}
    keys: dict[str, Any] = {"epochs": 2, "optimizer": "sgd", "lr": 0.01, **options}
    # The last micro-batch of a short step is its second, as in all others.
    config = run_config(
        replays("crop").config,
        tmp_path,
        student={**student, "kwargs": {"num_forwards": num_forwards}},
        train={**keys, "global_batch_size": 7},
    )
    with pytest.raises(TrainingError) as caught:
        run(config)
    assert caught.value.code == "train.not-finite-weights"
    assert caught.value.where == "changed between steps 5 and 9"
    assert "shift" in str(caught.value.got)
    found = state(tmp_path)
    assert found["step"] == 5
    assert all(value.isfinite().all() for value in found["model"].values())


def test_a_run_whose_logits_are_not_finite_has_no_accuracy(replays: Replay, tmp_path: Path) -> None:
    """One step at a huge rate leaves finite weights, whose logits are not; NaN counted as a hit gave 100 %."""
    base = replays("crop").config
    keys: dict[str, Any] = {"epochs": 1, "global_batch_size": 35, "optimizer": "sgd", "lr": 1e25}
    config = run_config(base, tmp_path, loss=CE, data={"val_shards": base.data.shards}, train=keys)
    with pytest.raises(TrainingError) as caught:
        run(config)
    assert caught.value.code == "train.not-finite-evaluation"
    assert "after step 0" in caught.value.what
    assert checkpoint.read_summary(str(tmp_path)) is None
    assert checkpoint.load(str(tmp_path), checkpoint.BEST) is None


def test_the_best_checkpoint_is_that_of_the_best_epoch(replays: Replay, tmp_path: Path) -> None:
    base = replays("crop").config
    config = run_config(base, tmp_path, loss=CE, data={"val_shards": base.data.shards}, train={"epochs": 8, "lr": 0.05})
    events = run(config)
    top1 = [event["top1"] for event in events if event["kind"] == "eval"]
    summary = checkpoint.read_summary(str(tmp_path))
    assert summary is not None
    best = state(tmp_path, checkpoint.BEST)
    assert len(top1) == 8
    assert best["best_top1"] == summary["best_top1"] == max(top1)
    # The first epoch that reached it: equal accuracy is no improvement.
    assert best["step"] == 5 * (top1.index(max(top1)) + 1)
    assert summary["top1"] == top1[-1]


def test_bf16_training_stays_near_fp32(replays: Replay, tmp_path: Path) -> None:
    base = replays("crop").config
    for precision in ("fp32", "bf16"):
        run(run_config(base, tmp_path / precision, train={"precision": precision}))
    for one, other in zip(losses(tmp_path / "fp32"), losses(tmp_path / "bf16"), strict=True):
        assert math.isclose(one, other, rel_tol=0.05)
    assert losses(tmp_path / "fp32") != losses(tmp_path / "bf16")


def test_the_same_config_gives_the_same_run(replays: Replay, tmp_path: Path) -> None:
    base: TinyCache = replays("crop")
    torch.manual_seed(1)
    run(run_config(base.config, tmp_path / "one", student=NORMALISED, loss=ALL_TERMS))
    torch.manual_seed(2)
    run(run_config(base.config, tmp_path / "two", student=NORMALISED, loss=ALL_TERMS))
    assert_bitwise(state(tmp_path / "one"), state(tmp_path / "two"))
