"""Sources of a run's rows: finished caches, or shards with an index. Both give the same views of a row."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from pipeline import storage
from pipeline.augment.params import sample_views, shard_partners, unmix
from pipeline.cache.format.codec import LinearHead, check_temperature, column_name
from pipeline.cache.format.header import read_outputs
from pipeline.cache.read.reader import ShardEntry, TeacherCache
from pipeline.core.errors import CacheError, ConfigError, ShardError
from pipeline.core.redaction import redact
from pipeline.shards.index import ShardIndex, decode_index, index_settings
from pipeline.shards.publish import index_name
from pipeline.shards.shard_urls import shard_ids, shard_urls
from pipeline.student.data.ensemble import check_same_samples, check_same_shards
from pipeline.student.data.join import PixelProofs
from pipeline.student.data.local_store import NodeStore
from pipeline.student.data.memo import Memo
from pipeline.student.data.rows import SampleRows, as_structured_rows
from pipeline.student.data.shard_files import ShardFiles
from pipeline.student.data.teacher_outputs import Reads
from pipeline.student.data.view_files import ViewFiles
from pipeline.tasks import Targets, Task, task_of, without_domain
from pipeline.tasks.classification import LABEL
from schemas.cache_format import Output
from schemas.config import Config, DataConfig, ViewsConfig

_MEMO_SIZE = 64
_NUM_SAMPLED = 16


class RowSource(ABC):
    """The rows of a training. Shards are numbered by position, and ordinals count a shard's ok rows.

    Attributes:
        num_ok: of each shard.
        num_views: V, after which views repeat; None: they do not.
        outputs: those of each cached teacher that are read, by name.
        heads: of each cached teacher, see ``TeacherCache.head``; None also where its logits are not read.
        reads: the outputs that losses read, whether or not a cache has them.
        files: the images.
        stores_views: whether ``stored_view`` has the views; else they are rendered from ``files``.
    """

    stores_views: bool = False

    def __init__(
        self,
        urls: list[str],
        num_ok: list[int],
        task: Task,
        store: NodeStore,
        *,
        name_shards: str,
        num_views: int | None,
        outputs: Sequence[Mapping[str, Output]] = (),
        heads: Sequence[LinearHead | None] = (),
        reads: Reads | None = None,
    ) -> None:
        self.shard_ids, self.num_ok, self.task, self.num_views = shard_ids(urls), num_ok, task, num_views
        self.outputs, self.heads, self.reads = outputs, heads, reads or {}
        self.store, self.files = store, ShardFiles(urls, store, name_shards=name_shards)
        self.are_shards_local = all(storage.protocol(url) == "file" for url in urls)

    def view_of(self, number: int) -> int:
        """The view with this number in ``TrainingOrder.views``, which counts them over all epochs."""
        return number if self.num_views is None else number % self.num_views

    @abstractmethod
    def index(self, shard: int) -> ShardIndex: ...

    @abstractmethod
    def rows(self, shard: int, ordinal_N: NDArray[np.int32], number: int) -> SampleRows:
        """These rows under the view with this number, with the outputs of cached teachers."""

    def rows_of_views(
        self, shard: int, ordinal_N: NDArray[np.int32], number_N: NDArray[np.int64]
    ) -> Iterator[tuple[SampleRows, NDArray[np.int64]]]:
        """These rows, each under the view with its number: in chunks, with the positions of their rows."""
        for number in np.unique(number_N).tolist():
            position_M = np.flatnonzero(number_N == number)
            yield self.rows(shard, ordinal_N[position_M], number), position_M

    @abstractmethod
    def fetched_bytes(self, views_per_image: int) -> int:
        """About how many bytes ``fetch`` brings of a shard and so many views of it, on average."""

    def targets(self, shard: int) -> Targets:
        """The target columns of a shard's ok rows."""
        return self.index(shard).ok_targets

    def fetch(self, shard: int, numbers: Sequence[int]) -> None:  # noqa: ARG002
        """Brings a shard and the views with these numbers to this node. Threads may share it."""
        self.files.fetch(shard)

    def stored_view(self, shard: int, number: int, byte_range: tuple[int, int, int], *, sample_id: str) -> Tensor:
        """uint8 [3,size,size]: the view with this number, at one of ``SampleRows.pixel_ranges``.

        Raises:
            CacheError: its bytes were changed.
        """
        raise NotImplementedError("this source renders its views")

    def close(self) -> None:
        """Closes the files; they open again when they are read."""
        self.files.close()


def has_targets(task: Task, targets: Targets, columns: Sequence[str]) -> NDArray[np.bool_]:
    """[N]: which rows have a target in each of these columns."""
    return np.logical_and.reduce(list(_has_target(task, targets, columns).values()))


def _has_target(task: Task, targets: Targets, columns: Sequence[str]) -> dict[str, NDArray[np.bool_]]:
    named = [column for column in task.columns if column.name in columns]
    return {column.name: column.has_target(targets[column.name]) for column in named}


def check_labelled(sample_ids: list[str], task: Task, targets: Targets, columns: Sequence[str]) -> None:
    """
    Raises:
        ConfigError: some of these samples have no label in one of these columns; the first are named.
    """
    by_column = _has_target(task, targets, columns)
    unlabelled = np.flatnonzero(~np.logical_and.reduce(list(by_column.values())))
    if len(unlabelled):
        counts = [f"{name} {int((~labelled_N).sum())}" for name, labelled_N in by_column.items()]
        raise ConfigError(
            "a loss needs labels, and some samples have none",
            code="data.missing-labels",
            where=", ".join(sample_ids[row] for row in unlabelled[:3]),
            got=f"{len(unlabelled)} of {len(sample_ids)} samples without a label"
            + (f" ({', '.join(counts)})" if len(counts) > 1 else ""),
            next_step="set data.missing_labels=ignore to average over labelled rows, or use kd or dist alone",
        )


def check_any_labelled(source: RowSource, columns: Sequence[str]) -> None:
    """
    Args:
        columns: of the targets that losses need.

    Raises:
        ConfigError: no row has a target in one of them, so that a loss would learn nothing.
    """
    # Without a label member no index needs to be opened.
    task = source.task
    shards = range(len(source.shard_ids) if task.members else 0)
    for column in columns:
        if any(has_targets(task, source.targets(shard), (column,)).any() for shard in shards):
            continue
        raise ConfigError(
            "a loss needs labels, and no sample has one",
            code="data.no-labels",
            where="data.label" if column == LABEL else f"data.label, column {column}",
            got=f"{', '.join(task.members) or None}, in {sum(source.num_ok)} samples",
            expected=f"the extension of a member with {task.member_content}",
            next_step="if the shards have labels, run: stillroom cache relabel CACHE --label MEMBER (of a cache), or "
            "index them into another data.index; else use kd or dist alone",
        )


class IndexedSource(RowSource):
    """Views sampled while training, without a cache. They do not repeat, unless there is but one."""

    def __init__(self, urls: list[str], indexes: list[ShardIndex], plan: ViewsConfig, store: NodeStore) -> None:
        num_ok = [index.num_ok for index in indexes]
        num_views = 1 if plan.kind == "eval" else None
        name_shards = "correct data.shards={}"
        super().__init__(urls, num_ok, indexes[0].task, store, name_shards=name_shards, num_views=num_views)
        self.plan, self._indexes = plan, indexes
        self._partners = Memo(self._partners_of, _MEMO_SIZE)

    def fetched_bytes(self, views_per_image: int) -> int:  # noqa: ARG002 - no view is fetched
        if self.are_shards_local:
            return 0
        ends = [int((index.offset + index.size).max(initial=0)) for index in self._indexes]
        return sum(ends) // len(ends)

    def check_labelled(self, columns: Sequence[str]) -> None:
        """
        Raises:
            ConfigError: an ok row has no target in one of these columns.
        """
        for index in self._indexes if columns else ():
            check_labelled(index.sample_ids(index.ok), self.task, index.ok_targets, columns)

    def index(self, shard: int) -> ShardIndex:
        return self._indexes[shard]

    def _partners_of(self, key: tuple[int, int]) -> NDArray[np.int32]:
        shard, matching = key
        num_ok = self.num_ok[shard]
        if not self.plan.mixes:
            return np.arange(num_ok, dtype=np.int32)
        return shard_partners(self.plan, self.shard_ids[shard], matching * self.plan.mix_repeat, num_ok)

    def rows_of_views(
        self, shard: int, ordinal_N: NDArray[np.int32], number_N: NDArray[np.int64]
    ) -> Iterator[tuple[SampleRows, NDArray[np.int64]]]:
        """At once: most of the time goes into calls. All these views have the same mixup partners."""
        yield self._rows(shard, ordinal_N, number_N, int(number_N[0])), np.arange(len(number_N))

    def rows(self, shard: int, ordinal_N: NDArray[np.int32], number: int) -> SampleRows:
        view = self.view_of(number)
        return self._rows(shard, ordinal_N, view, view)

    def _rows(
        self, shard: int, ordinal_N: NDArray[np.int32], view: int | NDArray[np.int64], matched_view: int
    ) -> SampleRows:
        index = self._indexes[shard]
        position_N = index.ok[ordinal_N]
        sample_ids = index.sample_ids(position_N)
        width_N, height_N = index.width[position_N], index.height[position_N]
        partner_N = self._partners[shard, matched_view // self.plan.mix_repeat][ordinal_N]
        params = unmix(sample_views(self.plan, sample_ids, view, width_N, height_N), partner_N == ordinal_N)
        fields = {
            "offset": index.offset[position_N],
            "size": index.size[position_N],
            "content_hash": index.content_hash[position_N],
            **{name: values[position_N] for name, values in without_domain(index.targets).items()},
            "width": width_N,
            "height": height_N,
            "box": params.box_N4,
            "flip": params.flip_N,
            "mix_lambda": params.mix_lambda_N,
            "partner": partner_N,
        }
        return SampleRows(np.array(sample_ids, object), as_structured_rows(fields, params.aug_params))


class CachedSource(RowSource):
    """Views and teacher outputs as the caches store them.

    V is the smallest number of views of all caches, or ``data.num_views``; after the last view the first one follows.

    All caches hold the same views of the same rows; index and views are those of the first.
    """

    def __init__(
        self,
        caches: Sequence[TeacherCache],
        shards: list[ShardEntry],
        urls: list[str],
        store: NodeStore,
        *,
        reads: Reads,
        name_shards: str,
        num_views: int,
    ) -> None:
        outputs = [
            {output.name: output for output in read_outputs(cache.header) if output.name in reads} for cache in caches
        ]
        super().__init__(
            urls,
            [shard.num_ok for shard in shards],
            task_of(caches[0].data),
            store,
            name_shards=name_shards,
            num_views=num_views,
            outputs=outputs,
            heads=[
                cache.head if any(column_name(output) != name for name, output in read.items()) else None
                for cache, read in zip(caches, outputs, strict=True)
            ],
            reads=reads,
        )
        self.caches, self._shards = tuple(caches), shards
        columns = tuple(dict.fromkeys(column_name(output) for read in outputs for output in read.values()))
        self._views = ViewFiles(self.caches, shards, store, outputs=columns)
        self.stores_views = self._views.pixels is not None
        # Training takes all but targets and content hashes from the views.
        self._indexes = Memo(self._read_index, _MEMO_SIZE)

    def index(self, shard: int) -> ShardIndex:
        return self._indexes[shard]

    def _read_index(self, shard: int) -> ShardIndex:
        return self.caches[0].index(self._shards[shard])

    def fetch(self, shard: int, numbers: Sequence[int]) -> None:
        for number in numbers:
            self._views.fetch(shard, self.view_of(number))
        if not self.stores_views:
            super().fetch(shard, numbers)

    def stored_view(self, shard: int, number: int, byte_range: tuple[int, int, int], *, sample_id: str) -> Tensor:
        return self._views.stored_view(shard, self.view_of(number), byte_range, sample_id=sample_id)

    def fetched_bytes(self, views_per_image: int) -> int:
        some = self._shards[:: -(-len(self._shards) // _NUM_SAMPLED)]
        views = sum(cache.committed_view(shard.shard_id, 0).size_bytes for shard in some for cache in self.caches)
        shards = 0 if self.stores_views or self.are_shards_local else sum(shard.size_bytes for shard in some)
        return (views * views_per_image + shards) // len(some)

    def close(self) -> None:
        super().close()
        self._views.close()

    def pixel_proofs(self, shard: int, view: int) -> list[PixelProofs]:
        """Of all ok rows of a shard under a view, in each cache."""
        return self._views.proofs(shard, view)

    def rows(self, shard: int, ordinal_N: NDArray[np.int32], number: int) -> SampleRows:
        joined = self._views.get(shard, self.view_of(number))
        teachers = [rows.teacher_columns(ordinal_N) for rows in joined]
        rows = joined[self._views.first]
        return SampleRows(rows.sample_ids(ordinal_N), rows.rows_N[ordinal_N], teachers)


def open_cached(
    caches: Sequence[TeacherCache],
    data: DataConfig,
    *,
    reads: Reads | None = None,
    name_shards: str = "append data.shards={}",
) -> CachedSource:
    """The rows of ``data.shards``, or of all shards of the caches, at the URLs in the first cache's manifest.

    Args:
        reads: the teacher outputs that losses read, ``CompositeLoss.teacher_outputs``; None: none.
        name_shards: how a caller passes the URLs of the shards, ``{}``; for the error about missing ones.

    Raises:
        CacheError: a shard is not in a cache, or two caches do not hold the same shards or the same samples in them.
        CacheError: the outputs of a cache serve other temperatures than those that are read.
        ConfigError: ``data.num_views`` is more than a cache has.
    """
    first, num_views = caches[0], views_in_use(caches, data)
    for cache in caches:
        _check_temperatures(cache, reads or {})
    if data.shards is None:
        check_same_shards(caches)
        urls = [first.shard_url(shard) for shard in first.shards]
    else:
        urls = shard_urls(data.shards)
    names = shard_ids(urls)
    for cache in caches:
        _check_holds(cache, names)
    check_same_samples(caches, names)
    by_id = {shard.shard_id: shard for shard in first.shards}
    return CachedSource(
        caches,
        [by_id[name] for name in names],
        urls,
        NodeStore.of(data),
        reads=reads or {},
        name_shards=name_shards,
        num_views=num_views,
    )


def _check_temperatures(cache: TeacherCache, reads: Reads) -> None:
    for name, temperatures in reads.items():
        output = cache.header.output(name)
        if output is not None:
            for temperature in temperatures:
                check_temperature(output, temperature, where=redact(cache.url))


def views_in_use(caches: Sequence[TeacherCache], data: DataConfig) -> int:
    """V, the number of views that a training shows.

    Raises:
        ConfigError: ``data.num_views`` is more than a cache has.
    """
    smallest = min(caches, key=lambda cache: cache.num_views)
    if data.num_views is None:
        return smallest.num_views
    check_num_views(data.num_views, smallest.num_views, of=redact(smallest.url))
    return data.num_views


def planned_num_views(config: Config, num_cached: int) -> int | None:
    """``RowSource.num_views`` of the training of a config whose cache has, or will have, so many views."""
    if config.teacher.mode == "cache":
        return config.data.num_views or num_cached
    return 1 if config.views.kind == "eval" else None


def check_num_views(num_views: int, num_stored: int, *, of: str) -> None:
    """
    Raises:
        ConfigError: ``data.num_views`` is more than the cache ``of`` has.
    """
    if num_views > num_stored:
        raise ConfigError(
            "data.num_views is more than the number of views of the cache",
            code="config.num-views",
            where=f"data.num_views, against {of}",
            got=num_views,
            expected=f"1 to {num_stored}",
            next_step="set a smaller data.num_views, or raise views.count and run: stillroom cache build CONFIG",
        )


def _check_holds(cache: TeacherCache, names: list[str]) -> None:
    unknown = sorted({*names} - {shard.shard_id for shard in cache.shards})
    if unknown:
        raise CacheError(
            f"{len(unknown)} of {len(names)} shards are not in the cache",
            code="cache.missing-shards",
            where=redact(cache.url),
            got=", ".join(unknown[:5]),
            next_step="run: stillroom cache build CONFIG with these shards (it adds them)",
        )


def index_url(config: Config) -> str:
    """The folder of the index of a run that trains without a cache: ``data.index``, or the run's own."""
    if config.data.index is not None:
        return config.data.index
    assert config.run is not None
    return storage.join(config.run.url, "index")


def open_indexed(folder_url: str, data: DataConfig, plan: ViewsConfig) -> IndexedSource:
    """Shards with the index that ``stillroom shards index`` wrote.

    Raises:
        ShardError: a shard has no index there.
    """
    assert data.shards is not None
    urls = shard_urls(data.shards)
    indexes: list[ShardIndex] = []
    for name in shard_ids(urls):
        url = storage.join(folder_url, index_name(name))
        data_bytes = storage.read_if_exists(url, max_bytes=storage.MAX_TABLE_BYTES)
        if data_bytes is None:
            raise ShardError(
                f"shard {name} has no index",
                code="shard.no-index",
                where=redact(folder_url),
                next_step="run: stillroom shards index CONFIG",
            )
        indexes.append(decode_index(data_bytes, where=redact(url), settings=index_settings(data)))
    return IndexedSource(urls, indexes, plan, NodeStore.of(data))
