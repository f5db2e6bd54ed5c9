"""One screen about a cache: what it holds, or how far its build has come."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass
from typing import Any

from pipeline import storage
from pipeline.cache import layout
from pipeline.cache.commit import read_commits
from pipeline.cache.identity import read_header
from pipeline.cache.manifest import read_manifest
from pipeline.cache.statistics import merge_statistics
from schemas.manifest import Header, Statistics


@dataclass(frozen=True, slots=True)
class CacheReport:
    """Facts for a screen or for ``--json``. Shares are of 1, sizes in bytes; None: not known (yet).

    What stands in commits is counted at any time: ``shards_begun``, parts, rows and bytes. Totals of the cache are
    known once it is finished.
    """

    url: str
    finished: bool
    fingerprint: str
    views_id: str
    teacher: str
    views: str
    num_shards: int | None
    num_ok: int | None
    num_views: int | None
    shards_begun: int
    num_parts: int
    parts_by_block: dict[str, int]
    rows_by_block: dict[str, int]
    size_bytes: int
    bytes_per_row: float | None
    skipped: dict[str, int] | None
    outputs: dict[str, str]
    class_means: str
    teacher_top1: float | None
    kl_nats: dict[str, float]

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def inspect_cache(cache_url: str) -> CacheReport:
    """Reads header and manifest; of an unfinished build, the commits.

    Raises:
        CacheError: there is no cache here, or it is damaged.
    """
    header = read_header(cache_url)
    commits = read_commits(cache_url)
    finished = storage.exists(storage.join(cache_url, layout.MANIFEST))
    manifest = read_manifest(cache_url)[0] if finished else None
    rows: Counter[str] = Counter()
    for commit in commits:
        rows[commit.block.name] += sum(view.rows for view in commit.views)
    size_bytes = sum(commit.part.size_bytes for commit in commits)
    statistics = manifest.statistics if manifest else merge_statistics([commit.statistics for commit in commits])
    return CacheReport(
        url=storage.redact(cache_url),
        finished=finished,
        fingerprint=header.fingerprint,
        views_id=header.views_id,
        teacher=f"{_model(header)}, {header.num_classes} classes, {header.teacher['precision']}",
        views=f"{header.views['kind']}, seed {header.views['seed']}, {header.teacher['size']} px",
        num_shards=manifest.num_shards if manifest else None,
        num_ok=manifest.num_ok if manifest else None,
        num_views=manifest.num_views if manifest else None,
        shards_begun=len({commit.shard_id for commit in commits}),
        num_parts=len(commits),
        parts_by_block=dict(sorted(Counter(commit.block.name for commit in commits).items())),
        rows_by_block=dict(sorted(rows.items())),
        size_bytes=size_bytes,
        bytes_per_row=size_bytes / rows.total() if rows.total() else None,
        skipped=manifest.skipped if manifest else None,
        outputs={output.name: f"{output.dtype} {list(output.shape)}" for output in header.outputs},
        class_means=str(header.teacher["class_means"]),
        teacher_top1=statistics.top1_hits / statistics.labelled if statistics.labelled else None,
        kl_nats=_kl(statistics),
    )


def _model(header: Header) -> str:
    return str(header.teacher["architecture"]["model"])


def _kl(statistics: Statistics) -> dict[str, float]:
    """Mean KL from the fp32 logits to the stored ones at each temperature, over the sampled rows."""
    if not statistics.fidelity_rows:
        return {}
    return {temperature: total / statistics.fidelity_rows for temperature, total in statistics.kl_sum.items()}
