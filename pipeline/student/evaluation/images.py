"""Metrics of each image of an evaluation, and their Parquet file."""

from __future__ import annotations

import io
from collections.abc import Sequence

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline import storage
from pipeline.student.evaluation.metrics import MetricSums


def images_table(images: Sequence[tuple[str, pa.StringArray]], sums: MetricSums) -> pa.Table:
    """See ``Evaluation.images``.

    Args:
        images: by shard, the keys of the samples in the order in which the sums got them.
    """
    shards = pa.array([shard for shard, keys in images for _ in range(len(keys))], pa.string())
    samples = pa.chunked_array([keys for _, keys in images], pa.string())
    values = {key: pa.array(values_N.numpy(), from_pandas=True) for key, values_N in sums.by_row().items()}
    return pa.table({"shard": shards, "sample": samples, **values})


def write_images(url: str, images: pa.Table) -> None:
    """Writes ``Evaluation.images`` as Parquet.

    Raises:
        StorageInputError: the URL is refused or cannot be written.
    """
    sink = io.BytesIO()
    pq.write_table(images, sink)
    storage.write(url, sink.getvalue())
