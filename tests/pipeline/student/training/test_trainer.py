"""Training as a whole: it learns, replays exactly, resumes bitwise, and detects invalid input before it starts."""

from __future__ import annotations

import json
import threading
from itertools import count
from pathlib import Path
from typing import Any

import pytest

from pipeline.cache.ops.export_means import export_means
from pipeline.student.distributed import DistributedContext
from pipeline.student.run import checkpoint
from pipeline.student.run.metrics_files import MetricsFile
from pipeline.student.training.trainer import train
from schemas.config import Config
from tests.errors import raises
from tests.marks import slow
from tests.pipeline.caches import build, cache_section
from tests.pipeline.conftest import TinyConfig
from tests.pipeline.student.conftest import NUM_VIEWS, Replay
from tests.pipeline.student.runs import (
    ALL_TERMS,
    CE,
    KD,
    NORMALISED,
    SMALL,
    Event,
    ProcessKilledError,
    assert_bitwise,
    check_resume,
    evaluations,
    index_shards,
    losses,
    metrics,
    resumed_at,
    run,
    run_config,
    state_of,
    training_error,
)
from tests.tolerances import ulps


@pytest.mark.parametrize(
    ("mode", "terms", "epochs"),
    [slow("none", CE, 30), slow("online", KD, 12), slow("cache", KD, 12), ("cache", ALL_TERMS, 12)],
    ids=["labels", "online", "cached", "cached, all terms"],
)
def test_training_learns(replays: Replay, tmp_path: Path, mode: str, terms: list[dict[str, Any]], epochs: int) -> None:
    keys: dict[str, Any] = {"student": NORMALISED, "train": {"epochs": epochs, "lr": 0.02}}
    run(run_config(replays("crop").config, tmp_path, mode=mode, loss=terms, **keys))
    curve = losses(tmp_path)
    assert len(curve) == epochs * 5
    assert sum(curve[-5:]) < 0.7 * sum(curve[:5])


EVERY_LOSS = [
    *CE,
    *({"name": name} for name in ("kd", "dkd", "hard", "nd", "sifn", "cosine", "mse", "smooth_l1")),
    *({"name": name, "gather": True} for name in ("dist", "similarity")),
]


def test_parity_every_loss_of_a_cached_run_is_that_of_an_online_run(replays: Replay, tmp_path: Path) -> None:
    """Through projectors, whose Dropout and initial weights are equal in both runs; on mixed views."""
    cache = replays("function_matching")
    keys: dict[str, Any] = {"student": NORMALISED, "loss": EVERY_LOSS, "train": {"epochs": 4, "lr": 0.01}}
    run(run_config(cache.config, tmp_path / "cache", **keys))
    config = run_config(cache.config, tmp_path / "online", mode="online", **keys, teacher={"class_means": cache.url})
    run(config)
    assert len(metrics(tmp_path / "cache")) == 20
    for cached, online in zip(metrics(tmp_path / "cache"), metrics(tmp_path / "online"), strict=True):
        assert len(cached) == 4 + len(EVERY_LOSS)
        assert cached == pytest.approx(online, rel=training_error(config, cached["step"] + 1))


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
@pytest.mark.parametrize(
    ("stop", "first_step"), [slow(("step", 3), 0), (("step", 8), 5), slow(("eval", 2), 10)], ids=str
)
def test_parity_kill_and_resume_is_bitwise(
    replays: Replay,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    stop: tuple[str, int],
    first_step: int,
    kind: str,
    optimizer: str,
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
    check_resume(lambda url: run_config(base, url, **keys), tmp_path, stop=stop, first_step=first_step)


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
    check_resume(lambda url: run_config(base, url, **keys), tmp_path, stop=("step", 9), first_step=7)


def test_a_training_that_fails_has_ended_its_threads_before_its_error_arrives(replays: Replay, tmp_path: Path) -> None:
    """The error holds the loop's frames. A garbage collector that frees them must not wait for their threads."""
    before = {*threading.enumerate()}
    seen: list[str] = []

    def report(event: Event) -> None:
        if event["kind"] == "step":
            seen.extend(thread.name for thread in {*threading.enumerate()} - before)
            raise ProcessKilledError

    with pytest.raises(ProcessKilledError) as caught:
        train(run_config(replays("crop").config, tmp_path), report=report)
    assert any(name.startswith("look-ahead") for name in seen)
    left = [thread.name for thread in {*threading.enumerate()} - before]
    assert not [name for name in left if name.startswith(("look-ahead", "fetch"))]
    assert caught.tb is not None


def test_a_run_on_a_node_to_be_preempted_saves_before_its_next_checkpoint(
    replays: Replay, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The notice arrives after step 6, the node is lost after step 8; without a notice, nothing would be saved."""
    monkeypatch.setattr("pipeline.student.training.trainer.FLUSH_STEPS", 2)
    base = replays("crop").config
    keys: dict[str, Any] = {"train": {"epochs": 5, "checkpoint_every_epochs": 5}, "student": NORMALISED}
    run(run_config(base, tmp_path / "straight", **keys))
    preempted = run_config(base, tmp_path / "preempted", **keys)
    reported: list[Event] = []

    def report(event: Event) -> None:
        reported.append(event)
        if event.get("step") == 8:
            raise ProcessKilledError

    with pytest.raises(ProcessKilledError):
        train(preempted, DistributedContext(preemption_notice=lambda: reported[-1].get("step", 0) >= 6), report)
    assert [event["text"] for event in reported if "preempted" in event.get("text", "")] == [
        "a node will be preempted: checkpoints every 2 steps until then"
    ]
    assert resumed_at(run(preempted)) == 7
    assert_bitwise(state_of(tmp_path / "straight"), state_of(tmp_path / "preempted"))
    assert metrics(tmp_path / "preempted") == metrics(tmp_path / "straight")


def test_a_run_that_encodes_its_views_resumes_with_its_encoder_alone(
    replays: Replay, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another version is simulated by its name; a cached run reads what the build encoded."""
    base = replays("jpeg").config
    for mode, refused in (("online", True), ("cache", False)):
        config = run_config(base, tmp_path / mode, mode=mode, train={"epochs": 2})
        index_shards(config, tmp_path / mode / "index")

        def die(event: Event) -> None:
            if event.get("step") == 8:
                raise ProcessKilledError

        with monkeypatch.context() as patch:
            patch.setattr("pipeline.augment.stored_pixels.ENCODER", "torchvision 0.1")
            patch.setattr("pipeline.student.training.trainer.FLUSH_STEPS", 2)
            with pytest.raises(ProcessKilledError):
                train(config, DistributedContext(), die)
        if refused:
            with raises("run.other-encoder"):
                run(config)
        else:
            assert resumed_at(run(config)) == 5


def dies_at(function: Any, number: int) -> Any:
    """The function, but at its n-th call the process ends before it does anything."""
    calls = count(1)

    def call(*arguments: Any) -> Any:
        if next(calls) == number:
            raise ProcessKilledError
        return function(*arguments)

    return call


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
    recorded, summary = evaluations(tmp_path), checkpoint.read_summary(str(tmp_path))
    assert summary is not None
    assert [(evaluation["step"], evaluation["epoch"]) for evaluation in recorded] == [(4, 1), (9, 2)]
    assert (recorded[-1]["top1"], recorded[-1]["ece"]) == (summary["top1"], summary["ece"])


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
    assert_bitwise(state_of(tmp_path / "straight"), state_of(tmp_path / "stopped"))
    straight, resumed = (checkpoint.read_summary(str(tmp_path / name)) for name in ("straight", "stopped"))
    assert_bitwise(straight, resumed)


def test_checkpoints_are_saved_by_steps_and_some_are_never_replaced(
    replays: Replay, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Five epochs of five steps. Each permanent checkpoint is the last one at its time."""
    keys = {"epochs": 5, "checkpoint_every_epochs": 5, "checkpoint_every_steps": 4, "keep_every_epochs": 2}
    saved: list[tuple[str, int]] = []
    save = checkpoint.save

    def record(run_url: str, name: str, contents: dict[str, Any]) -> None:
        saved.append((name, contents["step"]))
        save(run_url, name, contents)

    monkeypatch.setattr(checkpoint, "save", record)
    run(run_config(replays("crop").config, tmp_path, train=keys))
    permanent = {name: step for name, step in saved if name != checkpoint.LAST}
    assert permanent == {"checkpoints/epoch-0002.pt": 10, "checkpoints/epoch-0004.pt": 20}
    assert [step for name, step in saved if name == checkpoint.LAST] == [4, 8, 10, 12, 16, 20, 24, 25]
    for name, step in permanent.items():
        assert state_of(tmp_path, name)["step"] == step


@pytest.mark.parametrize(("precision", "error", "scale"), [("bf16", 0.05, None), ("fp16", 0.01, 65536.0)])
def test_training_in_half_precision_stays_near_fp32(
    replays: Replay, tmp_path: Path, precision: str, error: float, scale: float | None
) -> None:
    for name in ("fp32", precision):
        keys = {"precision": name, "clip_norm": 1.0}
        run(run_config(replays("crop").config, tmp_path / name, train=keys))
    exact, rounded = losses(tmp_path / "fp32"), losses(tmp_path / precision)
    assert rounded != exact
    assert rounded == pytest.approx(exact, rel=error)
    records = metrics(tmp_path / precision)
    assert {record.get("scale") for record in records} == {scale}
    assert all(record["grad_norm"] > 0 for record in records)


@pytest.mark.parametrize("options", [{}, {"accumulate": 2, "precision": "fp16"}], ids=str)
def test_a_loss_that_is_not_finite_stops_with_its_step_and_without_a_checkpoint(
    replays: Replay, tmp_path: Path, options: dict[str, Any]
) -> None:
    with raises("train.not-finite-loss", exit_code=1) as caught:
        run(run_config(replays("crop").config, tmp_path, train={"lr": 1e30, "optimizer": "sgd", **options}))
    assert "seen between steps 0 and 4" in str(caught.value.where)
    assert checkpoint.load(str(tmp_path), checkpoint.LAST) is None


@pytest.mark.parametrize("options", [{}, {"ema": 0.9}, {"accumulate": 2}], ids=str)
def test_weights_that_are_not_finite_after_the_last_step_replace_no_checkpoint(
    replays: Replay, tmp_path: Path, options: dict[str, Any]
) -> None:
    """The loss of every step is finite: only the weights show what the last update did."""
    # The last micro-batch of a short step is its second, as in all others.
    num_forwards = 10 * options.get("accumulate", 1)
    model = "python:tests.pipeline.student.small_networks:Breaking"
    student = {**SMALL, "model": model, "kwargs": {"num_forwards": num_forwards}}
    keys = {"epochs": 2, "optimizer": "sgd", "lr": 0.01, "global_batch_size": 7, **options}
    with raises("train.not-finite-weights", where="changed between steps 5 and 9") as caught:
        run(run_config(replays("crop").config, tmp_path, student=student, train=keys))
    assert "shift" in str(caught.value.got)
    saved = state_of(tmp_path)
    assert saved["step"] == 5
    assert all(value.isfinite().all() for value in saved["model"].values())


def test_a_run_whose_logits_are_not_finite_has_no_accuracy(replays: Replay, tmp_path: Path) -> None:
    """One step at a huge rate leaves finite weights, whose logits are not; NaN counted as a hit gave 100 %."""
    base = replays("crop").config
    keys: dict[str, Any] = {"epochs": 1, "global_batch_size": 35, "optimizer": "sgd", "lr": 1e25}
    with raises("train.not-finite-evaluation") as caught:
        run(run_config(base, tmp_path, loss=CE, data={"val_shards": base.data.shards}, train=keys))
    assert "after step 0" in caught.value.what
    assert checkpoint.read_summary(str(tmp_path)) is None
    assert checkpoint.load(str(tmp_path), checkpoint.BEST) is None


def test_the_best_checkpoint_is_that_of_the_best_epoch(replays: Replay, tmp_path: Path) -> None:
    base = replays("crop").config
    config = run_config(base, tmp_path, loss=CE, data={"val_shards": base.data.shards}, train={"epochs": 8, "lr": 0.05})
    top1 = [event["top1"] for event in run(config) if event["kind"] == "eval"]
    summary, best = checkpoint.read_summary(str(tmp_path)), state_of(tmp_path, checkpoint.BEST)
    assert summary is not None
    assert len(top1) == 8
    assert best["best_top1"] == summary["best_top1"] == max(top1)
    # The first epoch that reached it: equal accuracy is no improvement.
    assert best["step"] == 5 * (top1.index(max(top1)) + 1)
    assert summary["top1"] == top1[-1]


def test_the_processes_of_a_run_may_change_between_its_starts_and_its_config_may_not(
    replays: Replay, tmp_path: Path
) -> None:
    base = replays("crop").config
    stopped = tmp_path / "stopped"
    run(run_config(base, tmp_path / "straight"))
    run(run_config(base, stopped), stop=("step", 2))
    with raises("run.other-config") as caught:
        train(run_config(base, stopped, train={"lr": 0.5}, loss=[*KD, *CE]))
    assert "train.lr: 0.003 -> 0.5" in str(caught.value.got)
    assert "loss: " in str(caught.value.got)
    run(run_config(base, stopped, train={"num_workers": 1}, ray={"cpus_per_worker": 1, "max_failures": 2}))
    assert metrics(stopped) == metrics(tmp_path / "straight")


def test_a_finished_run_is_left_as_it_is(replays: Replay, tmp_path: Path) -> None:
    config = run_config(replays("crop").config, tmp_path)
    run(config)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}
    assert [event["kind"] for event in run(config)] == ["finished"]
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()} == before


def test_a_refused_config_leaves_no_run_behind(replays: Replay, tmp_path: Path) -> None:
    config = run_config(replays("crop").config, tmp_path, student=NORMALISED, train={"global_batch_size": 34})
    with raises("train.batch-too-small"):
        train(config)
    assert list(tmp_path.iterdir()) == []


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
    first = 5 * NUM_VIEWS
    assert losses(tmp_path / "later")[:first] == losses(tmp_path / "straight")[:first]
    assert losses(tmp_path / "later")[first:] != losses(tmp_path / "straight")[first:]


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
    config = run_config(replays("crop").config, tmp_path, mode="none", loss=CE, data={"label": None})
    index_shards(config, tmp_path / "index")
    with raises("data.missing-labels", got="20 of 20 samples without a label"):
        train(config)


@pytest.mark.parametrize(("mode", "label"), [("cache", None), ("none", "txt")], ids=["no member is read", "no member"])
def test_without_a_single_label_a_loss_that_needs_them_is_refused_at_the_start(
    tiny_config: TinyConfig, tmp_path: Path, mode: str, label: str | None
) -> None:
    """Also where missing labels are ignored: no row could be learned from."""
    base = tiny_config(data={"label": label}, views={"kind": "crop"}, cache={"class_means": "none"})
    if mode == "cache":
        build(base)
    config = run_config(base, tmp_path / "ce", mode=mode, loss=CE, data={"missing_labels": "ignore", "label": label})
    index_shards(config, tmp_path / "ce" / "index")
    with raises("data.no-labels", got=f"{label}, in 35 samples"):
        train(config)
    assert not (tmp_path / "ce" / "config.json").exists()


def with_imported_means(base: Config, folder: Path, table: dict[str, list[float]]) -> Config:
    """A cache over the first two of the same views whose class means are this table; built."""
    (folder / "means.json").write_text(json.dumps(table))
    section = {"url": str(folder / "cache"), "class_means": str(folder / "means.json")}
    views = base.views.model_copy(update={"count": 2})
    config = base.model_copy(update={"cache": cache_section(base).model_copy(update=section), "views": views})
    build(config)
    return config


def exported_means(url: str, folder: Path) -> dict[str, list[float]]:
    export_means(url, str(folder / "out.json"), full_precision=True)
    return json.loads((folder / "out.json").read_text())


@pytest.mark.slow
@pytest.mark.parametrize("sign", [1, -1])
def test_nd_learns_from_the_means_that_were_imported(replays: Replay, tmp_path: Path, sign: int) -> None:
    base = replays("crop")
    table = {name: [sign * value for value in row] for name, row in exported_means(base.url, tmp_path).items()}
    config = with_imported_means(base.config, tmp_path, table)
    for name, trained in (("built", base.config), ("imported", config)):
        run(run_config(trained, tmp_path / name, loss=[{"name": "nd"}]))
    if sign == 1:
        assert losses(tmp_path / "imported") == losses(tmp_path / "built")
        return
    # Of one untrained student, the cosine with the opposite direction has the opposite sign.
    built, imported = losses(tmp_path / "built")[0], losses(tmp_path / "imported")[0]
    # Of each: products, norms and division of 7 numbers, and the mean of 8 rows.
    assert built + imported == pytest.approx(2, rel=0, abs=2 * ulps(3 * 7 + 6 + 8, 2))
    assert built != imported


def test_nd_refuses_imported_means_that_lack_a_class_that_occurs(replays: Replay, tmp_path: Path) -> None:
    base = replays("crop")
    table = {name: row for name, row in exported_means(base.url, tmp_path).items() if name not in ("3", "8")}
    config = with_imported_means(base.config, tmp_path, table)
    with raises("cache.missing-class-means", got="2 without a mean: 3, 8"):
        train(run_config(config, tmp_path / "nd", loss=[{"name": "nd"}]))
    run(run_config(config, tmp_path / "kd"))


@pytest.mark.parametrize(
    ("sections", "code", "got"),
    [
        ({"views": {"seed": 5}}, "cache.other-views", "seed: 0 -> 5"),
        ({"data": {"max_pixels": 10**6}}, "cache.other-reading-rules", "max_pixels: 64000000 -> 1000000"),
        ({"data": {"label_offset": 1}}, "cache.other-reading-rules", "label_offset: None -> 1"),
    ],
)
def test_a_config_that_contradicts_its_cache_is_refused(
    replays: Replay, tmp_path: Path, sections: dict[str, Any], code: str, got: str
) -> None:
    with raises(code, got=got):
        train(run_config(replays("crop").config, tmp_path, **sections))
