"""What a build would make and cost, before it makes anything: rows, bytes, objects, requests, teacher forwards."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import pyarrow as pa

from pipeline import storage
from pipeline.cache.build.blocks import BlockPlan
from pipeline.cache.build.commit import CommitSummary
from pipeline.cache.format import layout
from pipeline.cache.format.codec import outputs_of, row_bytes
from pipeline.cache.format.header import find_header
from pipeline.cache.plan.shard_survey import Estimate, ShardSurvey, survey_shards, total
from pipeline.core.redaction import redact
from pipeline.models import load_untrained
from pipeline.shards.labels import NUM_INDEXES_READ, LabelCount, check_label_member
from schemas.cache_format import Header, Output, ViewBlock, aug_param_columns, part_schema
from schemas.config import CacheConfig, Config, ViewsConfig

_CANARY_SHARE = 0.001
# Compression hardly touches the low bits of floats, nor hashes and boxes: half of a row and more.
_LEAST_STORED = 0.5
# How far the bytes of rows to come may lie from those of rows that are there.
_MEASURED_SPREAD = 0.1
_CLASS_SUM_BYTES = 12  # class and count, beside 8 a dimension


@dataclass(frozen=True, slots=True)
class ShardBlocks:
    """The parts of one shard that stand, and those still to make."""

    committed: tuple[CommitSummary, ...]
    missing: tuple[ViewBlock, ...]

    @property
    def num_parts(self) -> int:
        return len(self.committed) + len(self.missing)

    @property
    def missing_views(self) -> int:
        """With the eval pass, which is one view."""
        return sum(len(block.views) for block in self.missing)

    @property
    def num_views(self) -> int:
        return self.missing_views + sum(len(commit.block.views) for commit in self.committed)


@dataclass(frozen=True)
class PlanInputs:
    """All that a plan is made from. Shards are named by id.

    Attributes:
        sizes: bytes of each shard.
        embedding_dim: D; None where only a loaded teacher could tell: then embeddings and class sums are left out.
    """

    config: Config
    cache: CacheConfig
    urls: Mapping[str, str]
    sizes: Mapping[str, int]
    commits: Sequence[CommitSummary]
    survey: ShardSurvey
    header: Header | None
    embedding_dim: int | None

    @cached_property
    def blocks(self) -> dict[str, ShardBlocks]:
        """By shard id.

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
    def is_remote(self) -> bool:
        return any(storage.protocol(url) != "file" for url in self.urls.values())

    @property
    def num_partials(self) -> int:
        """Files of class sums: one a shard."""
        return len(self.urls) if self.cache.class_means in ("eval", "view0") else 0


@dataclass(frozen=True, slots=True)
class Work:
    """Counts; what ends in ``open`` is not committed yet.

    Attributes:
        rows: images that can be used.
        num_counted: shards whose rows were counted; those of the others are estimated.
        blocks_per_shard: how often a shard is read and decoded.
        forwards: rows the teacher is asked about, the eval pass included.
    """

    rows: Estimate
    num_shards: int
    num_counted: int
    num_parts: int
    num_parts_open: int
    blocks_per_shard: int
    forwards: Estimate
    forwards_open: Estimate


@dataclass(frozen=True, slots=True)
class Size:
    """Bytes.

    Attributes:
        outputs: of one row of each tensor, before compression; ``columns`` those of all other columns.
        row: of one row in a part; as measured where parts are there (``is_measured``), else bounded.
        parts: all of them; ``parts_open`` those still to make; ``parts_of_shard`` those of a shard of middle size.
        means: partial class sums, at most; None where D is not known.
        scratch: on the local disk of the task with the largest part.
        read: of the shards, by the parts still to make.
    """

    outputs: dict[str, int]
    columns: float
    row: Estimate
    is_measured: bool
    parts: Estimate
    parts_open: Estimate
    parts_of_shard: Estimate
    means: int | None
    scratch: Estimate
    read: int


@dataclass(frozen=True, slots=True)
class Requests:
    """Asked of S3; a look at one object counts as a get, the pieces of a large one as one each."""

    put: int = 0
    get: int = 0
    list: int = 0

    def __add__(self, other: Requests) -> Requests:
        return Requests(self.put + other.put, self.get + other.get, self.list + other.list)


@dataclass(frozen=True, slots=True)
class Traffic:
    """Objects of the finished cache; requests of what is left of the build, and of an epoch of training on one node.

    Those of a training's first epoch: later ones may find shards in the node's store.
    """

    num_objects: int
    build: Requests
    epoch: Requests


@dataclass(frozen=True, slots=True)
class BreakEven:
    """When a cache asks the teacher less often than training online: forwards an image < students x epochs.

    Attributes:
        forwards_per_image: V, and one for an eval pass.
        epochs: of the config's training, if it names any; ``num_students`` is then the fewest that pay.
    """

    forwards_per_image: int
    epochs: int | None
    num_students: int | None


@dataclass(frozen=True, slots=True)
class CachePlan:
    """What ``cache build`` would do. ``labels`` of the images that were looked at; None: no labels are read."""

    work: Work
    size: Size
    traffic: Traffic
    break_even: BreakEven
    labels: LabelCount | None

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def collect_plan_inputs(
    config: Config,
    cache: CacheConfig,
    urls: Mapping[str, str],
    sizes: Mapping[str, int],
    commits: Sequence[CommitSummary],
) -> PlanInputs:
    """Looks at header, commits, indexes and a few shards; loads no network.

    Raises:
        CacheError: the header or an index is damaged.
        ShardError: a shard has no sample with an image.
    """
    header = find_header(cache.url)
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
        embedding_dim=header.embedding_dim if header else None,
    )


def check_labels(inputs: PlanInputs) -> None:
    """Refuses a wrong ``data.label`` while the cache has no part: later its reading rules cannot change.

    Raises:
        ShardError: no sample that was looked at has that member.
    """
    if not inputs.commits:
        where = redact(next(iter(inputs.urls.values())))
        check_label_member(inputs.survey.label_count, inputs.config.data, where=where)


def embedding_dim(config: Config) -> int:
    """D of the config's teacher, from its architecture: its weights are not read.

    Raises:
        ModelError: the network cannot be built as asked.
    """
    assert config.data.num_classes is not None
    teacher = load_untrained(config.teacher, num_classes=config.data.num_classes, size=config.views.size)
    return teacher.module.embedding_dim


def needs_embedding_dim(inputs: PlanInputs) -> bool:
    """Whether the bytes depend on a D that is not known."""
    return inputs.embedding_dim is None and (inputs.cache.embeddings != "none" or inputs.num_partials > 0)


def plan_cache(inputs: PlanInputs) -> CachePlan:
    """
    Raises:
        CacheError: two commits overlap.
    """
    work = plan_work(inputs)
    labels = None if inputs.config.data.label is None else inputs.survey.label_count
    return CachePlan(work, plan_size(inputs), plan_traffic(inputs), break_even(inputs.config), labels)


def plan_work(inputs: PlanInputs) -> Work:
    blocks, rows = inputs.blocks, inputs.survey.rows
    return Work(
        rows=inputs.survey.num_rows,
        num_shards=len(blocks),
        num_counted=inputs.survey.num_counted,
        num_parts=sum(of_shard.num_parts for of_shard in blocks.values()),
        num_parts_open=sum(len(of_shard.missing) for of_shard in blocks.values()),
        blocks_per_shard=max(of_shard.num_parts for of_shard in blocks.values()),
        forwards=total(rows[shard] * of_shard.num_views for shard, of_shard in blocks.items()),
        forwards_open=_forwards_open(inputs),
    )


def _forwards_open(inputs: PlanInputs) -> Estimate:
    return total(inputs.survey.rows[shard] * of_shard.missing_views for shard, of_shard in inputs.blocks.items())


def plan_size(inputs: PlanInputs) -> Size:
    outputs, raw = _row_of_outputs(inputs), _raw_row(inputs)
    row = _row(inputs)
    parts_open = _forwards_open(inputs) * row
    committed = sum(commit.part_size_bytes for item in inputs.blocks.values() for commit in item.committed)
    return Size(
        outputs=outputs,
        columns=_column_bytes(inputs.config.views),
        row=row,
        is_measured=_measured(inputs.commits) is not None,
        parts=parts_open + Estimate.exactly(committed),
        parts_open=parts_open,
        parts_of_shard=_middle(inputs) * row,
        means=_means_bytes(inputs),
        scratch=_scratch(inputs, raw, row),
        read=sum(inputs.sizes[shard] * len(of_shard.missing) for shard, of_shard in inputs.blocks.items()),
    )


def _row(inputs: PlanInputs) -> Estimate:
    """Bytes of a row in a part: as measured in those that are there, or bounded."""
    raw = _raw_row(inputs)
    return _measured(inputs.commits) or Estimate(_LEAST_STORED * raw, raw, raw)


def _raw_row(inputs: PlanInputs) -> float:
    return sum(_row_of_outputs(inputs).values()) + _column_bytes(inputs.config.views)


def _row_of_outputs(inputs: PlanInputs) -> dict[str, int]:
    return {output.name: row_bytes(output) for output in _outputs(inputs)}


def _outputs(inputs: PlanInputs) -> tuple[Output, ...]:
    if inputs.header is not None:
        return inputs.header.outputs
    assert inputs.config.data.num_classes is not None
    # Without D the embedding is left out, and what is left is a lower bound.
    known = {} if inputs.embedding_dim else {"embeddings": "none"}
    cache = inputs.cache.model_copy(update=known)
    return outputs_of(cache, num_classes=inputs.config.data.num_classes, embedding_dim=inputs.embedding_dim or 1)


def _column_bytes(plan: ViewsConfig) -> float:
    """Of a row's columns beside the outputs, before compression; those of canaries by their share."""
    columns = part_schema({}, aug_param_columns(plan))
    return sum(_bits(item.type) / 8 * (_CANARY_SHARE if item.nullable else 1) for item in columns)


def _bits(kind: pa.DataType) -> int:
    return int(kind.bit_width)


def _measured(commits: Sequence[CommitSummary]) -> Estimate | None:
    rows = sum(commit.num_rows for commit in commits)
    if not rows:
        return None
    each = sum(commit.part_size_bytes for commit in commits) / rows
    return Estimate((1 - _MEASURED_SPREAD) * each, each, (1 + _MEASURED_SPREAD) * each)


def _middle(inputs: PlanInputs) -> Estimate:
    """Rows of all views of the shard in the middle by rows."""
    of_shards = [inputs.survey.rows[shard] * of_shard.num_views for shard, of_shard in inputs.blocks.items()]
    return sorted(of_shards, key=lambda estimate: estimate.expected)[len(of_shards) // 2]


def _means_bytes(inputs: PlanInputs) -> int | None:
    """Every shard may hold every class."""
    if not inputs.num_partials:
        return 0
    if inputs.embedding_dim is None:
        return None
    assert inputs.config.data.num_classes is not None
    row = 8 * inputs.embedding_dim + _CLASS_SUM_BYTES
    return sum(row * round(min(inputs.config.data.num_classes, rows.high)) for rows in inputs.survey.rows.values())


def _scratch(inputs: PlanInputs, raw: float, row: Estimate) -> Estimate:
    """Rows lie in spill files as they are, then in the assembled part as well; a remote shard lies beside them."""
    found = [Estimate.exactly(0)]
    for shard, of_shard in inputs.blocks.items():
        for num_views in {len(block.views) for block in of_shard.missing}:
            rows = inputs.survey.rows[shard] * num_views
            fetched = inputs.sizes[shard] if storage.protocol(inputs.urls[shard]) != "file" else 0
            found.append(rows * (row + Estimate.exactly(raw)) + Estimate.exactly(fetched))
    return max(found, key=lambda estimate: estimate.expected)


def plan_traffic(inputs: PlanInputs) -> Traffic:
    parts = sum(of_shard.num_parts for of_shard in inputs.blocks.values())
    return Traffic(
        num_objects=2 * parts + len(inputs.urls) + inputs.num_partials + _num_published(inputs),
        build=_of_parts(inputs) + _of_start(inputs) + _of_end(inputs, parts),
        epoch=_of_epoch(inputs),
    )


def _num_published(inputs: PlanInputs) -> int:
    """Header, manifest and its two tables; class means, and the JSON that they were imported from."""
    return 4 + (inputs.cache.class_means != "none") + (inputs.cache.class_means_url is not None)


def _of_parts(inputs: PlanInputs) -> Requests:
    """Of ``build_part``, for every part that is still to make."""
    row_bytes = _row(inputs).expected
    put = get = 0
    for shard, of_shard in inputs.blocks.items():
        for block in of_shard.missing:
            # The part and its commit.
            put += storage.num_puts(inputs.survey.rows[shard].expected * len(block.views) * row_bytes) + 1
        # The header twice, commit and index are read, and what arrived of the part is looked up.
        get += (5 + _fetches(inputs, shard)) * len(of_shard.missing)
    weights = inputs.config.teacher.weights_url
    if weights is not None and storage.protocol(weights) != "file":
        # Whether they were replaced.
        get += sum(len(of_shard.missing) for of_shard in inputs.blocks.values())
    # The first part of a shard makes its index; one holds its class sums, of which is asked what arrived.
    num_begun = len({commit.shard_id for commit in inputs.commits})
    num_sums = inputs.num_partials - sum(commit.means is not None for commit in inputs.commits)
    return Requests(put=put + len(inputs.urls) - num_begun + num_sums, get=get + num_sums)


def _fetches(inputs: PlanInputs, shard: str, *, num_looks: int = 1) -> int:
    """Of a remote shard its size, by each process that opens it, and once its bytes."""
    return 0 if storage.protocol(inputs.urls[shard]) == "file" else num_looks + storage.num_gets(inputs.sizes[shard])


def _of_start(inputs: PlanInputs) -> Requests:
    """Of the driver before the first part: the probe, commits, sizes, the survey, the header, the stock, the log."""
    survey, num_commits = inputs.survey, len(inputs.commits)
    num_sums = sum(commit.means is not None for commit in inputs.commits)
    shard_heads = survey.num_shard_heads if inputs.is_remote else 0
    put = 2 + (inputs.header is None) + (inputs.cache.class_means_url is not None) + 1
    # What the probe made, whether there is a manifest and whether it is relabelled, the header twice, what arrived of
    # the log.
    get = 1 + 1 + 1 + 2 + 1 + num_commits + survey.num_indexes_read + shard_heads
    folders = [num_commits, survey.num_indexes, num_commits, num_sums, survey.num_indexes]
    weights = inputs.config.teacher.weights_url
    if weights is not None and storage.protocol(weights) != "file":
        # Whether they can be read.
        get += 1
    if inputs.config.data.index is not None:
        folders.append(len(inputs.urls))
    return sum(map(_of_listing, folders), Requests(put=put, get=get, list=1) + _of_sizes(inputs))


def _of_sizes(inputs: PlanInputs) -> Requests:
    folders = Counter(url.rpartition("/")[0] for url in inputs.urls.values() if storage.protocol(url) != "file")
    return sum(
        (_of_listing(num) if storage.is_listed(folder, num) else Requests(get=num) for folder, num in folders.items()),
        Requests(),
    )


def _of_listing(num_names: int) -> Requests:
    """An empty answer is asked about again: is this a file, or a folder?"""
    return Requests(list=-(-num_names // storage.NAMES_A_PAGE)) if num_names else Requests(get=1, list=2)


def _of_end(inputs: PlanInputs, num_parts: int) -> Requests:
    """Of the driver after the last part: commits, class sums, tables, manifest, what no commit names, the log."""
    num_tables = _num_published(inputs) - 2
    # Each table takes the place of a former one, and of each is asked what arrived; as of the manifest, of which is
    # asked before whether it is relabelled. Then the labels are counted: manifest, header, table of shards, indexes.
    get = 2 + num_parts + inputs.num_partials + 2 * num_tables + 1 + 1 + 3 + min(len(inputs.urls), NUM_INDEXES_READ)
    folders = [num_parts, num_parts, inputs.num_partials, len(inputs.urls), 1]
    return sum(map(_of_listing, folders), Requests(put=num_tables + 1, get=get))


def _of_epoch(inputs: PlanInputs) -> Requests:
    """Of each shard its bytes, its index, and of one view the rows and the footer.

    At most: a rank fetches ahead, and each of its loaders opens what it meets, unless it has it open still.
    """
    num_looks = 1 + max(1, inputs.config.train.num_workers)
    return Requests(get=sum(_fetches(inputs, shard, num_looks=num_looks) + 3 for shard in inputs.urls))


def break_even(config: Config) -> BreakEven:
    """Offline forwards are paid once; online, each student pays one forward an image and epoch."""
    has_eval_pass = config.cache is not None and config.cache.class_means == "eval"
    per_image = config.views.count + has_eval_pass
    epochs = config.train.epochs if "epochs" in config.train.model_fields_set else None
    return BreakEven(per_image, epochs, None if epochs is None else per_image // epochs + 1)
