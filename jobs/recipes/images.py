"""Metrics of each validation image for the runs of a recipe, in ``out/images/RUN.parquet``, and intervals over them."""

from __future__ import annotations

import io
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from pipeline import storage
from pipeline.core.bounded_parquet import read_bounded
from pipeline.core.errors import ConfigError
from pipeline.core.redaction import quoted
from pipeline.core.significance import Interval, image_interval
from pipeline.student.evaluation.images import write_images

Entry = dict[str, Any]
"""The numbers of one run, by their names in ``results.json``; runs of a grid also have ``epochs`` and ``seed``."""

Pairs = Sequence[tuple[Entry, Entry]]
"""Runs of two students with the same seed."""

_FOLDER = "images"
_MAX_BYTES = 2**30


def run_names(entry: Entry) -> tuple[str, ...]:
    """The possible names of a run: those of a grid contain the number of epochs only if the grid does."""
    student = entry["student"]
    if "seed" not in entry:
        return (student,)
    return f"{student}-epochs{entry['epochs'] or 0}-seed{entry['seed']}", f"{student}-seed{entry['seed']}"


def write_images_of_runs(out: Path, by_run: Mapping[str, pa.Table]) -> None:
    """Writes the images of evaluations, by the names of the runs, below the output folder of a recipe."""
    (out / _FOLDER).mkdir(parents=True, exist_ok=True)
    for name, images in by_run.items():
        write_images(str(out / _FOLDER / f"{name}.parquet"), images)


def image_difference(out: Path, pairs: Pairs, key: str, factor: float) -> Interval | None:
    """The difference of two students in a metric, with its interval over the test images that both were evaluated on.

    Args:
        pairs: the runs of both; of each image the mean difference counts.
        key: of the metric.
        factor: of the values.

    Returns:
        None if a run has no stored values, or the runs have other images.

    Raises:
        ConfigError: a file is damaged.
    """
    tables = [_read(out, entry) for pair in pairs for entry in pair]
    stored = [table for table in tables if table is not None and key in table.column_names]
    if not stored or len(stored) < len(tables) or not _have_equal_images(stored):
        return None
    values = np.array([table[key].to_numpy() for table in stored])
    difference_N = factor * (values[0::2] - values[1::2]).mean(axis=0)
    counted_M = difference_N[~np.isnan(difference_N)]
    return image_interval(counted_M, seed=0) if len(counted_M) else None


def _have_equal_images(tables: Iterable[pa.Table]) -> bool:
    first, *others = [table.select(["shard", "sample"]) for table in tables]
    return all(table.equals(first) for table in others)


def _read(out: Path, entry: Entry) -> pa.Table | None:
    for path in (str(out / _FOLDER / f"{name}.parquet") for name in run_names(entry)):
        data = storage.read_if_exists(path, max_bytes=_MAX_BYTES)
        if data is not None:
            try:
                return read_bounded(io.BytesIO(data), size_bytes=len(data))
            except pa.ArrowException as error:
                raise ConfigError(
                    "this file contains no metrics of images",
                    code="recipe.results-damaged",
                    where=path,
                    got=str(error),
                    next_step=f"rm {quoted(path)}, and run the recipe again: finished trainings are not repeated",
                ) from error
    return None
