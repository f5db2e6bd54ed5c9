"""The demo: distils handwritten digits without a network connection."""

from __future__ import annotations

import io
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from sklearn.datasets import load_digits

from jobs.observability.log import emit
from jobs.recipe import run_and_report
from pipeline import storage
from pipeline.core.errors import StorageInputError, TrainingError
from pipeline.shards.writer import pack_shards
from pipeline.student.evaluation.metrics import metrics_of
from schemas.config import Config

NUM_LABELLED = 150
_NUM_VAL = 397
_MIN_GAIN = 0.10  # of accuracy
_TRAIN_SHARDS, _VAL_SHARDS = 8, 2
_RECIPE = Path(__file__).parent / "configs" / "demo.yaml"
_MAX_LEVEL = 16  # scikit-learn's digits have 17 gray levels


def pack_digits(folder: Path) -> None:
    """1,400 train and 397 validation digits of 8 x 8 pixels, shuffled, as WebDataset shards.

    Every training sample has its label in ``full.cls``, for the teacher; 150 have it in ``cls`` too, for the students.

    Raises:
        StorageInputError: the folder cannot be created.
    """
    digits = cast("Any", load_digits())
    order = list(range(len(digits.target)))
    random.Random(0).shuffle(order)
    train, val = order[_NUM_VAL:], order[:_NUM_VAL]
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StorageInputError(
            "this folder cannot be created",
            code="storage.folder-not-created",
            where=str(folder),
            got=str(error),
            next_step="choose another --out",
        ) from error
    for name, rows, shards in (("train", train, _TRAIN_SHARDS), ("val", val, _VAL_SHARDS)):
        labelled = set(rows[:NUM_LABELLED]) if name == "train" else set(rows)
        # Spreads the labelled digits over all shards, since the packer does not shuffle.
        random.Random(1).shuffle(rows)
        samples = _samples(digits.images, digits.target, rows, labelled)
        pack_shards(samples, str(folder / f"{name}-%05d.tar"), shard_size=-(-len(rows) // shards))


def _samples(
    images: NDArray[np.float64], labels: NDArray[np.int64], rows: list[int], labelled: set[int]
) -> Iterator[tuple[str, dict[str, bytes]]]:
    for row in rows:
        label = str(labels[row]).encode()
        members = {"png": _png(images[row]), "full.cls": label}
        yield f"digit{row:04d}", {**members, "cls": label} if row in labelled else members


def _png(image_HW: NDArray[np.float64]) -> bytes:
    sink = io.BytesIO()
    Image.fromarray((image_HW * (255 / _MAX_LEVEL)).round().astype(np.uint8)).save(sink, "PNG")
    return sink.getvalue()


def run_demo(out: Path) -> Path:
    """Runs the packaged recipe below ``out`` and returns the path of ``results.json``. A repeated call resumes.

    Raises:
        TrainingError: as ``gains`` does.
    """
    out = Path(storage.absolute(str(out)))
    pack_digits(out / "shards")
    path = run_and_report(str(_RECIPE), [f"out={out}"])
    emit(gains(json.loads(path.read_text())), event="gains")
    return path


def gains(results: dict[str, Any]) -> str:
    """The line with each distilled student's gain in points of accuracy over the student of labels alone.

    Args:
        results: content of ``results.json``.

    Raises:
        TrainingError: a gain is below 10 points. The tested versions of torch and Ray gain at least 29 points, so this
            installation computes different results.
    """
    accuracy = metrics_of(Config().data).main
    shares = {name: student[accuracy.key] for name, student in results["students"].items()}
    baseline = shares.pop("labels")
    text = f"points of {accuracy.title} above labels alone: "
    text += ", ".join(f"{name} {100 * (share - baseline):+.1f}" for name, share in shares.items())
    if all(share >= baseline + _MIN_GAIN for share in shares.values()):
        return text
    raise TrainingError(
        "distillation gained less than expected",
        code="demo.no-gain",
        got=text,
        expected=f"at least {100 * _MIN_GAIN:.0f} each",
        next_step="run stillroom demo in a new --out; if it fails again, run make test",
    )
