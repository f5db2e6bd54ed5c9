"""Trainings and evaluations by domain, and the metric that selects the best checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from jobs.run_ops import describe_evaluation
from pipeline.student.run.metrics_files import published_evaluation
from pipeline.student.training.config_checks import check_config
from pipeline.student.training.trainer import train
from schemas.config import Config
from tests.errors import raises
from tests.pipeline.caches import TinyCache, build, cache_section
from tests.pipeline.domains import CAMERAS, camera_of, cameras_config
from tests.pipeline.student.runs import CE, KD, evaluated, evaluations, run, run_config, state_of, summary_of
from tests.ranks import group, run_two_ranks

WORST = "worst_domain/top1"


@pytest.fixture(scope="module")
def cache(built_cache: TinyCache, tmp_path_factory: pytest.TempPathFactory) -> TinyCache:
    """Of 30 images, each fifth of which is in no domain. Never written to."""
    config = cameras_config(built_cache.config, tmp_path_factory.mktemp("cameras"))
    build(config)
    return TinyCache(cache_section(config).url, config)


def config_of(cache: TinyCache, url: Path, **sections: Any) -> Config:
    data = {"val_shards": cache.config.data.shards, **sections.pop("data", {})}
    loss = sections.pop("loss", CE)
    return run_config(cache.config, url, data=data, loss=loss, **sections)


def test_a_run_measures_each_domain_and_selects_by_the_worst(cache: TinyCache, tmp_path: Path) -> None:
    train = {"best": WORST, "tensorboard": True, "epochs": 3, "lr": 0.02}
    config = config_of(cache, tmp_path / "run", train=train)
    events = run(config)
    lines = evaluations(tmp_path / "run")
    cameras = [camera_of(row) for row in range(30)]
    for line in lines:
        domains = line["by_domain"]
        assert {name: values["num_rows"] for name, values in domains.items()} == {
            name: cameras.count(name) for name in sorted(CAMERAS)
        }
        assert line[WORST] == min(values["top1"] for values in domains.values())
    assert [event["by_domain"] for event in events if event["kind"] == "eval"] == [line["by_domain"] for line in lines]
    best = max(range(3), key=lambda number: (lines[number][WORST], -number))
    assert state_of(tmp_path / "run", "checkpoints/best.pt")["step"] == lines[best]["step"] + 1
    summary = summary_of(tmp_path / "run")
    assert (summary["best_metric"], summary["best_value"]) == (WORST, lines[best][WORST])
    assert summary["by_domain"] == lines[-1]["by_domain"]
    (without_domain,) = [
        event["text"] for event in events if event["kind"] == "warning" and "no domain" in event["text"]
    ]
    assert f"{cameras.count(None)} of 30" in without_domain
    (board,) = (tmp_path / "run" / "tensorboard").iterdir()
    accumulator = EventAccumulator(str(board)).Reload()
    values = [event.value for event in accumulator.Scalars("eval/domain/north/top1")]
    assert values == pytest.approx([line["by_domain"]["north"]["top1"] for line in lines])

    evaluation = evaluated(config)
    assert {name: values["top1"] for name, values in evaluation.by_domain.items()} == {
        name: values["top1"] for name, values in lines[-1]["by_domain"].items()
    }
    texts = describe_evaluation(evaluation).splitlines()
    assert [line.split("  ")[0] for line in texts if line.startswith(("domain", "in no"))] == [
        *(f"domain {name}" for name in sorted(CAMERAS)),
        "in no domain",
    ]


def _train_all(rendezvous: Path, rank: int, bodies: list[str]) -> None:
    with group(rendezvous, rank) as distributed:
        for body in bodies:
            train(Config.model_validate_json(body), distributed)


@pytest.mark.long
def test_two_ranks_measure_the_domains_of_one(cache: TinyCache, tmp_path: Path) -> None:
    """Each rank evaluates one shard: with domains by shard, each has a domain that the other has not. Steps are too
    small to change a prediction, so ranks cannot differ by the rounding of gradients."""
    by_shard = {"cameras-*0": "first", "cameras-*1": "second"}
    bodies: list[str] = []
    for name, domain in {"member": "json:meta.camera", "shard": by_shard}.items():
        sections = {"data": {"domain": domain}, "train": {"lr": 1e-12, "epochs": 1, "best": WORST}}
        run(config_of(cache, tmp_path / f"{name}-alone", **sections))
        two = config_of(cache, tmp_path / f"{name}-two", **sections, ray={"num_workers": 2})
        bodies.append(two.model_dump_json(exclude_unset=True))
    run_two_ranks(_train_all, tmp_path, bodies)
    rows = {}
    for name in ("member", "shard"):
        (alone,), (two,) = (evaluations(tmp_path / f"{name}-{ranks}") for ranks in ("alone", "two"))
        assert two["by_domain"].keys() == alone["by_domain"].keys()
        for domain, values in alone["by_domain"].items():
            measured = {key: value for key, value in values.items() if value is not None}
            assert len(measured) > 3
            assert {key: two["by_domain"][domain][key] for key in measured} == pytest.approx(measured)
        assert two[WORST] == alone[WORST] == min(values["top1"] for values in alone["by_domain"].values())
        assert state_of(tmp_path / f"{name}-two", "checkpoints/best.pt")["best"] == {
            "metric": WORST,
            "value": two[WORST],
        }
        rows[name] = {domain: values["num_rows"] for domain, values in two["by_domain"].items()}
    assert rows == {"member": dict.fromkeys(sorted(CAMERAS), 8), "shard": {"first": 20, "second": 10}}


def test_a_run_from_a_cache_without_domains_may_have_other_ones(built_cache: TinyCache, tmp_path: Path) -> None:
    shards = built_cache.config.data.shards
    domain = {"digits-00": "first", "digits-*": "other"}
    config = run_config(built_cache.config, tmp_path / "run", data={"val_shards": shards, "domain": domain})
    run(config)
    (*_, last) = evaluations(tmp_path / "run")
    assert {name: values["num_rows"] for name, values in last["by_domain"].items()} == {"first": 20, "other": 15}


def test_a_resumed_run_may_select_by_another_metric(cache: TinyCache, tmp_path: Path) -> None:
    train = {"epochs": 3, "lr": 0.02}
    run(config_of(cache, tmp_path / "run", train={**train, "best": "top1"}), stop=("eval", 2))
    changed = config_of(cache, tmp_path / "run", train={**train, "best": "ece"})
    events = run(changed)
    warnings = [event["text"] for event in events if event["kind"] == "warning" and "ece" in event["text"]]
    assert len(warnings) == 1
    lines = evaluations(tmp_path / "run")
    assert summary_of(tmp_path / "run")["best_value"] == min(line["ece"] for line in lines[1:])


@pytest.mark.parametrize(
    ("train", "data", "code", "fields"),
    [
        ({"best": "pair/top1"}, {}, "config.unknown-metric", {"where": "train.best", "got": "pair/top1"}),
        ({"best": WORST}, {"domain": None}, "config.unknown-metric", {"got": WORST}),
        ({"best": "top1"}, {"val_shards": None}, "config.best-without-validation", {"got": "top1"}),
    ],
)
def test_a_metric_that_the_config_does_not_have_is_refused(
    cache: TinyCache, tmp_path: Path, train: dict[str, Any], data: dict[str, Any], code: str, fields: dict[str, Any]
) -> None:
    with raises(code, **fields):
        check_config(config_of(cache, tmp_path / "run", train=train, data=data))


@pytest.mark.parametrize(
    ("train", "sections"),
    [
        ({"best": "agreement"}, {}),
        ({"best": "cosine"}, {"loss": KD}),
        ({"best": WORST}, {"data": {"domain": {"other-*": "north"}}}),
        ({"best": "top1"}, {"loss": [{"name": "nd"}]}),
    ],
)
def test_a_metric_that_cannot_be_measured_is_refused_before_the_run_begins(
    cache: TinyCache, tmp_path: Path, train: dict[str, Any], sections: dict[str, Any]
) -> None:
    config = config_of(cache, tmp_path / "run", train=train, **sections)
    with raises("train.best-not-measured", where="train.best"):
        run(config)
    assert published_evaluation(str(tmp_path / "run"), 0) is None
    assert not (tmp_path / "run" / "config.yaml").exists()
