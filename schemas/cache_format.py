"""Cache format v1: Arrow schemas of its Parquet files, and its JSON records (header, commits, manifest)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import pyarrow as pa
from pydantic import BaseModel, ConfigDict, Field, SerializerFunctionWrapHandler, model_serializer, model_validator

from schemas.config import Size, ViewsConfig, height_width, size_of

FORMAT_VERSION = 1
EVAL_BLOCK = "eval"

Status = Literal["ok", "undecodable", "empty", "too_large", "duplicate_key", "no_image", "truncated", "bad_target"]
"""The result of reading a sample's image, and its mask or boxes. A teacher and a student see only ``ok`` rows."""


def _required(name: str, kind: pa.DataType) -> pa.Field:
    return pa.field(name, kind, nullable=False)


def index_schema(targets: Mapping[str, pa.DataType]) -> pa.Schema:
    """``index/<shard_id>.parquet``: one row per sample, in tar order.

    Args:
        targets: columns of the task: ``label``, int32, for classification.
    """
    return pa.schema(
        [
            _required("row", pa.int32()),  # position in the tar, from 0, bad samples included
            _required("key", pa.string()),  # WebDataset __key__
            _required("status", pa.string()),
            *(pa.field(name, kind) for name, kind in targets.items()),  # null: the sample has no target
            _required("offset", pa.int64()),  # of the encoded image in the tar, in bytes
            _required("size", pa.int32()),  # of the encoded image, bytes
            _required("width", pa.int32()),  # pixels after EXIF rotation; 0 unless ok
            _required("height", pa.int32()),
            _required("content_hash", pa.uint64()),  # xxh3 of the encoded image
        ]
    )


BOX_SIDES = ("left", "top", "width", "height")
JITTERS = ("brightness", "contrast", "saturation", "hue")


def aug_param_columns(plan: ViewsConfig) -> dict[str, pa.DataType]:
    """Columns that the options of a plan add to each row of its views, except in an eval pass."""
    columns: dict[str, pa.DataType] = {}
    if plan.jitter is not None:
        columns["jitter_order"] = pa.uint8()
        columns |= {f"jitter_{name}": pa.float32() for name in JITTERS}
    if plan.randaugment is not None:
        for number in range(1, plan.randaugment.num_ops + 1):
            columns |= {f"op{number}": pa.uint8(), f"op{number}_magnitude": pa.float32()}
    if plan.erasing is not None:
        columns |= {
            f"erase_{side}": pa.float32() for side in BOX_SIDES
        }  # fractions of the view; width 0: nothing erased
        columns |= {f"erase_{name}": pa.uint8() for name in ("red", "green", "blue")}
    if plan.cutmix is not None:
        columns |= {f"cut_{side}": pa.float32() for side in BOX_SIDES}  # fractions of the view; width 0: a blend
    return columns


PIXELS, PIXEL_HASH = "pixels", "pixel_hash"
"""Columns of parts whose views are stored."""


def pixel_type(pixels: str | None, size: Size) -> pa.DataType | None:
    """The type of the column ``pixels``; None: there is none.

    Args:
        pixels: ``views.pixels`` of the plan.
        size: of a view.
    """
    if pixels in (None, "none"):
        return None
    height, width = height_width(size)
    return pa.binary(3 * height * width) if pixels == "raw" else pa.large_binary()


def part_schema(
    outputs: Mapping[str, int],
    aug_params: Mapping[str, pa.DataType] | None = None,
    pixels: pa.DataType | None = None,
) -> pa.Schema:
    """``parts/<shard_id>/<block>.<sha16>.parquet``: one row per ok sample and view, view-major.

    Args:
        outputs: bytes of one stored row of each tensor, by name.
        aug_params: ``aug_param_columns`` of the plan; None for an eval pass.
        pixels: ``pixel_type``; None for an eval pass.
    """
    stored = {} if pixels is None else {PIXEL_HASH: pa.uint64(), PIXELS: pixels}
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
            _required("mix_row", pa.int32()),  # index row of the mixup partner; equal to row if nothing is mixed
            _required("mix_lambda", pa.float32()),  # share of this image in the mixed pixels
            *(_required(name, kind) for name, kind in (aug_params or {}).items()),
            _required("embedding_norm", pa.float32()),
            pa.field("pixel_digest", pa.binary(16)),  # canary rows: XXH3-128 of the uint8 view
            pa.field("pixel_mean", pa.binary(192)),  # canary rows: uint8 [8,8,3] block means
            *(_required(name, pa.binary(size_bytes)) for name, size_bytes in outputs.items()),
            *(_required(name, kind) for name, kind in stored.items()),  # xxh3 of the stored bytes, before mixing
        ]
    )


class Record(BaseModel):
    """A JSON record, written once and never changed. Unknown keys mean another format version."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class VersionedRecord(Record):
    """A record that is one JSON file."""

    format_version: Literal[1] = FORMAT_VERSION


class ViewBlock(Record):
    """Views start..stop-1 of one shard: the unit of work and of commits. The eval pass is a separate block."""

    start: int = Field(ge=0)
    stop: int = Field(ge=0)
    is_eval: bool = False

    @property
    def name(self) -> str:
        return EVAL_BLOCK if self.is_eval else f"v{self.start:04d}-{self.stop - 1:04d}"

    @property
    def views(self) -> range:
        return range(self.start, self.stop)


class RowField(Record):
    """A run of numbers of the same type inside a stored row."""

    name: str
    dtype: str = Field(description="As NumPy spells it, little-endian: <f4, <f2, <i4, <u2, |u1.")
    count: int = Field(ge=1)


class Output(Record):
    """One tensor per row: name, shape without the batch, dtype of the stored numbers, and how they are packed.

    ``fields`` are the bytes of a row, one after another. Any name of an encoding parses: a reader ignores outputs that
    it does not use, and refuses an unknown encoding only when it has to decode it.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    encoding: str
    fields: tuple[RowField, ...]
    temperatures: tuple[float, ...] = Field(
        default=(), description="Temperatures for which the encoding stores values."
    )


class FileRef(Record):
    """A file of the cache by relative path and content."""

    path: str
    sha256: str
    size_bytes: int


class ByteRange(Record):
    """Bytes of a file, and their SHA-256."""

    offset: int
    size_bytes: int
    digest: str


class ViewRange(Record):
    """The byte range of one view in its part, fetched by one range read and checked by its digest."""

    view: int
    offset: int
    size_bytes: int
    rows: int
    digest: str


class Statistics(Record):
    """Sums, not means, so that counts are exact in any fold of commits."""

    labelled: int = 0
    top1_hits: int = 0
    top5_hits: int = 0
    class_counts: dict[int, int] = Field(default_factory=dict)
    fidelity_rows: int = 0
    kl_sum: dict[str, float] = Field(default_factory=dict, description="Nats at T, summed over the sampled rows.")
    pearson_sum: dict[str, float] = Field(
        default_factory=dict, description="1 - correlation of the probabilities at T, summed over the sampled rows."
    )
    argmax_flips: int | float = Field(
        default=0, description="Rows with another largest class; of maps the share of such positions, summed over rows."
    )
    embedding_cosine_sum: float = 0.0
    token_cosine_sum: float = Field(
        default=0.0,
        description="Mean over a row's patch tokens, summed over the sampled rows; without tokens, not in the record.",
    )
    total_variation_sum: float = Field(
        default=0.0,
        description="Of sampled logits, instead of kl_sum and pearson_sum: half the sum of a row's differences from "
        "the exact probabilities, summed over the sampled rows. Otherwise not in the record.",
    )
    sums: dict[str, float] = Field(
        default_factory=dict,
        description="Of a task other than classification, and by domain; without any, not in the record.",
    )

    @model_serializer(mode="wrap")
    def _without_absent_sums(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        body: dict[str, Any] = serialize(self)
        for name in ("token_cosine_sum", "total_variation_sum", "sums"):
            if not getattr(self, name):
                body.pop(name, None)
        return body


class Derived(Record):
    """How a cache was made from other caches, without a teacher."""

    kind: Literal["convert", "merge", "average"]
    sources: tuple[str, ...] = Field(
        description="SHA-256 of the manifests of the source caches; merge: of an unfinished one, of its commits."
    )
    encodings: dict[str, tuple[str, str]] = Field(
        default_factory=dict, description="convert: those of the source and of this cache, by key, where they differ."
    )


class Header(VersionedRecord):
    """What a cache is built from. Created before any work; a builder with another header stops."""

    views_id: str
    views: dict[str, Any]
    fingerprint: str
    teacher: dict[str, Any]
    data: dict[str, Any]
    num_classes: int
    embedding_dim: int
    outputs: tuple[Output, ...]
    probe_logits: tuple[tuple[float, ...], ...] = Field(description="fp32 logits on four fixed images.")
    pixels: str | None = Field(
        None, description="raw or jpeg:Q: how the parts store the views. Absent from the record if they do not."
    )
    derived: Derived | None = Field(default=None, description="Absent from the record of a cache that a teacher built.")

    @model_serializer(mode="wrap")
    def _without_absent_fields(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        body: dict[str, Any] = serialize(self)
        for name in ("pixels", "derived"):
            if getattr(self, name) is None:
                body.pop(name, None)
        return body

    @property
    def input_size(self) -> Size:
        """Of the teacher, and of the views that are stored."""
        return size_of(self.teacher["size"])

    @property
    def pixel_type(self) -> pa.DataType | None:
        """The type of the column of the stored views; None: the parts have none."""
        return pixel_type(self.pixels, self.input_size)

    def output(self, name: str) -> Output | None:
        return next((output for output in self.outputs if output.name == name), None)


class Commit(VersionedRecord):
    """The only proof that a block of a shard is done."""

    fingerprint: str
    shard_id: str
    shard_size_bytes: int
    block: ViewBlock
    part: FileRef
    index: FileRef
    means: FileRef | None
    num_ok: int
    read: int
    written: int
    skipped: dict[str, int]
    views: tuple[ViewRange, ...]
    footer: ByteRange
    statistics: Statistics
    environment: dict[str, Any]

    @model_validator(mode="after")
    def _nothing_vanishes(self) -> Commit:
        if self.read != self.written + sum(self.skipped.values()):
            raise ValueError(f"read {self.read} != written {self.written} + skipped {self.skipped}")
        return self


class BuildLog(VersionedRecord):
    """Progress of one driver. Part of no digest, and removed when the build is finished."""

    host: str
    process: int
    began_s: float = Field(description="Seconds since 1970.")
    renewed_s: float
    num_parts: int = Field(description="Parts of the whole cache according to this driver's config.")
    num_before: int = Field(description="Parts that were committed when this driver began.")
    num_done: int


class Relabelled(Record):
    """Labels that were read again after the build. The current indexes are those in ``labels/``."""

    data: dict[str, Any] = Field(description="The index settings of these indexes.")


class Manifest(VersionedRecord):
    """The fold of all commits: constant in size, written last. A cache without it is unfinished."""

    header_sha256: str
    views_id: str
    fingerprint: str
    base: str = Field(description="Folder URL of the shards; a training config may name another.")
    num_shards: int
    num_samples: int
    num_ok: int
    num_views: int = Field(description="V: views complete for every shard.")
    size_bytes: int = Field(description="All parts.")
    skipped: dict[str, int]
    statistics: Statistics
    shards: FileRef
    parts: FileRef
    class_means: FileRef | None
    environment: dict[str, Any] = Field(description="Numeric environment of the first part, for messages on drift.")
    labels: Relabelled | None = Field(None, description="Absent from the record if the cache was never relabelled.")

    @model_serializer(mode="wrap")
    def _without_absent_labels(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """The record of a cache that was never relabelled has no such key, as in earlier versions."""
        body: dict[str, Any] = serialize(self)
        if self.labels is None:
            body.pop("labels", None)
        return body


class Moments(VersionedRecord):
    """Mean and covariance of the embeddings of a finished cache in one state. Created once, by ``cache moments``."""

    manifest_sha256: str = Field(description="Of the manifest that describes the state.")
    fingerprint: str
    num_rows: int = Field(description="Of all views that are complete for every shard.")
    num_mixed: int = Field(description="Rows whose pixels are mixed with those of another image.")
    skipped: dict[str, int] = Field(description="Samples without outputs, by status, as in the manifest.")
    num_further: int = Field(description="Rows of the eval pass and of views that some shards lack: left out.")
    table: FileRef
