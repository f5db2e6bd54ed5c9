"""A cache in other encodings, or of fewer views or shards, from the stored outputs of another cache.

Of outputs that are stored in fp32 the result has the bytes that the teacher's build would have. Of others it is made
from the decoded outputs: then both encodings have lost something, the header lists them, and the fingerprint differs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from pipeline import storage
from pipeline.cache.build.class_means import ClassSums
from pipeline.cache.build.statistics import StatisticsSum
from pipeline.cache.derive.derivation import (
    Derivation,
    Item,
    Run,
    blocks_of,
    check_logits,
    derive,
    fetch,
    manifest_sha256,
    open_source,
    publish_part,
    publish_same,
    row_chunks,
    source_commit,
)
from pipeline.cache.format.codec import (
    RowIdentity,
    column_name,
    config_key,
    decode,
    depends_on_temperature,
    encode,
    row_bytes,
    stored_outputs,
)
from pipeline.cache.format.header import plan_of
from pipeline.cache.read.reader import TeacherCache
from pipeline.core.errors import CacheError, ConfigError
from pipeline.core.hashing import short_digest
from pipeline.core.redaction import redact
from pipeline.tasks import OutputSpec, output_roles
from schemas.cache_format import Commit, Derived, FileRef, Header, Manifest, Output, Statistics, ViewBlock

_HEAD = "head"
_FIELDS = {
    "class": ("kl_sum", "pearson_sum", "total_variation_sum", "argmax_flips"),
    "map": ("kl_sum", "pearson_sum", "argmax_flips"),
    "embedding": ("embedding_cosine_sum",),
    "tokens": ("token_cosine_sum",),
}
"""The fields of ``Statistics`` that measure an output, by its role."""


def convert(
    source_url: str,
    destination_url: str,
    *,
    encodings: Mapping[str, str],
    num_views: int | None = None,
    shard_ids: Sequence[str] | None = None,
    run: Run | None = None,
    add_up: Callable[[str, Sequence[FileRef]], ClassSums] | None = None,
) -> Manifest:
    """Derives the cache. A repeated call continues.

    Args:
        encodings: new ones by key of the ``cache`` section, such as ``{"logits": "int8"}``; ``none`` leaves an output
            out.
        num_views: the first views alone; None: all.
        shard_ids: these shards alone, in the order of the source; None: all.

    Raises:
        CacheError: the source is unfinished, damaged or relabelled, does not store an output, or does not have these
            views or shards; or the destination has another cache.
        ConfigError: nothing would change, or an encoding does not fit the output.
    """
    source = open_source(source_url)
    header = converted_header(source, encodings)
    shards = _selected_shards(source, shard_ids)
    items = _selected_blocks(source, shards, num_views)
    if not (header.derived and header.derived.encodings) and (shard_ids, num_views) == (None, None):
        raise ConfigError(
            "this conversion would change nothing",
            code="config.nothing-to-convert",
            where="stillroom cache convert",
            got=f"the encodings of {redact(source_url)}",
            next_step="pass other encodings, --views or --shards; to copy a cache, run: stillroom cache copy SRC DST",
        )
    derivation = Derivation(((source.url, source.manifest_bytes),), destination_url, header)
    return derive(derivation, convert_block, items, shards, run=run, add_up=add_up)


def converted_header(source: TeacherCache, encodings: Mapping[str, str]) -> Header:
    """
    Raises:
        CacheError: an output is not stored, or cannot be decoded for another encoding.
        ConfigError: an encoding does not fit the output.
    """
    old = source.header
    changed = {key: (_stored_kind(source, key), kind) for key, kind in encodings.items()}
    changed = {key: kinds for key, kinds in changed.items() if kinds[0] != kinds[1]}
    for key, (stored, kind) in changed.items():
        _check_convertible(source, key, stored, kind)
    if "logits" in changed:
        check_logits(old, changed["logits"][1])
    teacher = _converted_teacher(old.teacher, changed)
    outputs = [found for output in old.outputs if (found := _converted_output(output, changed)) is not None]
    return old.model_copy(
        update={
            "teacher": teacher,
            "fingerprint": short_digest(teacher),
            "outputs": tuple(outputs),
            "derived": Derived(kind="convert", sources=(manifest_sha256(source),), encodings=changed),
        }
    )


def _stored_kind(source: TeacherCache, key: str) -> str:
    return str(source.header.teacher.get(key, "none"))


def _check_convertible(source: TeacherCache, key: str, stored: str, kind: str) -> None:
    if stored == "none":
        raise CacheError(
            f"this cache does not store these outputs, so they cannot be converted: {key}",
            code="cache.output-not-stored",
            where=redact(source.url),
            got=f"cache.{key}=none",
            next_step=f"leave out --{key}, or build a cache with cache.{key}={kind}",
        )
    outputs = [output for output in source.header.outputs if config_key(output.name) == key]
    computed = any(column_name(output) != output.name for output in source.header.outputs)
    if kind == _HEAD or (computed and key in ("logits", "embeddings")):
        raise CacheError(
            "logits that a linear head computes from stored embeddings are bound to the encoding of these",
            code="cache.not-convertible",
            where=redact(source.url),
            got=f"cache.{key}: {stored} -> {kind}",
            expected="stored logits, before and after",
            next_step="convert a cache that stores logits, or build one with cache.logits=head",
        )
    if kind != "none" and any(map(depends_on_temperature, outputs)):
        raise CacheError(
            f"the {key} of this cache are stored for a few temperatures, and other encodings have to serve all",
            code="cache.not-convertible",
            where=redact(source.url),
            got=f"cache.{key}={stored}",
            expected="an encoding of single numbers, such as fp16 or int8",
            next_step="convert a cache with such an encoding",
        )


def _converted_teacher(teacher: Mapping[str, Any], changed: Mapping[str, tuple[str, str]]) -> dict[str, Any]:
    """The fingerprint's content: as a build would write it, and ``decoded_from`` for outputs that lost something
    before."""
    body: dict[str, Any] = {**teacher, **{key: kind for key, (_, kind) in changed.items()}}
    decoded_from: dict[str, list[str]] = {key: [*kinds] for key, kinds in body.pop("decoded_from", {}).items()}
    for key, (stored, kind) in changed.items():
        chain = [*decoded_from.pop(key, []), *([] if stored == "fp32" else [stored])]
        if chain and kind != "none":
            decoded_from[key] = chain
    if body.get("tokens") == "none":
        body = {key: value for key, value in body.items() if not key.startswith("tokens")}
    return body | ({"decoded_from": decoded_from} if decoded_from else {})


def _converted_output(output: Output, changed: Mapping[str, tuple[str, str]]) -> Output | None:
    kinds = changed.get(config_key(output.name))
    if kinds is None:
        return output
    found = stored_outputs([OutputSpec(output.name, output.shape, kinds[1])])
    return found[0] if found else None


def _selected_shards(source: TeacherCache, shard_ids: Sequence[str] | None) -> dict[str, str]:
    """URLs by shard id."""
    urls = {shard.shard_id: source.shard_url(shard) for shard in source.shards}
    if shard_ids is None:
        return urls
    unknown = [shard for shard in shard_ids if shard not in urls]
    if unknown:
        raise CacheError(
            f"{len(unknown)} of {len(shard_ids)} shards are not in the cache",
            code="cache.missing-shards",
            where=redact(source.url),
            got=", ".join(unknown[:5]),
            next_step="name shards that stillroom cache inspect counts, as the build read them",
        )
    return {shard: url for shard, url in urls.items() if shard in set(shard_ids)}


def _selected_blocks(source: TeacherCache, shards: Mapping[str, str], num_views: int | None) -> list[Item]:
    """
    Raises:
        CacheError: the views end inside a block.
    """
    blocks = {shard: found for shard, found in blocks_of(source).items() if shard in shards}
    if num_views is not None:
        ends = [{block.stop for block in found if not block.is_eval} for found in blocks.values()]
        common = sorted(end for end in set.intersection(*ends) if end <= source.num_views)
        if num_views not in common:
            raise CacheError(
                "views are converted in whole blocks, as the build made them",
                code="cache.views-not-whole",
                where=f"--views, against {redact(source.url)}",
                got=f"0-{num_views - 1}",
                expected=", ".join(f"0-{end - 1}" for end in common),
                next_step="choose one of these; a training that needs fewer views can set data.num_views",
            )
        blocks = {shard: [block for block in found if _is_within(block, num_views)] for shard, found in blocks.items()}
    return [(shard, block) for shard, found in blocks.items() for block in found]


def _is_within(block: ViewBlock, num_views: int) -> bool:
    return block.is_eval or block.stop <= num_views


def convert_block(derivation: Derivation, item: Item) -> Commit:
    """Publishes the files of a block, and returns its commit, which is not published yet."""
    (source,) = derivation.opened()
    commit, header = source_commit(source, item), derivation.header
    with storage.scratch_folder() as scratch:
        publish_same(derivation, source.url, commit.index, scratch)
        publish_same(derivation, source.url, commit.means, scratch)
        if header.fingerprint == source.header.fingerprint:
            publish_same(derivation, source.url, commit.part, scratch)
            return commit
        converter = BlockConverter(source, header, commit, fetch(source.url, commit.part, scratch))
        converted = publish_part(derivation, item, commit, converter.batches(), converter.schema, scratch)
    return converted.model_copy(update={"statistics": converter.statistics()})


class BlockConverter:
    """Encodes the outputs of a block again. All other columns stay as they are, also those that this version does not
    know.

    Attributes:
        schema: of the converted part.
        chunk_rows: of a batch, except the last one of a view.
    """

    def __init__(self, source: TeacherCache, header: Header, commit: Commit, part: Path) -> None:
        assert header.derived is not None
        changed, new = header.derived.encodings, {output.name: output for output in header.outputs}
        old = [output for output in source.header.outputs if config_key(output.name) in changed]
        self._pairs = {output.name: (output, new.get(output.name)) for output in old}
        self._commit, self._part = commit, part
        self.schema = pa.schema([field for item in pq.read_schema(part) if (field := self._field(item)) is not None])
        index = source.index(next(shard for shard in source.shards if shard.shard_id == commit.shard_id))
        self._sample_ids, self._task = index.sample_ids(index.ok), index.task
        self.chunk_rows = plan_of(source.header).mix_group
        measured = [output for _, output in self._pairs.values() if output is not None]
        self._fidelity = StatisticsSum(measured, self._task)

    def _field(self, field: pa.Field) -> pa.Field | None:
        if field.name not in self._pairs:
            return field
        output = self._pairs[field.name][1]
        return None if output is None else field.with_type(pa.binary(row_bytes(output)))

    def batches(self) -> Iterator[tuple[int, pa.RecordBatch]]:
        """(view, rows) of the converted part, in order. Counts the fidelity."""
        start, last_view = 0, None
        for view, chunk in row_chunks(self._part, self._commit, self.chunk_rows):
            start, last_view = (start if view == last_view else 0), view
            yield view, self._convert(chunk, RowIdentity(self._sample_ids[start : start + len(chunk)], view))
            start += len(chunk)

    def _convert(self, chunk: pa.Table, rows: RowIdentity) -> pa.RecordBatch:
        columns = {name: chunk[name].combine_chunks() for name in self.schema.names}
        decoded: dict[str, NDArray[np.float32]] = {}
        for name, (old, new) in self._pairs.items():
            if new is not None:
                decoded[name] = decode(columns[name], old)
                columns[name] = encode(decoded[name], new, keys=rows.sample_ids, identity=rows)
        self._fidelity.add_fidelity(rows, decoded)
        return pa.record_batch([*columns.values()], schema=self.schema)

    def statistics(self) -> Statistics:
        """Of the source, with the fidelity of converted outputs to those of the source, after all batches."""
        roles, measured = output_roles(self._task), self._fidelity.result()
        names = [field for name in self._pairs for field in _FIELDS.get(roles.get(name, ""), ())]
        return self._commit.statistics.model_copy(update={name: getattr(measured, name) for name in names})
