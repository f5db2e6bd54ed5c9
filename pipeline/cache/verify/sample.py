"""Some rows of a cache, spread evenly over shards and views, as the teacher saw them."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from pipeline.augment.options import cutmix_boxes
from pipeline.augment.params import EVAL_VIEW
from pipeline.augment.random_bits import key_of, philox4x64, to_uniform
from pipeline.cache.build.commit import read_commit
from pipeline.cache.build.context import current_context
from pipeline.cache.build.manifest import read_table
from pipeline.cache.format import layout
from pipeline.cache.format.header import replayable_plan
from pipeline.cache.read.reader import ShardEntry, TeacherCache, ViewColumns
from pipeline.cache.verify.images import ShardImages, block_of
from pipeline.cache.verify.report import Findings
from pipeline.core.errors import CacheError
from pipeline.shards.index import ShardIndex
from pipeline.shards.shard_urls import report_moved
from pipeline.teacher.inference import Teacher
from pipeline.teacher.numerics import numeric_env
from schemas.cache_format import Header
from schemas.config import Config


@dataclass(frozen=True, slots=True)
class LiveTeacher:
    """The teacher of a config, and what a cache that it writes says of itself."""

    config: Config
    teacher: Teacher
    header: Header


def load_live(config: Config) -> LiveTeacher:
    """
    Raises:
        ConfigError: the config lacks a key that a build needs.
        ModelError: the teacher cannot be built as asked.
    """
    context = current_context(config)
    return LiveTeacher(config, context.teacher, context.header)


@dataclass(frozen=True, slots=True)
class Row:
    """One row to compare; pixels and λ as the teacher sees them, ``stored`` by the names of outputs."""

    shard: str
    view: int
    key: str
    file: str
    same_environment: bool
    slot: int
    """Place in the teacher's batch: a row's last bits may depend on it."""
    pixels_CHW: Tensor
    mix_lambda: np.float32
    cutmix_box_4: NDArray[np.float32]
    """The part of the view that comes from the partner, as fractions; width 0: a blend."""
    stored: dict[str, NDArray[np.float32]]
    norm: np.float32


@dataclass(slots=True)
class Pool:
    """Rows that wait for the teacher. ``partner`` is the position of the row that each is mixed with."""

    rows: list[Row] = field(default_factory=list[Row])
    partner: list[int] = field(default_factory=list[int])


def pick(num_rows: int, num_all: int, seed: int) -> NDArray[np.int64]:
    """Positions among all rows, ascending: one at random of each of ``num_rows`` runs of equal length. int64 [N]."""
    num_rows = min(num_rows, num_all)
    edges = np.arange(num_rows + 1, dtype=np.int64) * num_all // max(1, num_rows)
    counters_N4 = np.zeros((num_rows, 4), np.uint64)
    counters_N4[:, 0] = np.arange(num_rows)
    share_N = to_uniform(philox4x64(key_of("verify", seed)[None], counters_N4))[:, 0]
    return edges[:-1] + np.floor(share_N * np.diff(edges)).astype(np.int64)


def arrange(slots: list[int], batch_size: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Rows in whole batches with each row in its slot; free slots repeat row 0.

    Returns:
        The row at each place [M], and the place of each row [N].
    """
    taken: Counter[int] = Counter()
    place = np.empty(len(slots), np.int64)
    for row, slot in enumerate(slots):
        place[row] = taken[slot] * batch_size + slot
        taken[slot] += 1
    order = np.zeros(max(taken.values(), default=0) * batch_size, np.int64)
    order[place] = np.arange(len(slots))
    return order, place


class Sample:
    """Finds rows, their pixels and what is stored of them."""

    def __init__(
        self,
        cache: TeacherCache,
        live: LiveTeacher,
        shard_urls: Mapping[str, str],
        decoders: ThreadPoolExecutor,
        findings: Findings,
    ) -> None:
        self._cache, self._live, self._shard_urls = cache, live, shard_urls
        self._decoders, self._findings = decoders, findings
        self._plan = replayable_plan(cache.header)
        self._here = numeric_env(live.teacher.device, batch_size=live.teacher.batch_size)
        table = read_table(cache.url, cache.manifest.parts)
        names = zip(table["shard_id"].to_pylist(), table["view"].to_pylist(), strict=True)
        self._part_of = dict(zip(names, table["path"].to_pylist(), strict=True))

    def fill(self, pool: Pool, num_rows: int, seed: int) -> Iterator[tuple[int, int]]:
        """Adds the rows of one (shard, view) after the other; yields how many of these are done, and how many are."""
        chosen = self._choose(num_rows, seed)
        for done, ((shard, view), ordinals) in enumerate(chosen.items(), start=1):
            entry = self._cache.shards[shard]
            file = self._part_of[entry.shard_id, view]
            with self._findings.told(file, shard=entry.shard_id, view=view):
                self._add(pool, entry, view, ordinals, file)
            yield done, len(chosen)

    def _choose(self, num_rows: int, seed: int) -> dict[tuple[int, int], list[int]]:
        """(position of the shard, view) to ordinals among its ok rows."""
        views = list(range(self._cache.num_views))
        if (self._cache.shards[0].shard_id, EVAL_VIEW) in self._part_of:
            views.append(EVAL_VIEW)
        cells = [(shard, view) for shard in range(len(self._cache.shards)) for view in views]
        ends = np.cumsum([self._cache.shards[shard].num_ok for shard, _ in cells])
        num_all = int(ends[-1])
        # Each brings its partner, which is then compared too.
        expected = num_rows if num_rows >= num_all or not self._plan.mixes else -(-num_rows // 2)
        chosen: defaultdict[tuple[int, int], list[int]] = defaultdict(list)
        for position in pick(expected, num_all, seed).tolist():
            at = int(np.searchsorted(ends, position, side="right"))
            chosen[cells[at]].append(position - (int(ends[at - 1]) if at else 0))
        return chosen

    def _add(self, pool: Pool, entry: ShardEntry, view: int, ordinals: list[int], file: str) -> None:
        index, columns = self._cache.index(entry), self._cache.view(entry.shard_id, view)
        url = self._shard_urls.get(entry.shard_id, self._cache.shard_url(entry))
        # In groups of two, the two rows of a pair are mixed with each other whatever the matching draws.
        plan = self._plan.model_copy(update={"mix_group": 2})
        images = ShardImages(url, index, self._cache.header, plan, self._decoders)
        partner_N = np.searchsorted(columns.row_N, columns.mix_row_N)
        units = list(dict.fromkeys(tuple(sorted({row, int(partner_N[row])})) for row in ordinals))
        environment = read_commit(self._cache.url, _commit_path(file)).environment
        make = partial(self._row, entry, view, columns, index, file=file, same_environment=environment == self._here)
        for unit in units:
            with report_moved([url], "append --shards {}"):
                group = next(images.groups(unit, block_of(view)))
            start = len(pool.rows)
            boxes = cutmix_boxes(group.aug_params_VN)
            cutmix_box_N4 = np.zeros((len(unit), 4), np.float32) if boxes is None else boxes[0]
            for position, ordinal in enumerate(unit):
                seen = (group.pixels_VNCHW[0, position], group.mix_lambda_VN[0, position], cutmix_box_N4[position])
                pool.rows.append(make(ordinal, *seen))
                pool.partner.append(start + int(group.partner_VN[0, position]))

    def _row(
        self,
        entry: ShardEntry,
        view: int,
        columns: ViewColumns,
        index: ShardIndex,
        ordinal: int,
        pixels_CHW: Tensor,
        mix_lambda: np.float32,
        cutmix_box_4: NDArray[np.float32],
        *,
        file: str,
        same_environment: bool,
    ) -> Row:
        stored = {"logits": columns.logits, "embedding": columns.embedding}
        return Row(
            shard=entry.shard_id,
            view=view,
            key=index.keys[int(index.ok[ordinal])].as_py(),
            file=file,
            same_environment=same_environment,
            slot=ordinal % self._plan.mix_group % self._live.teacher.batch_size,
            pixels_CHW=pixels_CHW,
            mix_lambda=mix_lambda,
            cutmix_box_4=cutmix_box_4,
            stored={
                name: rows.take(np.array([ordinal])).dense()[0] for name, rows in stored.items() if rows is not None
            },
            norm=columns.embedding_norm_N[ordinal],
        )


def _commit_path(part_path: str) -> str:
    owner = layout.owner(part_path)
    if owner is None:
        raise CacheError("this is not the name of a part", got=part_path)
    return layout.commit_path(*owner)
