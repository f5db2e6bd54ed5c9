"""The index of a shard: one row for each sample in tar order, final after a full decode, with reproducible bytes."""

from __future__ import annotations

import io
import json
import shlex
from array import array
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import xxhash
from numpy.typing import NDArray

from pipeline import storage
from pipeline.core.bounded_parquet import read_bounded
from pipeline.core.errors import CacheError, ShardError, StillroomError, first_line
from pipeline.core.hashing import canonical_json, differences
from pipeline.core.redaction import redact
from pipeline.core.threads import map_ordered
from pipeline.shards.decode import BadImageError, BadStatus, decode
from pipeline.shards.members import image_extensions
from pipeline.shards.omissions import Omissions, merged
from pipeline.shards.shard_urls import shard_id
from pipeline.shards.tar import MemberRules, Sample, TarNotes, read_samples
from pipeline.tasks import Targets, Task, task_of, task_settings
from pipeline.tasks.dense import OFFSET, SIZE, StoredTarget
from schemas.cache_format import FORMAT_VERSION, Status, index_schema
from schemas.config import DataConfig, HeadConfig

STATUSES: tuple[Status, ...] = get_args(Status)
"""``ShardIndex.status`` holds positions in this tuple."""
_OK = STATUSES.index("ok")

_METADATA_KEY = b"stillroom"
_ROWS_PER_GROUP = 65_536
_NUM_NAMED = 5
_NUM_REASONS = 20
# Of the columns of ``ShardIndex``, as the standard library's array spells the types.
_TYPE_CODES = {
    "status": "B",
    "offset": "q",
    "size": "i",
    "width": "i",
    "height": "i",
    "content_hash": "Q",
}


@dataclass(frozen=True, eq=False)
class ShardIndex:
    """Columns over the N samples of one shard, in tar order.

    Attributes:
        targets: the task's target columns.
        member_rules: the rules by which members of the tar became samples. Stored if the two rules differ for this tar.
        reasons: why samples are bad, by row, as far as known. Not stored, because texts of a decoder change with its
            version.
        omitted: members of the tar that belong to no sample. Not stored.
    """

    shard_id: str
    keys: pa.StringArray
    task: Task
    targets: Targets
    status: NDArray[np.uint8]  # position in STATUSES
    offset: NDArray[np.int64]  # bytes into the tar; 0 without an image
    size: NDArray[np.int32]  # bytes
    width: NDArray[np.int32]  # pixels after EXIF rotation; 0 unless ok
    height: NDArray[np.int32]
    content_hash: NDArray[np.uint64]  # xxh3 of the encoded image
    member_rules: MemberRules = 1
    reasons: Mapping[int, str] = field(default_factory=dict[int, str])
    omitted: Omissions = field(default_factory=Omissions)

    def __len__(self) -> int:
        return len(self.status)

    @cached_property
    def row(self) -> NDArray[np.int32]:
        """0 … N−1."""
        return np.arange(len(self), dtype=np.int32)

    @cached_property
    def ok(self) -> NDArray[np.int64]:
        """Rows with a usable image, ascending. Pairing, order and counts use only these."""
        return np.flatnonzero(self.status == _OK)

    @property
    def num_ok(self) -> int:
        return len(self.ok)

    @property
    def ok_targets(self) -> Targets:
        """Target columns of the ok rows."""
        return {name: values[self.ok] for name, values in self.targets.items()}

    def sample_ids(self, rows: Sequence[int] | NDArray[np.integer[Any]]) -> list[str]:
        """``shard_id/key`` of each row."""
        return [f"{self.shard_id}/{key}" for key in self.keys.take(pa.array(rows, pa.int64())).to_pylist()]


class IndexBuilder:
    """Collects rows in tar order; about 50 bytes per row in addition to keys and targets."""

    def __init__(self, shard_id: str, task: Task) -> None:
        self._shard_id, self._task = shard_id, task.of_shard(shard_id)
        self._keys: list[str] = []
        self._targets: list[Any | None] = []
        self._columns = {name: array(code) for name, code in _TYPE_CODES.items()}
        self._reasons: dict[int, str] = {}
        self.notes = TarNotes()
        """For ``read_samples`` to fill."""

    def add(self, sample: Sample, status: Status, width: int, height: int, reason: str | None = None) -> None:
        """Appends one sample with the result of decoding it; width and height are 0 unless the status is ok.

        Args:
            reason: why the image cannot be decoded.
        """
        assert sample.row == len(self._keys), "rows are added in tar order"
        self._keys.append(sample.key)
        self._targets.append(self._task.without_content(sample.target))
        content_hash = xxhash.xxh3_64_intdigest(sample.data)
        row = (STATUSES.index(status), sample.offset, sample.size, width, height, content_hash)
        for column, value in zip(self._columns.values(), row, strict=True):
            column.append(value)
        if reason is not None and len(self._reasons) < _NUM_REASONS:
            self._reasons[sample.row] = reason

    def finish(self) -> ShardIndex:
        return ShardIndex(
            shard_id=self._shard_id,
            keys=pa.array(self._keys, pa.string()),
            task=self._task,
            targets=self._task.rows(self._targets),
            **{name: np.array(column) for name, column in self._columns.items()},
            member_rules=2 if self.notes.rules_differ else 1,
            reasons=dict(self._reasons),
            omitted=self.notes.omissions,
        )


def index_settings(data: DataConfig) -> dict[str, Any]:
    """Settings that determine an index together with the tar: stored with it, and compared when it is used."""
    return {
        "image": image_extensions(data),
        **task_settings(data),
        "max_pixels": data.max_pixels,
    }


def data_keys(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The keys of ``data`` that lead to these ``index_settings``, and their values."""
    keys = {**settings, "image": ";".join(settings["image"])}
    if "classes" in settings:
        keys["classes"] = tuple(settings["classes"])
    if heads := settings.get("heads"):
        keys["heads"] = {name: HeadConfig.model_validate(head) for name, head in heads.items()}
    return keys


def index_shard(path: Path, data: DataConfig, *, where: str, threads: int = 1, rules: MemberRules = 2) -> ShardIndex:
    """Indexes a local tar by decoding every image, with a few images of each thread in memory.

    Args:
        where: the shard's URL, which names it.
        rules: 1 for the bytes of an index that an earlier version built.

    Raises:
        ShardError: the tar is damaged or a label cannot be used. Bad images become rows; see ``check_samples``.
    """
    task = task_of(data)
    builder = IndexBuilder(shard_id(where), task)
    samples = read_samples(path, data, where=where, rules=rules, notes=builder.notes)

    def measure(sample: Sample) -> tuple[Sample, Status, int, int, str | None]:
        return sample, *_measure(sample, task, max_pixels=data.max_pixels)

    for row in map_ordered(measure, samples, threads=threads, name="decode"):
        builder.add(*row)
    return builder.finish()


def _measure(sample: Sample, task: Task, *, max_pixels: int) -> tuple[Status, int, int, str | None]:
    """(status, width, height, reason) after a full decode."""
    if sample.status != "ok":
        return sample.status, 0, 0, None
    try:
        _, height, width = decode(sample.data, max_pixels=max_pixels).shape
    except BadImageError as error:
        return error.status, 0, 0, error.reason
    reason = task.check_target(sample.target, width, height)
    return ("ok", width, height, None) if reason is None else ("bad_target", 0, 0, reason)


def check_samples(index: ShardIndex, data: DataConfig, *, where: str) -> None:
    """Applies ``data.bad_samples``: fail refuses any sample that is not ok, skip allows up to ``data.max_bad_share`` of
    them.

    Args:
        where: the shard's URL. The first bad images of a stored index are read from there, to report their reasons.

    Raises:
        ShardError: names the counts, the first keys and their reasons.
    """
    rows = _bad_rows(index)
    skips = data.bad_samples == "skip"
    if len(rows) <= (data.max_bad_share * len(index) if skips else 0):
        return
    counts = Counter(STATUSES[index.status[row]] for row in rows)
    first = [f"{index.keys[row].as_py()} ({_status_and_reason(index, row, data, where)})" for row in rows[:_NUM_NAMED]]
    raise ShardError(
        f"{len(rows)} of {len(index)} samples cannot be used",
        code="shard.bad-samples",
        where=redact(where),
        got=f"{', '.join(f'{count} {status}' for status, count in sorted(counts.items()))}; first {', '.join(first)}",
        expected=f"at most {data.max_bad_share:.4g} of them bad (data.max_bad_share)"
        if skips
        else f"one whole JPEG, PNG or WebP image a sample, every key once{_expected_target(index, counts)}",
        next_step=_next_step(index, skips=skips),
    )


def _expected_target(index: ShardIndex, counts: Mapping[Status, int]) -> str:
    return f", {index.task.member_content} that fits the image" if "bad_target" in counts else ""


def _next_step(index: ShardIndex, *, skips: bool) -> str:
    duplicates = index.status == STATUSES.index("duplicate_key")
    if (duplicates & (index.size == 0)).any():
        tar = shlex.quote(f"{index.shard_id}.tar")
        return (
            "write the tar again in name order, because the members of a sample must follow one another: "
            f"mkdir t sorted && tar -xf {tar} -C t && "
            f"(cd t && find . -type f -printf '%P\\n' | LC_ALL=C sort | tar -cf ../sorted/{tar} -T -)"
        )
    if skips:
        return "repair the shard, or raise data.max_bad_share"
    return "repair the shard, or set data.bad_samples=skip to record and skip them"


def _bad_rows(index: ShardIndex) -> list[int]:
    return np.flatnonzero(index.status != _OK).tolist()


def _status_and_reason(index: ShardIndex, row: int, data: DataConfig, url: str) -> str:
    status = STATUSES[index.status[row]]
    reason = index.reasons.get(row)
    if reason is None and status in (*get_args(BadStatus), "bad_target") and index.size[row]:
        try:
            reason = _reason(index, row, data, url)
        except StillroomError as error:
            reason = f"its reason is not stored, and the shard cannot be read: {error.what}"
    return f"{status}: {reason}" if reason else status


def _reason(index: ShardIndex, row: int, data: DataConfig, url: str) -> str | None:
    """Read again from the shard."""
    try:
        image = storage.read_range(url, int(index.offset[row]), int(index.size[row]))
        _, height, width = decode(image, max_pixels=data.max_pixels).shape
    except BadImageError as error:
        return error.reason
    if STATUSES[index.status[row]] != "bad_target":
        return None
    offset, size = int(index.targets[OFFSET][row]), int(index.targets[SIZE][row])
    target = StoredTarget(offset, size, 0, storage.read_range(url, offset, size))
    task = task_of(data.model_copy(update={"domain": None}))
    return task.check_target(target, width, height)


def omissions_of(index: ShardIndex) -> Omissions:
    """What the index omits: members of the tar that belong to no sample, and bad samples with their reasons."""
    bad = Omissions()
    for row in _bad_rows(index):
        reason = index.reasons.get(row)
        name = f"{index.shard_id}/{index.keys[row].as_py()}"
        bad.add(f"{STATUSES[index.status[row]]} samples", f"{name}: {reason}" if reason else name)
    return merged([index.omitted, bad])


def encode_index(index: ShardIndex, settings: Mapping[str, Any]) -> bytes:
    """Parquet bytes of ``index_schema``: equal for equal index, settings and pyarrow."""
    columns: list[pa.Array] = [
        pa.array(index.row),
        index.keys,
        pa.DictionaryArray.from_arrays(pa.array(index.status, pa.int8()), pa.array(STATUSES)).dictionary_decode(),
        *(column.to_arrow(index.targets[column.name]) for column in index.task.columns),
        *(pa.array(column) for column in (index.offset, index.size, index.width, index.height, index.content_hash)),
    ]
    metadata = {"format_version": FORMAT_VERSION, "shard_id": index.shard_id, "settings": dict(settings)}
    if index.member_rules != 1:
        metadata["member_rules"] = index.member_rules
    schema = _schema(index.task).with_metadata({_METADATA_KEY: canonical_json(metadata)})
    sink = io.BytesIO()
    pq.write_table(
        pa.Table.from_arrays(columns, schema=schema),
        sink,
        row_group_size=_ROWS_PER_GROUP,
        compression="zstd",
        use_dictionary=["status", *index.targets],  # pyright: ignore[reportArgumentType]
        write_page_checksum=True,
    )
    return sink.getvalue()


def decode_index(data: bytes, *, where: str, settings: Mapping[str, Any] | None = None) -> ShardIndex:
    """The index that ``encode_index`` wrote.

    Args:
        settings: settings of the reader's config; an index with other settings is refused. None accepts any.

    Raises:
        CacheError: the index is damaged, of another format version, or built with other settings.
    """
    try:
        table = read_bounded(pa.BufferReader(data), size_bytes=len(data), page_checksum_verification=True)
        metadata = _metadata(table, settings, where)
        task = task_of(metadata["settings"]).of_shard(metadata["shard_id"])
        if (rules := metadata.get("member_rules", 1)) not in get_args(MemberRules):
            raise ValueError(f"its member_rules are {rules!r}")
        return replace(_from_table(table, metadata["shard_id"], task), member_rules=rules)
    # pyarrow raises ArrowException or OSError for invalid bytes. The others are checks of this module.
    except (pa.ArrowException, OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CacheError(
            "this index is damaged",
            code="shard.index-damaged",
            where=redact(where),
            got=first_line(error),
            next_step="remove it, and index the shard again",
        ) from error


def _metadata(table: pa.Table, settings: Mapping[str, Any] | None, where: str) -> dict[str, Any]:
    metadata: dict[str, Any] = json.loads((table.schema.metadata or {})[_METADATA_KEY])
    if metadata["format_version"] != FORMAT_VERSION:
        raise CacheError(
            "this index has an unknown format version",
            code="shard.index-version",
            where=redact(where),
            got=metadata["format_version"],
            expected=FORMAT_VERSION,
            next_step="index the shard again",
        )
    if settings is not None and (changed := differences(metadata["settings"], settings)):
        raise CacheError(
            "this index was built with different settings",
            code="shard.index-settings",
            where=redact(where),
            got="; ".join(changed),
            next_step="use the settings of the index, or another data.index",
        )
    return metadata


def _schema(task: Task) -> pa.Schema:
    return index_schema({column.name: column.type for column in task.columns})


def _from_table(table: pa.Table, shard_id: str, task: Task) -> ShardIndex:
    schema = _schema(task)
    if not table.schema.equals(schema):
        raise ValueError(f"its columns are {table.schema.names}, not those of an index, or of other types")
    if with_nulls := [field.name for field in schema if not field.nullable and table[field.name].null_count]:
        raise ValueError(f"nulls in {', '.join(with_nulls)}")
    if not np.array_equal(table["row"].to_numpy(), np.arange(len(table))):
        raise ValueError("its rows are not 0, 1, 2 … in order")
    names: list[Status] = table["status"].to_pylist()
    if unknown := {*names} - {*STATUSES}:
        raise ValueError(f"unknown status {', '.join(sorted(unknown))}")
    status = np.array([STATUSES.index(name) for name in names], np.uint8)
    numbers = {name: table[name].to_numpy() for name in ("offset", "size", "width", "height", "content_hash")}
    targets = {column.name: column.to_numpy(table[column.name]) for column in task.columns}
    keys = table["key"].combine_chunks()
    return ShardIndex(shard_id, keys, task, targets, status=status, **numbers)
