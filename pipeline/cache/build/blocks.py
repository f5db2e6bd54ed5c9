"""The blocks of views into which a build splits each shard, which of them are missing, and which hold class sums."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache

from pipeline.core.errors import CacheError
from pipeline.core.redaction import redact
from schemas.cache_format import ViewBlock
from schemas.config import Config


@cache
def shared_block(start: int, stop: int, is_eval: bool) -> ViewBlock:
    """One object for the equal blocks of all shards: there are millions of shards, and few different blocks."""
    return ViewBlock(start=start, stop=stop, is_eval=is_eval)


def holds_class_sums(class_means: object, block: ViewBlock) -> bool:
    """Whether the part of this block has class sums, given ``class_means`` of the config or of the header."""
    if class_means == "eval":
        return block.is_eval
    return class_means == "view0" and block.start == 0 and not block.is_eval


@dataclass(frozen=True, slots=True)
class BlockPlan:
    """The blocks of every shard: ``num_views`` views, ``views_per_part`` in a block, and perhaps an eval pass."""

    num_views: int
    views_per_part: int
    has_eval: bool

    @classmethod
    def of(cls, config: Config) -> BlockPlan:
        assert config.cache is not None
        return cls(config.views.count, config.cache.views_per_part, config.cache.class_means == "eval")

    def missing(self, committed: Iterable[ViewBlock], *, where: str) -> tuple[ViewBlock, ...]:
        """The blocks that a shard lacks: the eval pass, then each run of uncovered views, split into blocks.

        Raises:
            CacheError: two committed blocks overlap, which no builder writes.
        """
        covered: set[int] = set()
        is_eval_done = False
        for block in committed:
            is_eval_done |= block.is_eval
            views = set() if block.is_eval else set(block.views)
            if covered & views:
                raise CacheError(
                    "two commits cover the same view",
                    code="cache.overlapping-commits",
                    where=where,
                    got=f"view {min(covered & views)}",
                    next_step="remove one of these files of commits/, and run the build again",
                )
            covered |= views
        blocks = [shared_block(0, 1, True)] if self.has_eval and not is_eval_done else []
        start = None
        for view in range(self.num_views + 1):
            is_missing = view < self.num_views and view not in covered
            if start is not None and (not is_missing or view - start == self.views_per_part):
                blocks.append(shared_block(start, view, False))
                start = None
            if is_missing and start is None:
                start = view
        return tuple(blocks)

    def missing_by_shard(
        self, shard_ids: Iterable[str], committed: Iterable[tuple[str, ViewBlock]], *, cache_url: str
    ) -> dict[str, tuple[ViewBlock, ...]]:
        """``missing`` for each shard, given (shard id, block) of every commit. Shards without a commit share one tuple.

        Raises:
            CacheError: two committed blocks of a shard overlap.
        """
        by_shard: defaultdict[str, list[ViewBlock]] = defaultdict(list)
        for shard, block in committed:
            by_shard[shard].append(block)
        where = redact(cache_url)
        all_blocks = self.missing((), where=where)
        return {
            shard: self.missing(by_shard[shard], where=f"{shard} in {where}") if shard in by_shard else all_blocks
            for shard in shard_ids
        }
