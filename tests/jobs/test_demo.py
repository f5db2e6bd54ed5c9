"""The demo of the README."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from jobs.demo import NUM_LABELLED, gains, pack_digits
from pipeline.core.errors import TrainingError
from pipeline.shards.tar import read_samples
from schemas.config import DataConfig
from tests.errors import raises
from tests.jobs.conftest import files_below

pytestmark = pytest.mark.long


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("digits")
    pack_digits(folder)
    return folder


def test_the_digits_are_packed_with_few_labels_for_students_and_all_for_the_teacher(digits: Path) -> None:
    shards = sorted(digits.glob("train-*.tar"))
    assert (len(shards), len(list(digits.glob("val-*.tar")))) == (8, 2)
    for member, expected in (("cls", NUM_LABELLED), ("full.cls", 1400)):
        data = DataConfig(label=member, num_classes=10)
        samples = [sample for path in shards for sample in read_samples(path, data, where=str(path))]
        assert len(samples) == 1400
        assert sum(sample.target is not None for sample in samples) == expected


def test_packing_twice_gives_the_same_bytes(digits: Path, tmp_path: Path) -> None:
    pack_digits(tmp_path)
    assert files_below(tmp_path) == files_below(digits)


def results(**top1: float) -> dict[str, Any]:
    return {"students": {name: {"top1": value} for name, value in top1.items()}}


def test_a_demo_reports_the_gain_of_distilled_students_over_labels_alone() -> None:
    """``make demo`` runs the whole demo."""
    assert gains(results(labels=0.6, kd=0.75, dist=0.7)) == "points of top-1 above labels alone: kd +15.0, dist +10.0"


@pytest.mark.parametrize("dist", [0.69, 0.5, math.nan])
def test_a_demo_without_a_gain_fails(dist: float) -> None:
    with raises("demo.no-gain", TrainingError, exit_code=1):
        gains(results(labels=0.6, kd=0.75, dist=dist))
