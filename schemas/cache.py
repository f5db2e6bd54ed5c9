"""Arrow schemas of cache format v1: what every Parquet file of a cache holds, column by column."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import pyarrow as pa

from schemas.config import ViewsConfig

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


_BOX = ("left", "top", "width", "height")


def drawn_columns(plan: ViewsConfig) -> dict[str, pa.DataType]:
    """What a plan's options add to each row of its views; an eval pass has none of it."""
    columns: dict[str, pa.DataType] = {}
    if plan.jitter is not None:
        columns["jitter_order"] = pa.uint8()
        columns |= {f"jitter_{name}": pa.float32() for name in ("brightness", "contrast", "saturation", "hue")}
    if plan.randaugment is not None:
        for number in range(1, plan.randaugment.num_ops + 1):
            columns |= {f"op{number}": pa.uint8(), f"op{number}_magnitude": pa.float32()}
    if plan.erasing is not None:
        columns |= {f"erase_{side}": pa.float32() for side in _BOX}  # fractions of the view; width 0: nothing erased
        columns |= {f"erase_{name}": pa.uint8() for name in ("red", "green", "blue")}
    if plan.cutmix is not None:
        columns |= {f"cut_{side}": pa.float32() for side in _BOX}  # fractions of the view; width 0: a blend
    return columns


def part_schema(outputs: Mapping[str, int], drawn: Mapping[str, pa.DataType] | None = None) -> pa.Schema:
    """``parts/<shard_id>/<block>.<sha16>.parquet``: one row per ok sample and view, view-major.

    Args:
        outputs: bytes of one stored row of each tensor, by name.
        drawn: ``drawn_columns`` of the plan; none of an eval pass.
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
            *(_required(name, kind) for name, kind in (drawn or {}).items()),
            _required("embedding_norm", pa.float32()),
            pa.field("pixel_digest", pa.binary(16)),  # canary rows: XXH3-128 of the uint8 view
            pa.field("pixel_mean", pa.binary(192)),  # canary rows: uint8 [8,8,3] block means
            *(_required(name, pa.binary(size_bytes)) for name, size_bytes in outputs.items()),
        ]
    )
