"""The demo as the README promises it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from jobs.demo import NUM_LABELLED, pack_digits
from pipeline import storage
from pipeline.shards.tar import read_samples
from schemas.config import DataConfig

STILLROOM = Path(sys.executable).parent / "stillroom"


def test_the_digits_are_packed_with_few_labels_for_students_and_all_for_the_teacher(tmp_path: Path) -> None:
    pack_digits(tmp_path)
    shards = sorted(tmp_path.glob("train-*.tar"))
    assert (len(shards), len(list(tmp_path.glob("val-*.tar")))) == (8, 2)
    for member, wanted in (("cls", NUM_LABELLED), ("full.cls", 1400)):
        data = DataConfig(label=member, num_classes=10)
        samples = [sample for path in shards for sample in read_samples(path, data, where=str(path))]
        assert len(samples) == 1400
        assert sum(sample.label is not None for sample in samples) == wanted


def test_packing_twice_gives_the_same_bytes(tmp_path: Path) -> None:
    for name in "ab":
        pack_digits(tmp_path / name)
    for path in storage.listing(str(tmp_path / "a")):
        assert (tmp_path / "a" / path).read_bytes() == (tmp_path / "b" / path).read_bytes()


@pytest.mark.slow
@pytest.mark.ray
def test_the_demo_shows_that_distillation_wins_by_ten_points(tmp_path: Path) -> None:
    done = subprocess.run(
        [STILLROOM, "demo", "--out", str(tmp_path / "demo")], capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "dist++" in done.stdout
    results = json.loads((tmp_path / "demo" / "results.json").read_text())
    students = results["students"]
    assert set(students) == {"labels", "kd", "dist++"}
    assert results["teacher"]["top1"] > 0.95
    assert students["kd"]["top1"] > students["labels"]["top1"] + 0.10
    assert students["dist++"]["top1"] > students["labels"]["top1"] + 0.10
    assert all(student["agreement"] > 0.3 and student["seconds"] > 0 for student in students.values())
