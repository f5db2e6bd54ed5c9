"""Where a run's rows come from: finished caches, or shards with an index. Both give the same views of a row."""

from __future__ import annotations

import tempfile
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

import numpy as np
import xxhash
from numpy.typing import NDArray
from torch import Tensor

from pipeline import storage
from pipeline.cache.reader import ShardEntry, TeacherCache, ViewColumns
from pipeline.errors import CacheError, ConfigError, ShardError
from pipeline.shards.decode import BadImageError, decode
from pipeline.shards.index import NO_LABEL, ShardIndex, decode_index, index_settings
from pipeline.shards.names import shard_ids
from pipeline.shards.publish import index_name
from pipeline.shards.tar import ShardReader
from pipeline.student.ensemble import check_same_samples, check_same_shards, check_same_views
from pipeline.student.words import StoredWords
from pipeline.views.params import sample_keys, shard_partners, unmix, view_params
from schemas.config import Config, DataConfig, ViewsConfig

SHARD_FOLDER = Path(tempfile.gettempdir()) / "stillroom-shards"
"""Where remote shards are kept on a node, for all processes on it."""

_OPEN_SHARDS = 64
_READ_THREADS = 16
_KEPT_VIEWS = 64
K = TypeVar("K", bound=Hashable)
V = TypeVar("V")


class Recent(Generic[K, V]):
    """The last ``size`` results of a function, by key. ``drop`` is called on a result that leaves."""

    def __init__(self, make: Callable[[K], V], size: int, drop: Callable[[V], None] | None = None) -> None:
        self._make, self._size, self._drop = make, size, drop
        self._kept: OrderedDict[K, V] = OrderedDict()

    def get(self, key: K) -> V:
        if key not in self._kept:
            self._kept[key] = self._make(key)
            self._shrink(self._size)
        self._kept.move_to_end(key)
        return self._kept[key]

    def clear(self) -> None:
        self._shrink(0)

    def _shrink(self, size: int) -> None:
        while len(self._kept) > size:
            _, value = self._kept.popitem(last=False)
            if self._drop is not None:
                self._drop(value)


@dataclass(frozen=True, slots=True)
class ShardRows:
    """N ok rows of one shard under one view: where their bytes are, how they are cropped, what the teacher said."""

    sample_ids: list[str]
    offset_N: NDArray[np.int64]
    size_N: NDArray[np.int32]
    content_hash_N: NDArray[np.uint64]
    label_N: NDArray[np.int32]
    box_N4: NDArray[np.int32]
    flip_N: NDArray[np.bool_]
    mix_lambda_N: NDArray[np.float32]
    drawn: dict[str, NDArray[Any]]
    partner_N: NDArray[np.int32]
    """Ordinal among the shard's ok rows; its own where nothing is mixed."""
    words: tuple[StoredWords, ...]
    """Of each cache; none where views are drawn here."""


class RowSource(Protocol):
    """What a training reads from. Shards are named by position; ``rows`` takes ordinals among a shard's ok rows."""

    @property
    def shard_ids(self) -> list[str]: ...

    @property
    def num_ok(self) -> list[int]: ...

    def view_of(self, epoch: int) -> int: ...

    def rows(self, shard: int, ordinal_N: NDArray[np.int32], epoch: int) -> ShardRows: ...

    def labels(self, shard: int) -> NDArray[np.int32]: ...

    def read(self, shard: int, offset: int, size: int) -> bytes: ...

    def close(self) -> None: ...


def read_image(source: RowSource, shard: int, rows: ShardRows, row: int, *, max_pixels: int) -> Tensor:
    """The whole image of one of these rows, uint8 [3,H,W], proven to be the one that was indexed.

    Raises:
        CacheError: the tar holds other bytes now.
        ShardError: they no longer decode, or the tar ends before them.
    """
    data = source.read(shard, int(rows.offset_N[row]), int(rows.size_N[row]))
    content_hash, wanted = xxhash.xxh3_64_intdigest(data), int(rows.content_hash_N[row])
    if content_hash != wanted:
        raise CacheError(
            "an image is not the one that was indexed",
            where=rows.sample_ids[row],
            got=f"content hash {content_hash:016x}",
            wanted=f"{wanted:016x}",
            next_step="the shard changed since; restore it, or build another cache or index from it",
        )
    try:
        return decode(data, max_pixels=max_pixels)
    except BadImageError as error:
        raise ShardError(
            "an image that could be used when its shard was indexed cannot be used now",
            where=rows.sample_ids[row],
            got=f"{error.status}: {error.reason}",
            next_step="use the decoder versions that the index was made with",
        ) from error


def check_labelled(sample_ids: list[str], label_N: NDArray[np.int32]) -> None:
    """
    Raises:
        ConfigError: some of these samples have no label; the first are named.
    """
    unlabelled = np.flatnonzero(label_N < 0)
    if len(unlabelled):
        raise ConfigError(
            "a loss needs labels, and some samples have none",
            where=", ".join(sample_ids[row] for row in unlabelled[:3]),
            got=f"{len(unlabelled)} of {len(label_N)} samples without a label",
            next_step="set data.missing_labels=ignore to average over labelled rows, or use kd or dist alone",
        )


def check_any_labelled(source: RowSource, data: DataConfig) -> None:
    """
    Raises:
        ConfigError: not one row has a label, so that losses that need one would learn nothing.
    """
    # Where nothing reads labels there is no need to open every index to see it.
    shards = range(len(source.shard_ids) if data.label is not None else 0)
    if not any((source.labels(shard) >= 0).any() for shard in shards):
        raise ConfigError(
            "a loss needs labels, and not one sample has one",
            where="data.label",
            got=f"{data.label}, in {sum(source.num_ok)} samples",
            wanted="the member extension that holds the class",
            next_step="use kd or dist alone, or shards, an index and a cache that have labels",
        )


def label_counts(source: RowSource, num_classes: int, *, shards: Sequence[int] | None = None) -> NDArray[np.int64]:
    """How many ok rows of all shards, or of these, have each label; reads their indexes. int64 [K]."""
    shards = range(len(source.shard_ids)) if shards is None else shards
    counts = np.zeros(num_classes, np.int64)
    for shard in shards:
        label_N = source.labels(shard)
        counts += np.bincount(label_N[label_N != NO_LABEL], minlength=num_classes)
    return counts


class _Files:
    """Shards by position, local or fetched once a node; the last used stay open."""

    def __init__(self, urls: list[str]) -> None:
        self._urls = urls
        self._readers = Recent(self._open, _OPEN_SHARDS, ShardReader.close)

    def _open(self, shard: int) -> ShardReader:
        url = self._urls[shard]
        return ShardReader(storage.local_copy(url, SHARD_FOLDER), where=url)

    def read(self, shard: int, offset: int, size: int) -> bytes:
        return self._readers.get(shard).read(offset, size)

    def close(self) -> None:
        self._readers.clear()


class IndexedSource:
    """Views drawn here and now, for training without a cache: epoch e sees view e."""

    def __init__(self, urls: list[str], indexes: list[ShardIndex], plan: ViewsConfig) -> None:
        self.shard_ids = shard_ids(urls)
        self.num_ok = [index.num_ok for index in indexes]
        self.plan = plan
        files = _Files(urls)
        self.read, self.close = files.read, files.close
        self._indexes = indexes
        self._partners = Recent(self._draw_partners, _KEPT_VIEWS)

    def check_labelled(self) -> None:
        """
        Raises:
            ConfigError: an ok row has no label.
        """
        for index in self._indexes:
            check_labelled(index.sample_ids(index.ok), index.label[index.ok])

    def labels(self, shard: int) -> NDArray[np.int32]:
        index = self._indexes[shard]
        return index.label[index.ok]

    def view_of(self, epoch: int) -> int:
        return epoch if self.plan.kind != "eval" else 0

    def _draw_partners(self, key: tuple[int, int]) -> NDArray[np.int32]:
        shard, view = key
        num_ok = self.num_ok[shard]
        if not self.plan.mixes:
            return np.arange(num_ok, dtype=np.int32)
        return shard_partners(self.plan, self.shard_ids[shard], view, num_ok)

    def rows(self, shard: int, ordinal_N: NDArray[np.int32], epoch: int) -> ShardRows:
        """The rows with these ordinals among the shard's ok rows, under the epoch's view."""
        index, view = self._indexes[shard], self.view_of(epoch)
        position_N = index.ok[ordinal_N]
        sample_ids = index.sample_ids(position_N)
        views_N = np.full(len(ordinal_N), view, np.int64)
        keys_N2 = sample_keys(self.plan.seed, sample_ids)
        widths_N, heights_N = (side[position_N].astype(np.int64) for side in (index.width, index.height))
        partner_N = self._partners.get((shard, view))[ordinal_N]
        params = unmix(view_params(self.plan, keys_N2, views_N, widths_N, heights_N), partner_N == ordinal_N)
        return ShardRows(
            sample_ids=sample_ids,
            offset_N=index.offset[position_N],
            size_N=index.size[position_N],
            content_hash_N=index.content_hash[position_N],
            label_N=index.label[position_N],
            box_N4=params.box_N4,
            flip_N=params.flip_N,
            mix_lambda_N=params.mix_lambda_N,
            drawn=dict(params.drawn),
            partner_N=partner_N,
            words=(),
        )


class CachedSource:
    """Views and teachers' words as the caches store them: epoch e sees view e mod V, the fewest views of any cache.

    All caches hold the same views of the same rows; index and views are the first one's.
    """

    def __init__(
        self, caches: Sequence[TeacherCache], shards: list[ShardEntry], urls: list[str], *, keeps_embeddings: bool
    ) -> None:
        self.caches, self._shards, self._keeps_embeddings = tuple(caches), shards, keeps_embeddings
        self.num_views = min(cache.num_views for cache in caches)
        self.shard_ids = [shard.shard_id for shard in shards]
        self.num_ok = [shard.num_ok for shard in shards]
        files = _Files(urls)
        self.read, self.close = files.read, files.close
        self._indexes = Recent(self._read_index, _KEPT_VIEWS)
        # Of each row these hold its stored logits, and about a hundred bytes.
        self._columns = Recent(self._join, _KEPT_VIEWS)

    def view_of(self, epoch: int) -> int:
        return epoch % self.num_views

    def labels(self, shard: int) -> NDArray[np.int32]:
        index = self._indexes.get(shard)
        return index.label[index.ok]

    def _read_index(self, shard: int) -> ShardIndex:
        return self.caches[0].index(self._shards[shard])

    def _join(self, key: tuple[int, int]) -> tuple[ViewColumns, ...]:
        shard, view = key
        index, where = self._indexes.get(shard), f"view {view} of {self.shard_ids[shard]}"
        of_caches = tuple(cache.view(index.shard_id, view) for cache in self.caches)
        if not self._keeps_embeddings:
            # Most losses take norms and class means; embeddings would be kept for nobody.
            of_caches = tuple(replace(columns, embedding=None) for columns in of_caches)
        for cache, columns in zip(self.caches, of_caches, strict=True):
            check_alignment(columns, index, where=f"{where} in {storage.redact(cache.url)}")
        check_same_views(of_caches, where=where)
        return of_caches

    def columns(self, shard: int, view: int) -> tuple[ViewColumns, ...]:
        """Of each cache all ok rows of a shard under a view, proven to be those of the index."""
        return self._columns.get((shard, view))

    def rows(self, shard: int, ordinal_N: NDArray[np.int32], epoch: int) -> ShardRows:
        """The rows with these ordinals among the shard's ok rows, under the epoch's view, with the teacher's words."""
        index = self._indexes.get(shard)
        of_caches = self._columns.get((shard, self.view_of(epoch)))
        columns, position_N = of_caches[0], index.ok[ordinal_N]
        return ShardRows(
            sample_ids=index.sample_ids(position_N),
            offset_N=index.offset[position_N],
            size_N=index.size[position_N],
            content_hash_N=columns.content_hash_N[ordinal_N],
            label_N=index.label[position_N],
            box_N4=columns.box_N4[ordinal_N],
            flip_N=columns.flip_N[ordinal_N],
            mix_lambda_N=columns.mix_lambda_N[ordinal_N],
            drawn={name: values_N[ordinal_N] for name, values_N in columns.drawn.items()},
            partner_N=np.searchsorted(columns.row_N, columns.mix_row_N[ordinal_N]).astype(np.int32),
            words=tuple(StoredWords.of(columns, ordinal_N) for columns in of_caches),
        )


def check_alignment(columns: ViewColumns, index: ShardIndex, *, where: str) -> None:
    """The cached rows are the index's ok rows: each once, in order, with the same content, mixed among themselves.

    Raises:
        CacheError: a row is missing, repeated, foreign, of another image, or mixed with a row that is none of these;
            the first such row is named.
    """
    wanted_N = index.row[index.ok]
    if not np.array_equal(columns.row_N, wanted_N):
        raise CacheError(
            "the cached rows are not the shard's rows",
            where=where,
            got=f"{len(columns.row_N)} rows: {_misplaced(columns.row_N, wanted_N)}",
            wanted=f"{len(wanted_N)} rows, each ok row of the index once, in tar order",
            next_step="run: stillroom cache build CONFIG, into another cache.url",
        )
    wrong = np.flatnonzero(columns.content_hash_N != index.content_hash[index.ok])
    if len(wrong):
        raise CacheError(
            f"{len(wrong)} cached rows are of other images",
            where=f"{where}, {index.sample_ids(index.ok[wrong[:1]])[0]}",
            got=f"content hash {int(columns.content_hash_N[wrong[0]]):016x}",
            wanted=f"{int(index.content_hash[index.ok][wrong[0]]):016x}",
            next_step="the shards changed since the cache was built; restore them or build another cache",
        )
    foreign = np.flatnonzero(~np.isin(columns.mix_row_N, wanted_N))
    if len(foreign):
        raise CacheError(
            f"{len(foreign)} cached rows are mixed with rows that the shard does not have",
            where=f"{where}, {index.sample_ids(index.ok[foreign[:1]])[0]}",
            got=f"row {columns.mix_row_N[foreign[0]]}",
            next_step="build another cache",
        )


def _misplaced(row_N: NDArray[np.int32], wanted_N: NDArray[np.int32]) -> str:
    """How two unequal lists of rows differ; the first few of each kind are named."""
    rows, counts = np.unique(row_N, return_counts=True)
    kinds = {
        "missing": np.setdiff1d(wanted_N, rows),
        "foreign": np.setdiff1d(rows, wanted_N),
        "repeated": rows[counts > 1],
    }
    told = [f"{kind} {found[:5].tolist()}" for kind, found in kinds.items() if len(found)]
    return ", ".join(told) or "the right ones in another order"


def open_cached(caches: Sequence[TeacherCache], data: DataConfig, *, keeps_embeddings: bool = False) -> CachedSource:
    """The caches' rows, with shards from ``data.shards`` if given, else all of them from where the first cache found
    them; with the teachers' embeddings only where a loss reads them.

    Raises:
        CacheError: a shard is not in a cache, or two caches do not hold the same shards or the same samples in them.
    """
    first = caches[0]
    if data.shards is None:
        check_same_shards(caches)
        urls = [first.shard_url(shard) for shard in first.shards]
    else:
        urls = storage.expand(data.shards)
    names = shard_ids(urls)
    for cache in caches:
        _check_holds(cache, names)
    check_same_samples(caches, names)
    by_id = {shard.shard_id: shard for shard in first.shards}
    return CachedSource(caches, [by_id[name] for name in names], urls, keeps_embeddings=keeps_embeddings)


def _check_holds(cache: TeacherCache, names: list[str]) -> None:
    unknown = sorted({*names} - {shard.shard_id for shard in cache.shards})
    if unknown:
        raise CacheError(
            f"{len(unknown)} of {len(names)} shards are not in the cache",
            where=storage.redact(cache.url),
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
    urls = storage.expand(data.shards)
    indexes: list[ShardIndex] = []
    for name in shard_ids(urls):
        url = storage.join(folder_url, index_name(name))
        if not storage.exists(url):
            raise ShardError(
                f"shard {name} has no index",
                where=storage.redact(folder_url),
                next_step="run: stillroom shards index CONFIG",
            )
        indexes.append(decode_index(storage.read(url), where=storage.redact(url), settings=index_settings(data)))
    return IndexedSource(urls, indexes, plan)
