"""The dry run of every recipe against the papers: numbers are copied by hand from the papers' tables."""

from __future__ import annotations

import math
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import jobs
from jobs.recipe import main
from jobs.recipes.document import Recipe, load_recipe
from jobs.recipes.schedule import describe_plan, loss_text, training_plan
from pipeline.core.errors import ModelError
from pipeline.models import load_model
from pipeline.student.networks.review import plan_review, review_section
from schemas.config import Config
from tests.errors import raises
from tests.marks import slow
from tests.tolerances import ulps

# Dry runs build the networks of papers.
pytestmark = pytest.mark.long

CONFIGS = Path(jobs.__file__).parent / "configs"
LOCAL = (
    "demo",
    "cifar10",
    "cifar10-views",
    "cifar10-views-per-image",
    "cifar10-losses",
    "cifar10-pixels",
    "heads",
    "embeddings",
)
PAPERS = (
    "funmatch-imagenet",
    "funmatch-small",
    "dist-imagenet",
    "dist-b2",
    "dist-cifar100",
    "nd-cifar100",
    "nd-imagenet",
)


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("a dry run went to the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)


def recipe(name: str, out: Path, *overrides: str) -> Recipe:
    return load_recipe(str(CONFIGS / f"{name}.yaml"), [f"out={out}", *overrides])


def stage(resolved: Recipe, student: str) -> Config:
    return next(run.config for run in resolved.runs if run.student == student)


def test_every_recipe_of_the_project_is_tested_here() -> None:
    assert {path.stem for path in CONFIGS.glob("*.yaml")} == {*LOCAL, *PAPERS}


@pytest.mark.usefixtures("offline")
@pytest.mark.parametrize("name", [*LOCAL, *map(slow, PAPERS)])
def test_a_dry_run_needs_neither_data_nor_network_and_writes_no_file(name: str, tmp_path: Path) -> None:
    resolved = recipe(name, tmp_path / "out")
    text = describe_plan(resolved)
    assert text.startswith(resolved.document.title)
    assert all(f"student {run.student}" in text for run in resolved.runs)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", PAPERS)
def test_the_header_of_a_recipe_names_its_paper_and_its_command(name: str) -> None:
    header = [line for line in (CONFIGS / f"{name}.yaml").read_text().splitlines() if line.startswith("#")]
    text = "\n".join(header)
    assert f"stillroom recipe {name}" in text
    assert any(number in text for number in ("2106.05237", "2205.10536", "2305.17007"))
    assert "xpected top-1" in text or "The paper reports" in text


# Table of pairs: KD++ (kd, nd), DKD++ (alpha, beta, nd), DIST++ (dist, nd), lr, teacher, labels, KD++, DKD++, DIST++,
# ReviewKD++.
ND_CIFAR = {
    "resnet56_resnet20": ((1, 2), (2.5, 4, 3.5), (2, 1), 0.1, 72.34, 69.06, 72.53, 72.16, 72.52, 72.05),
    "wrn_40_2_wrn_40_1": ((1, 1.5), (1, 6, 1), (2.5, 3), 0.1, 75.61, 71.98, 74.59, 75.02, 75.00, 75.66),
    "resnet32x4_resnet8x4": ((3.5, 2), (2, 8, 0.5), (1.5, 4), 0.1, 79.42, 72.50, 75.54, 76.28, 76.13, 76.07),
    "resnet50_mobilenet_v2": ((3, 0.5), (0.5, 8, 1), (7, 1), 0.02, 79.34, 64.60, 70.10, 70.82, 69.80, 70.45),
    "resnet32x4_shufflenet_v1": ((2.5, 1.5), (0.5, 8, 4), (2.5, 3), 0.02, 79.42, 70.50, 75.45, 77.11, 75.60, 77.68),
    "resnet32x4_shufflenet_v2": ((4, 0.5), (0.5, 6, 0.5), (3, 4), 0.02, 79.42, 71.82, 76.42, 77.49, 76.64, 77.93),
}


@pytest.mark.parametrize("pair", ND_CIFAR)
def test_nd_on_cifar100_has_the_paper_s_weights_rates_and_results(pair: str, tmp_path: Path) -> None:
    (kd, kd_nd), (alpha, beta, dkd_nd), (dist, dist_nd), lr, *published = ND_CIFAR[pair]
    resolved = recipe("nd-cifar100", tmp_path, f"vars.pair={pair}")
    assert loss_text(stage(resolved, "kd++")) == (f"1 ce + {kd:g} kd(temperature=4, warmup_epochs=20) + {kd_nd:g} nd")
    assert loss_text(stage(resolved, "dkd++")) == (
        f"1 ce + 1 dkd(alpha={alpha:g}, beta={beta:g}, temperature=4, warmup_epochs=20) + {dkd_nd:g} nd"
    )
    assert loss_text(stage(resolved, "dist++")) == (
        f"1 ce + {dist:g} dist(temperature=4, warmup_epochs=20) + {dist_nd:g} nd"
    )
    names = ("teacher", "labels", "kd++", "dkd++", "dist++", "review++")
    assert resolved.document.published == dict(zip(names, published, strict=True))
    plan = training_plan(resolved, stage(resolved, "kd++"))
    assert plan is not None
    assert (plan.steps_per_epoch, plan.total_steps) == (390, 240 * 390)
    assert list(plan.lr.items()) == [
        (step, pytest.approx(lr * factor))
        for step, factor in ((0, 1), (150 * 390, 0.1), (180 * 390, 0.01), (210 * 390, 0.001), (240 * 390 - 1, 0.001))
    ]
    train = stage(resolved, "kd++").train
    assert (train.optimizer, train.nesterov, train.weight_decay, train.momentum) == ("sgd", True, 5e-4, 0.9)


# ReviewKD++ (review_kd, nd), width in which levels are fused: the deepest of the student's, 512 at most. Maps of
# student and teacher, shallow to deep, as channels and side.
REVIEW_CIFAR = {
    "resnet56_resnet20": ((1.2, 1, 64), [(16, 32), (32, 16), (64, 8)], [(16, 32), (32, 16), (64, 8)]),
    "wrn_40_2_wrn_40_1": ((5, 4, 64), [(16, 32), (32, 16), (64, 8)], [(32, 32), (64, 16), (128, 8)]),
    "resnet32x4_resnet8x4": ((8, 1, 256), [(64, 32), (128, 16), (256, 8)], [(64, 32), (128, 16), (256, 8)]),
    "resnet50_mobilenet_v2": (
        (6, 2, 512),
        [(12, 16), (16, 8), (48, 4), (160, 2)],
        [(256, 32), (512, 16), (1024, 8), (2048, 4)],
    ),
    "resnet32x4_shufflenet_v1": ((7, 1, 512), [(240, 16), (480, 8), (960, 4)], [(64, 32), (128, 16), (256, 8)]),
    "resnet32x4_shufflenet_v2": ((8, 1.5, 512), [(116, 16), (232, 8), (464, 4)], [(64, 32), (128, 16), (256, 8)]),
}


@pytest.mark.slow
@pytest.mark.parametrize("pair", REVIEW_CIFAR)
def test_reviewkd_on_cifar100_compares_the_stages_of_both_networks_by_the_paper_s_weights(
    pair: str, tmp_path: Path
) -> None:
    (review, nd, mid_channels), *expected = REVIEW_CIFAR[pair]
    config = stage(recipe("nd-cifar100", tmp_path, f"vars.pair={pair}", "teacher.teacher.weights=random"), "review++")
    assert [(term.name, term.weight) for term in config.loss] == [("ce", 1), ("review_kd", review), ("nd", nd)]
    section = review_section(config.loss)
    assert section is not None
    assert (section.mid_channels, section.warmup_epochs, section.embedding) == (mid_channels, 20, True)
    assert config.teacher.class_means == str(tmp_path / "cache")
    assert config.student is not None
    plan = plan_review(
        section,
        load_model(config.student, widths={"logits": 100}, size=32, where="student"),
        load_model(config.teacher, widths={"logits": 100}, size=32, where="teacher"),
    )
    assert [[(level.channels, level.side) for level in maps] for maps in (plan.student, plan.teacher)] == expected


# lr, teacher, KD, DIST.
DIST_CIFAR = {
    "resnet56_resnet20": (0.05, 72.34, 70.66, 71.75),
    "wrn_40_2_wrn_40_1": (0.05, 75.61, 73.54, 74.43),
    "resnet32x4_resnet8x4": (0.05, 79.42, 73.33, 76.31),
    "resnet50_mobilenet_v2": (0.01, 79.34, 67.65, 68.66),
    "resnet32x4_shufflenet_v1": (0.01, 79.42, 74.07, 76.34),
    "resnet32x4_shufflenet_v2": (0.01, 79.42, 74.45, 77.35),
}


@pytest.mark.parametrize("pair", DIST_CIFAR)
def test_dist_on_cifar100_has_the_paper_s_rates_and_results(pair: str, tmp_path: Path) -> None:
    lr, teacher, kd, dist = DIST_CIFAR[pair]
    resolved = recipe("dist-cifar100", tmp_path, f"vars.pair={pair}")
    config = stage(resolved, "dist")
    assert loss_text(config) == "1 ce + 2 dist(temperature=4)"
    assert resolved.document.published == {"teacher": teacher, "kd": kd, "dist": dist}
    train = config.train
    assert (train.epochs, train.global_batch_size, train.lr, train.nesterov) == (240, 64, lr, False)
    assert (train.schedule, tuple(train.milestones), train.gamma) == ("step", (150, 180, 210), 0.1)


# Millions of parameters and embeddings of teacher and student, as the tables' code base has them.
NETWORKS = {
    "resnet56_resnet20": ((0.86, 64), (0.28, 64)),
    "wrn_40_2_wrn_40_1": ((2.26, 128), (0.57, 64)),
    "resnet32x4_resnet8x4": ((7.43, 256), (1.23, 256)),
    "resnet50_mobilenet_v2": ((23.71, 2048), (0.81, 1280)),
    "resnet32x4_shufflenet_v1": ((7.43, 256), (0.95, 960)),
    "resnet32x4_shufflenet_v2": ((7.43, 256), (1.36, 1024)),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["nd-cifar100", "dist-cifar100"])
@pytest.mark.parametrize("pair", NETWORKS)
def test_networks_of_the_cifar_pairs_have_the_published_sizes(name: str, pair: str, tmp_path: Path) -> None:
    teacher, student, *_ = _models(describe_plan(recipe(name, tmp_path, f"vars.pair={pair}")))
    for (millions, width), (expected, expected_width) in zip((teacher, student), NETWORKS[pair], strict=True):
        assert (millions, width) == (pytest.approx(expected, abs=0.011), expected_width)


def _models(text: str) -> Iterator[tuple[float, int]]:
    """Parameters in millions and embedding of every network of a plan, in order."""
    for line in text.splitlines():
        if " M parameters" in line:
            before, _, after = line.partition(" M parameters, embedding ")
            yield float(before.rpartition(": ")[2]), int(after.partition(",")[0])


# kd, nd of KD++; alpha, beta, nd of DKD++; review_kd, nd of ReviewKD++.
ND_IMAGENET = {
    "resnet34_resnet18": ((2.5, 1), (0.8, 0.5, 1), (1, 3)),
    "resnet50_resnet18": ((4, 1), (0.6, 0.5, 2), (3, 2)),
    "resnet101_resnet18": ((3.5, 4), (0.8, 0.5, 1), (3, 1)),
    "resnet152_resnet18": ((4, 2), (1, 1, 1), (3, 1)),
    "resnet50_mobilenet_v1": ((4, 1), (0.8, 1, 1), (8, 4)),
}


@pytest.mark.parametrize("pair", ND_IMAGENET)
def test_nd_on_imagenet_has_the_paper_s_weights_and_schedule(pair: str, tmp_path: Path) -> None:
    (kd, kd_nd), (alpha, beta, dkd_nd), (review, review_nd) = ND_IMAGENET[pair]
    resolved = recipe("nd-imagenet", tmp_path, f"vars.pair={pair}")
    assert loss_text(stage(resolved, "kd++")) == f"1 ce + {kd:g} kd(temperature=1, warmup_epochs=5) + {kd_nd:g} nd"
    assert loss_text(stage(resolved, "dkd++")) == (
        f"1 ce + 1 dkd(alpha={alpha:g}, beta={beta:g}, temperature=1, warmup_epochs=5) + {dkd_nd:g} nd"
    )
    terms = stage(resolved, "review++").loss
    assert [(term.name, term.weight) for term in terms] == [("ce", 1), ("review_kd", review), ("nd", review_nd)]
    train = stage(resolved, "kd++").train
    assert (train.epochs, train.global_batch_size, train.lr, train.weight_decay) == (100, 512, 0.2, 1e-4)
    assert (train.schedule, tuple(train.milestones), train.gamma) == ("step", (30, 60, 90), 0.1)
    plan = training_plan(resolved, stage(resolved, "kd++"))
    assert plan is not None
    assert plan.total_steps == 100 * 2502  # 1,281,167 images


def test_nd_on_imagenet_expects_the_paper_s_results(tmp_path: Path) -> None:
    resolved = recipe("nd-imagenet", tmp_path)
    assert resolved.document.published == {"teacher": 73.31, "kd++": 71.98, "dkd++": 72.07}


@pytest.mark.parametrize(
    ("pair", "top1"), [("resnet34_resnet18", 72.07), ("resnet152_resnet18", 72.24), ("resnet50_resnet18", 72.12)]
)
def test_dist_on_imagenet_has_the_paper_s_schedule_and_results(pair: str, top1: float, tmp_path: Path) -> None:
    resolved = recipe("dist-imagenet", tmp_path, f"vars.pair={pair}")
    config = stage(resolved, "dist")
    assert loss_text(config) == "1 ce + 2 dist(temperature=1)"
    assert resolved.document.published["dist"] == top1
    train = config.train
    assert (train.epochs, train.global_batch_size, train.lr, train.nesterov) == (100, 256, 0.1, True)
    assert (train.schedule, tuple(train.milestones), train.gamma) == ("step", (30, 60, 90), 0.1)


def test_b2_is_the_strategy_of_the_dist_paper(tmp_path: Path) -> None:
    resolved = recipe("dist-b2", tmp_path)
    config = stage(resolved, "dist")
    train, views = config.train, config.views
    assert loss_text(config) == "1 ce(label_smoothing=0.1) + 2 dist(temperature=1)"
    assert (train.epochs, train.global_batch_size, train.optimizer, train.lr) == (450, 768, "rmsprop_tf", 0.048)
    assert (train.schedule, train.gamma, train.decay_epochs, train.ema) == ("exponential", 0.97, 2.4, 0.9999)
    assert views.randaugment is not None
    assert views.erasing is not None
    assert (views.randaugment.magnitude, views.erasing.probability) == (9, 0.2)
    assert config.student is not None
    assert config.student.kwargs == {"drop_rate": 0.2}
    assert resolved.document.published == {"teacher": 86.3, "dist": 80.2}


FUNMATCH = {
    30: (73.75, 74.95, 73.89),
    90: (76.45, 78.05, 78.00),
    300: (77.76, 80.08, 80.30),
    600: (77.99, 80.63, 81.17),
    1200: (78.11, 81.15, 81.54),
    4800: (77.56, 81.58, 82.18),
    9600: (76.95, 81.76, 82.31),
}


@pytest.mark.parametrize("epochs", FUNMATCH)
def test_funmatch_on_imagenet_has_the_paper_s_numbers_at_every_length(epochs: int, tmp_path: Path) -> None:
    resolved = recipe("funmatch-imagenet", tmp_path, f"vars.epochs={epochs}", "only=null")
    assert resolved.document.published == dict(
        zip(("fixed", "consistent", "function_matching"), FUNMATCH[epochs], strict=True)
    )
    config = stage(resolved, "function_matching")
    train = config.train
    assert loss_text(config) == "1 kd(temperature=1)"
    assert (train.epochs, train.global_batch_size, train.lr, train.warmup_steps) == (epochs, 4096, 0.03, 5000)
    assert (train.optimizer, train.clip_norm, train.schedule) == ("adamw", 1.0, "cosine")
    assert train.weight_decay * train.lr == pytest.approx(3e-4)
    plan = training_plan(resolved, config)
    assert plan is not None
    assert plan.total_steps == epochs * 312
    # (1 + cos(π - x)) / 2 is sin(x / 2)²; in float64 the cosine and the sum are rounded.
    x = math.pi / (plan.total_steps - 5000)
    last = pytest.approx(0.03 * math.sin(x / 2) ** 2, rel=0, abs=ulps(2, 0.03, dtype=torch.float64))
    assert (plan.lr[5000], plan.lr[plan.total_steps - 1]) == (0.03, last)
    assert [config.views.kind for config in resolved.caches.values()] == ["eval", "crop", "function_matching"]


def test_funmatch_on_imagenet_builds_only_the_cache_of_its_students(tmp_path: Path) -> None:
    assert list(recipe("funmatch-imagenet", tmp_path).caches) == ["function_matching"]


# Epochs, T, lr and weight decay of short, medium and long, from the paper's table.
SMALL = {
    "flowers": ((10_000, 100_000, 1_000_000), (10, 1, 1), (0.003, 0.001, 0.0003), (3e-4, 1e-4, 1e-5)),
    "pets": ((1000, 3000, 30_000), (5, 10, 2), (0.01, 0.003, 0.003), (1e-3, 3e-4, 1e-5)),
    "food": ((100, 1000, 3000), (10, 10, 5), (0.01, 0.001, 0.01), (1e-3, 3e-4, 1e-4)),
    "sun": ((100, 1000, 3000), (10, 10, 10), (0.01, 0.001, 0.01), (1e-3, 1e-4, 3e-5)),
}


@pytest.mark.parametrize("dataset", SMALL)
@pytest.mark.parametrize(("column", "schedule"), [*enumerate(("short", "medium", "long"))])
def test_funmatch_on_small_sets_has_the_paper_s_table(dataset: str, column: int, schedule: str, tmp_path: Path) -> None:
    epochs, temperature, lr, decay = (values[column] for values in SMALL[dataset])
    resolved = recipe("funmatch-small", tmp_path, f"vars.dataset={dataset}", f"vars.schedule={schedule}")
    config = stage(resolved, "function_matching")
    train = config.train
    assert (train.epochs, train.lr, train.warmup_steps, train.global_batch_size) == (epochs, lr, 1500, 512)
    assert train.weight_decay * train.lr == pytest.approx(decay)
    assert loss_text(config) == f"1 kd(temperature={temperature:g})"
    assert (config.views.kind, config.views.size) == ("function_matching", 128)


@pytest.mark.slow
def test_a_plan_names_the_weights_that_it_needs(tmp_path: Path) -> None:
    needs = [line for line in describe_plan(recipe("dist-b2", tmp_path)).splitlines() if "needs weights" in line]
    assert len(needs) == 1
    assert "timm/swin_large_patch4_window7_224.ms_in22k_ft_in1k" in needs[0]
    small = describe_plan(recipe("funmatch-small", tmp_path, "vars.teacher=s3://bucket/bit.safetensors"))
    assert "s3://bucket/bit.safetensors" in small
    several = "students.dist.teacher.others=[{model: timm/resnet18, weights: 's3://bucket/r18.safetensors'}]"
    assert "s3://bucket/r18.safetensors" in describe_plan(recipe("dist-b2", tmp_path, several))


def test_a_teacher_with_weights_is_not_trained(tmp_path: Path) -> None:
    resolved = recipe("nd-cifar100", tmp_path, "teacher.teacher.weights=/weights/resnet56.pth")
    assert not resolved.trains_teacher
    cache = resolved.caches["cache"].teacher
    assert (cache.model, cache.kwargs) == ("python:pipeline.models.cifar:resnet", {"depth": 56})
    assert cache.weights == "/weights/resnet56.pth"
    assert "trained here" not in describe_plan(resolved)


def test_a_dry_run_prints_the_plan_and_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(str(CONFIGS / "demo.yaml"), [f"out={tmp_path / 'out'}", "--dry-run"])
    assert "student dist++" in capsys.readouterr().out
    assert not (tmp_path / "out").exists()


def test_a_network_that_does_not_exist_is_found_by_a_dry_run(tmp_path: Path) -> None:
    wrong = recipe("dist-imagenet", tmp_path, "students.dist.student.model=timm/resnet19")
    with raises("model.unknown-name", ModelError):
        describe_plan(wrong)
