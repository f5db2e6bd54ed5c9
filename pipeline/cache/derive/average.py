"""The mean of several teachers' logits, or of their probabilities at one temperature, as the cache of one teacher."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from pipeline import storage
from pipeline.cache.build.class_means import ClassSums
from pipeline.cache.build.header_claim import MAX_DRIFT
from pipeline.cache.build.statistics import StatisticsSum
from pipeline.cache.derive.derivation import (
    Derivation,
    Item,
    Run,
    blocks_of,
    check_equal,
    check_logits,
    check_several,
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
    is_sampled,
    row_bytes,
    stored_outputs,
)
from pipeline.cache.format.header import plan_of
from pipeline.cache.read.reader import TeacherCache
from pipeline.core.errors import CacheError, ConfigError
from pipeline.core.hashing import short_digest
from pipeline.core.redaction import redact
from pipeline.shards.index import ShardIndex
from pipeline.tasks import OutputSpec
from schemas.cache_format import Commit, Derived, FileRef, Header, Manifest, Output, Statistics

_COMPARED = ("views", "data", "num_classes", "pixels")
_INPUT = ("size", "interpolation", "views_id")
_NORM = "embedding_norm"


@dataclass(frozen=True, slots=True)
class AverageRequest:
    """
    Attributes:
        weights: of the sources, in their order; they are divided by their sum.
        temperature: of the probabilities whose mean is stored; None: the mean of the logits.
        logits: encoding of the result.
    """

    weights: tuple[float, ...]
    temperature: float | None
    logits: str


def average(
    source_urls: Sequence[str],
    destination_url: str,
    request: AverageRequest,
    *,
    run: Run | None = None,
    add_up: Callable[[str, Sequence[FileRef]], ClassSums] | None = None,
) -> Manifest:
    """Derives the cache, without embeddings, tokens and class means. A repeated call continues.

    Raises:
        CacheError: the sources differ in views, samples, pixels or blocks, or one has no logits for any temperature;
            or the destination has another cache.
        ConfigError: there are fewer than two sources, or weights that are not positive.
    """
    sources = tuple(map(open_source, source_urls))
    header = averaged_header(sources, request)
    blocks = _common_blocks(sources)
    urls = {shard.shard_id: sources[0].shard_url(shard) for shard in sources[0].shards}
    derivation = Derivation(tuple((cache.url, cache.manifest_bytes) for cache in sources), destination_url, header)
    return derive(derivation, average_block, blocks, urls, run=run, add_up=add_up)


def averaged_header(sources: Sequence[TeacherCache], request: AverageRequest) -> Header:
    """
    Raises:
        CacheError: the sources differ in views, classes, reading rules or input size.
        ConfigError: the weights do not fit.
    """
    _check_request(sources, request)
    check_equal(
        [(cache.url, _compared(cache.header)) for cache in sources],
        "the outputs of these caches are not of the same views",
        code="cache.average-differs",
        next_step="build both over the same shards, with one data and one views section",
    )
    check_logits(sources[0].header, request.logits)
    outputs = [_averaged_output(output, request) for output in _logits_of(sources[0])]
    teacher = _averaged_teacher([cache.header.teacher for cache in sources], request)
    teacher["average"]["fingerprints"] = [cache.header.fingerprint for cache in sources]
    probes = [
        np.array(cache.header.probe_logits, np.float64) * (weight / sum(request.weights))
        for cache, weight in zip(sources, request.weights, strict=True)
    ]
    return sources[0].header.model_copy(
        update={
            "teacher": teacher,
            "fingerprint": short_digest(teacher),
            "embedding_dim": 0,
            "outputs": tuple(outputs),
            "probe_logits": tuple(map(tuple, np.sum(probes, axis=0).tolist())),
            "derived": Derived(kind="average", sources=tuple(map(manifest_sha256, sources))),
        }
    )


def _compared(header: Header) -> dict[str, Any]:
    return {
        **header.model_dump(mode="json", include={*_COMPARED}),
        "teacher": {key: header.teacher[key] for key in _INPUT},
    }


def left_out(sources: Sequence[TeacherCache]) -> dict[str, int]:
    """What the sources have and an average has not, with the number of sources that have it.

    Embeddings of different networks have different axes, and those of one network are in its cache.
    """
    counts: Counter[str] = Counter()
    for cache in sources:
        averaged = _logits_of(cache)
        counts.update(output.name for output in cache.header.outputs if output not in averaged)
        counts["class means"] += cache.manifest.class_means is not None
        counts["eval pass"] += any(block.is_eval for found in blocks_of(cache).values() for block in found)
    return {name: count for name, count in counts.items() if count}


def _check_request(sources: Sequence[TeacherCache], request: AverageRequest) -> None:
    check_several([cache.url for cache in sources], "average")
    if len(request.weights) != len(sources) or not all(0 < weight < np.inf for weight in request.weights):
        raise ConfigError(
            "these are not one weight above 0 for each cache",
            code="config.average-weights",
            where="--weights",
            got=list(request.weights),
            expected=f"{len(sources)} numbers",
        )
    for cache in sources:
        outputs = _logits_of(cache)
        # Those of a head are no column of their own.
        fixed = [output for output in outputs if depends_on_temperature(output) or column_name(output) != output.name]
        if not outputs or fixed:
            raise CacheError(
                "this cache stores no logits that serve all temperatures",
                code="cache.not-convertible",
                where=redact(cache.url),
                got=f"cache.logits={cache.header.teacher.get('logits')}",
                next_step="average caches with fp32, fp16, int8, int8t or int4",
            )


def _logits_of(cache: TeacherCache) -> list[Output]:
    return [output for output in cache.header.outputs if config_key(output.name) == "logits"]


def _averaged_output(output: Output, request: AverageRequest) -> Output:
    (found,) = stored_outputs([OutputSpec(output.name, output.shape, request.logits)])
    if request.temperature is None:
        return found
    if is_sampled(found) and found.temperatures != (request.temperature,):
        raise ConfigError(
            "probabilities at one temperature are sampled at another",
            code="config.average-temperature",
            where="--logits, --temperature",
            got=f"{request.logits}, --temperature {request.temperature:g}",
            expected="one temperature",
        )
    # Readers refuse other temperatures than this one.
    return found.model_copy(update={"temperatures": (request.temperature,)})


def _averaged_teacher(teachers: Sequence[dict[str, Any]], request: AverageRequest) -> dict[str, Any]:
    first, num_classes = teachers[0], teachers[0]["architecture"]["num_classes"]
    precisions = sorted((str(teacher["precision"]) for teacher in teachers), key=lambda name: MAX_DRIFT[name])
    return {
        **{key: first[key] for key in (*_INPUT, "mean", "std")},
        "architecture": {"model": "average", "kwargs": {}, "num_classes": num_classes},
        "weights": "average",
        "precision": precisions[-1],
        "logits": request.logits,
        "embeddings": "none",
        "class_means": "none",
        "average": {
            "of": "logits" if request.temperature is None else "probabilities",
            "temperature": request.temperature,
            "weights": [*request.weights],
        },
    }


def _common_blocks(sources: Sequence[TeacherCache]) -> list[Item]:
    """Blocks of views without the eval pass, which is for class means."""
    blocks = [
        {(shard, block) for shard, found in blocks_of(cache).items() for block in found if not block.is_eval}
        for cache in sources
    ]
    for cache, found in zip(sources[1:], blocks[1:], strict=True):
        if changed := sorted(f"{block.name} of {shard}" for shard, block in found ^ blocks[0]):
            raise CacheError(
                "these caches have different shards, or different blocks of views",
                code="cache.average-differs",
                where=f"{redact(sources[0].url)} -> {redact(cache.url)}",
                got=f"{len(changed)} blocks, first {changed[0]}",
                next_step="convert --shards or --views, or build them with one cache.views_per_part",
            )
    order = {shard.shard_id: number for number, shard in enumerate(sources[0].shards)}
    return sorted(blocks[0], key=lambda item: (order[item[0]], item[1].start))


def average_block(derivation: Derivation, item: Item) -> Commit:
    """Publishes the files of a block, and returns its commit, which is not published yet."""
    sources = derivation.opened()
    commits = [source_commit(cache, item) for cache in sources]
    first = commits[0]
    with storage.scratch_folder() as scratch:
        publish_same(derivation, sources[0].url, first.index, scratch)
        parts = [fetch(cache.url, commit.part, scratch) for cache, commit in zip(sources, commits, strict=True)]
        averager = BlockAverager(sources, derivation.header, commits, parts)
        commit = publish_part(derivation, item, first, averager.batches(), averager.schema, scratch)
    return commit.model_copy(update={"means": None, "statistics": averager.statistics()})


class BlockAverager:
    """Averages the logits of a block in float64, and compares all other columns of the sources.

    Args:
        parts: local paths of the parts of the sources.

    Attributes:
        schema: of the averaged part.
        chunk_rows: of a batch, except the last one of a view.
    """

    def __init__(
        self, sources: Sequence[TeacherCache], header: Header, commits: Sequence[Commit], parts: Sequence[Path]
    ) -> None:
        self._sources, self._header, self._commits, self._parts = sources, header, commits, parts
        self.schema = pa.schema(
            [field for item in pq.read_schema(parts[0]) if (field := self._field(item)) is not None]
        )
        indexes = [_index(cache, commits[0].shard_id) for cache in sources]
        self._index, self.chunk_rows = indexes[0], plan_of(header).mix_group
        self._mixes = plan_of(header).mixes
        self._sample_ids = self._index.sample_ids(self._index.ok)
        # The fidelity is measured at all temperatures, also of outputs that serve one; but not that of samples.
        measured = [
            output if is_sampled(output) else output.model_copy(update={"temperatures": ()})
            for output in header.outputs
        ]
        self._statistics = StatisticsSum(measured if self._is_fixed(header) else header.outputs, self._index.task)
        self._task_sums = self._index.task.accumulate()

    def _field(self, field: pa.Field) -> pa.Field | None:
        output = self._header.output(field.name)
        if output is not None:
            return field.with_type(pa.binary(row_bytes(output)))
        return field if field.name == _NORM or field.name not in self._own(0) else None

    def batches(self) -> Iterator[tuple[int, pa.RecordBatch]]:
        """(view, rows) of the averaged part, in order. Counts the statistics.

        Raises:
            CacheError: rows, views or canaries of the sources differ.
        """
        start, last_view = 0, None
        sources = [
            row_chunks(part, commit, self.chunk_rows) for part, commit in zip(self._parts, self._commits, strict=True)
        ]
        for found in zip(*sources, strict=True):
            view = found[0][0]
            start, last_view = (start if view == last_view else 0), view
            chunks = [chunk for _, chunk in found]
            for number, chunk in enumerate(chunks[1:], start=1):
                self._check_same(chunks[0], chunk, number, view)
            yield view, self._average(chunks, slice(start, start + len(chunks[0])), view)
            start += len(chunks[0])

    def _own(self, number: int) -> set[str]:
        """Columns that differ between teachers."""
        return {_NORM, *(output.name for output in self._sources[number].header.outputs)}

    def _check_same(self, first: pa.Table, other: pa.Table, number: int, view: int) -> None:
        names, others = (
            [name for name in table.schema.names if name not in own]
            for table, own in ((first, self._own(0)), (other, self._own(number)))
        )
        changed = [
            name
            for name in names
            if name in others and not first[name].combine_chunks().equals(other[name].combine_chunks())
        ]
        changed += sorted({*names} ^ {*others})
        if changed:
            raise CacheError(
                "the rows of these caches are not of the same samples, views and pixels",
                code="cache.average-differs",
                where=f"view {view} of {self._commits[0].shard_id}: {redact(self._sources[0].url)} -> "
                f"{redact(self._sources[number].url)}",
                got=f"columns {', '.join(changed)}",
                next_step="build both over the same shards, with one data and one views section, on machines that "
                "compute the same pixels",
            )

    def _average(self, chunks: Sequence[pa.Table], rows: slice, view: int) -> pa.RecordBatch:
        average, sample_ids = self._header.teacher["average"], self._sample_ids[rows]
        identity = RowIdentity(sample_ids, view)
        temperature, weights = average["temperature"], average["weights"]
        columns = {name: chunks[0][name].combine_chunks() for name in self.schema.names}
        columns[_NORM] = pa.array(np.zeros(len(sample_ids), np.float32))
        means: dict[str, NDArray[np.float32]] = {}
        for output in self._header.outputs:
            logits = [
                decode(chunk[output.name], cast("Output", cache.header.output(output.name)))
                for cache, chunk in zip(self._sources, chunks, strict=True)
            ]
            mean = mean_sigmoids if self._index.task.roles[output.name] == "multilabel" else mean_softmax
            means[output.name] = (
                mean_logits(logits, weights) if temperature is None else mean(logits, weights, temperature)
            )
            columns[output.name] = encode(means[output.name], output, keys=sample_ids, identity=identity)
        self._statistics.add_fidelity(identity, means)
        # Of mixed images there are no hits; a group of one row is never mixed.
        if not self._mixes or len(sample_ids) == 1:
            targets = {name: values[rows] for name, values in self._index.ok_targets.items()}
            self._task_sums.add(means, targets)
        return pa.record_batch([*columns.values()], schema=self.schema)

    @staticmethod
    def _is_fixed(header: Header) -> bool:
        return header.teacher["average"]["temperature"] is not None

    def statistics(self) -> Statistics:
        return self._statistics.result().model_copy(update=self._task_sums.result())


def _index(cache: TeacherCache, shard_id: str) -> ShardIndex:
    return cache.index(next(shard for shard in cache.shards if shard.shard_id == shard_id))


def mean_logits(logits: Sequence[NDArray[np.float32]], weights: Sequence[float]) -> NDArray[np.float32]:
    """[N,K]: the weighted mean of [N,K] logits, summed in float64."""
    terms = [share * values_NK.astype(np.float64) for share, values_NK in zip(_shares(weights), logits, strict=True)]
    return np.sum(terms, axis=0).astype(np.float32)


def mean_softmax(
    logits: Sequence[NDArray[np.float32]], weights: Sequence[float], temperature: float
) -> NDArray[np.float32]:
    """[N,K]: T · log p, where p is the weighted mean of softmax(logits / T)."""
    logs: list[NDArray[np.float64]] = []
    for share, values_NK in zip(_shares(weights), logits, strict=True):
        scaled_NK = values_NK.astype(np.float64) / temperature
        scaled_NK -= scaled_NK.max(1, keepdims=True)
        logs.append(np.log(share) + scaled_NK - np.log(np.exp(scaled_NK).sum(1, keepdims=True)))
    return (temperature * np.logaddexp.reduce(logs, axis=0)).astype(np.float32)


def mean_sigmoids(
    logits: Sequence[NDArray[np.float32]], weights: Sequence[float], temperature: float
) -> NDArray[np.float32]:
    """[N,K] of a multilabel head: T · log(p / (1 − p)), where p is the weighted mean of sigmoid(logits / T)."""
    logs = [
        # log sigmoid(±x) = −log(1 + exp(∓x))
        np.log(share) - np.logaddexp(0, np.stack([-values_NK, values_NK]).astype(np.float64) / temperature)
        for share, values_NK in zip(_shares(weights), logits, strict=True)
    ]
    log_p_NK, log_rest_NK = np.logaddexp.reduce(logs, axis=0)
    return (temperature * (log_p_NK - log_rest_NK)).astype(np.float32)


def _shares(weights: Sequence[float]) -> list[float]:
    return [weight / sum(weights) for weight in weights]
