"""What a plan is computed from: the config, sizes of the shards, commits of the cache, and a survey of the shards."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from pipeline import storage
from pipeline.cache.build.blocks import BlockPlan
from pipeline.cache.build.commit import CommitSummary
from pipeline.cache.build.header_claim import token_request
from pipeline.cache.format import layout
from pipeline.cache.format.header import find_header
from pipeline.cache.plan.shard_survey import Estimate, ShardSurvey, survey_shards, total
from pipeline.core.redaction import redact
from pipeline.models import load_untrained, selected_widths
from pipeline.shards.labels import check_label_member
from pipeline.tasks import task_of
from schemas.cache_format import Header, ViewBlock
from schemas.config import CacheConfig, Config


@dataclass(frozen=True, slots=True)
class ShardBlocks:
    """The committed parts of a shard and its missing blocks. The eval pass is a block of one view."""

    committed: tuple[CommitSummary, ...]
    missing: tuple[ViewBlock, ...]

    @property
    def num_parts(self) -> int:
        return len(self.committed) + len(self.missing)

    @property
    def num_missing_views(self) -> int:
        return sum(len(block.views) for block in self.missing)

    @property
    def num_views(self) -> int:
        return self.num_missing_views + sum(len(commit.block.views) for commit in self.committed)


@dataclass(frozen=True, slots=True)
class PlannedPixels:
    """Mean bytes of a stored view; of how many sampled images, and CPU seconds to encode and decode a view of one."""

    size_bytes: float
    num_sampled: int = 0
    encode_s: float = 0.0


@dataclass(frozen=True)
class PlanInputs:
    """The inputs of a plan. ``urls``, ``sizes`` and ``blocks`` are by shard id.

    Attributes:
        sizes: bytes of each shard.
        header: None if no build has claimed the cache yet.
        widths: of the teacher's outputs, by name, as far as known.
        tokens: (P, D) of the patch tokens; None: unknown, or the cache has none.
        pixels: of the stored views; None: the cache has none.
    """

    config: Config
    cache: CacheConfig
    urls: Mapping[str, str]
    sizes: Mapping[str, int]
    commits: Sequence[CommitSummary]
    survey: ShardSurvey
    header: Header | None
    widths: Mapping[str, int]
    tokens: tuple[int, int] | None = None
    pixels: PlannedPixels | None = None

    @cached_property
    def blocks(self) -> dict[str, ShardBlocks]:
        """
        Raises:
            CacheError: two commits overlap.
        """
        committed: defaultdict[str, list[CommitSummary]] = defaultdict(list)
        for commit in self.commits:
            committed[commit.shard_id].append(commit)
        missing = BlockPlan.of(self.config).missing_by_shard(
            self.urls, ((commit.shard_id, commit.block) for commit in self.commits), cache_url=self.cache.url
        )
        return {shard: ShardBlocks(tuple(committed[shard]), blocks) for shard, blocks in missing.items()}

    @property
    def forwards(self) -> Estimate:
        """Rows of the finished cache: one teacher forward each."""
        return total(self.survey.rows[shard] * blocks.num_views for shard, blocks in self.blocks.items())

    @property
    def forwards_open(self) -> Estimate:
        """Rows of the missing blocks."""
        return total(self.survey.rows[shard] * blocks.num_missing_views for shard, blocks in self.blocks.items())

    @property
    def is_remote(self) -> bool:
        return any(storage.protocol(url) != "file" for url in self.urls.values())

    @property
    def embedding_dim(self) -> int | None:
        """D; None if it is unknown: then a plan leaves out embeddings and class sums."""
        return self.widths.get(task_of(self.config.data).embedding or "")

    @property
    def num_class_sums(self) -> int:
        """Files of class sums: one a shard."""
        return len(self.urls) if self.cache.computes_class_means else 0


def collect_plan_inputs(
    config: Config,
    cache: CacheConfig,
    urls: Mapping[str, str],
    sizes: Mapping[str, int],
    commits: Sequence[CommitSummary],
) -> PlanInputs:
    """Reads the header, indexes and the first bytes of a few shards; loads no network.

    Raises:
        CacheError: the header or an index is damaged.
        ShardError: a shard has no sample with an image.
    """
    header, task = find_header(cache.url), task_of(config.data)
    commits = [commit for commit in commits if commit.shard_id in urls]
    index_urls = [storage.join(cache.url, layout.INDEX), *filter(None, [config.data.index])]
    return PlanInputs(
        config=config,
        cache=cache,
        urls=urls,
        sizes=sizes,
        commits=commits,
        survey=survey_shards(urls, sizes, commits, config.data, index_urls=index_urls),
        header=header,
        widths={
            **selected_widths(task.widths, config.teacher),
            **({task.embedding: header.embedding_dim} if header and task.embedding is not None else {}),
        },
    )


def resolve_embedding_dim(inputs: PlanInputs) -> PlanInputs:
    """The inputs with all widths of the config's teacher, if the size of the cache depends on them and no header has
    them.

    Widths come from the architecture: the teacher's weights are not read.

    Raises:
        ModelError: the network cannot be built from the config, or has no such patch tokens.
    """
    config, tokens = inputs.config, token_request(inputs.config)
    is_needed = inputs.cache.embeddings != "none" or inputs.num_class_sums > 0 or tokens is not None
    if inputs.embedding_dim is not None or not is_needed:
        return inputs
    teacher = load_untrained(config.teacher, widths=task_of(config.data).widths, size=config.views.size)
    return replace(inputs, widths=teacher.module.widths, tokens=None if tokens is None else tokens.plan(teacher).shape)


def check_labels(inputs: PlanInputs) -> None:
    """Refuses a wrong ``data.label`` while the cache has no part: later its index settings cannot change.

    Raises:
        ShardError: no sample of the survey has that member.
    """
    if not inputs.commits:
        where = redact(next(iter(inputs.urls.values())))
        check_label_member(inputs.survey.label_count, inputs.config.data, where=where)
