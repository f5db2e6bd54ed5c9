"""Arrow schemas of cache format v1: what every Parquet file of a cache holds, column by column."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import pyarrow as pa

FORMAT_VERSION = 1

Status = Literal["ok", "undecodable", "empty", "too_large", "duplicate_key", "no_image", "truncated"]
"""What became of a sample's image. Only ``ok`` rows are seen by a teacher or a student."""


def _required(name: str, kind: pa.DataType) -> pa.Field:
    return pa.field(name, kind, nullable=False)


INDEX_SCHEMA = pa.schema(
    [
        _required("row", pa.int32()),  # position in the tar, from 0, bad samples included
        _required("key", pa.string()),  # WebDataset __key__
        _required("status", pa.string()),
        pa.field("label", pa.int32()),  # null: the sample has none
        _required("offset", pa.int64()),  # of the encoded image in the tar, bytes
        _required("size", pa.int32()),  # of the encoded image, bytes
        _required("width", pa.int32()),  # pixels after EXIF rotation; 0 unless ok
        _required("height", pa.int32()),
        _required("content_hash", pa.uint64()),  # xxh3 of the encoded image
    ]
)
"""``index/<shard_id>.parquet``: one row per sample, in tar order."""


def part_schema(outputs: Mapping[str, int]) -> pa.Schema:
    """``parts/<shard_id>/<block>.<sha16>.parquet``: one row per ok sample and view, view-major.

    Args:
        outputs: bytes of one stored row of each tensor, by name.
    """
    return pa.schema(
        [
            _required("row", pa.int32()),  # of the index
            _required("view", pa.uint16()),  # 65535: the eval pass
            _required("content_hash", pa.uint64()),  # repeated from the index
            _required("box_left", pa.int32()),  # pixels of the original after EXIF rotation
            _required("box_top", pa.int32()),
            _required("box_width", pa.int32()),
            _required("box_height", pa.int32()),
            _required("flip", pa.bool_()),
            _required("mix_row", pa.int32()),  # index row of the mixup partner; the own row where nothing is mixed
            _required("mix_lambda", pa.float32()),  # the own share of the mixed pixels
            _required("embedding_norm", pa.float32()),
            pa.field("pixel_digest", pa.binary(16)),  # canary rows: XXH3-128 of the uint8 view
            pa.field("pixel_mean", pa.binary(192)),  # canary rows: uint8 [8,8,3] block means
            *(_required(name, pa.binary(size_bytes)) for name, size_bytes in outputs.items()),
        ]
    )
