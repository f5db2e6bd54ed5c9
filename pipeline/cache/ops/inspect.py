"""A summary of a cache: its content, or the progress of its build."""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import asdict, dataclass
from typing import Any

from pipeline import storage
from pipeline.cache.build.build_log import STALE_S, read_last_log
from pipeline.cache.build.commit import CommitSummary, stream_commits
from pipeline.cache.build.manifest import read_manifest
from pipeline.cache.build.statistics import StatisticsFold, mean_fidelity
from pipeline.cache.format import layout
from pipeline.cache.format.codec import config_key, row_bytes
from pipeline.cache.format.header import read_header
from pipeline.cache.read.labels import cached_labels, committed_labels, reading_rules
from pipeline.cache.read.moments import find_moments
from pipeline.cache.read.reader import open_cache
from pipeline.core.errors import CacheError
from pipeline.core.redaction import redact
from pipeline.shards.labels import LabelCount, domain_warning, label_warning
from pipeline.tasks import task_of
from schemas.cache_format import BuildLog, Header, Manifest, Output
from schemas.config import ViewsConfig, size_text

# A driver renews its log when a part is done, so this many part times may pass without a renewal.
_SILENT_PARTS = 10


@dataclass(frozen=True, slots=True)
class CacheReport:
    """The result for a screen or for ``--json``. Shares are of 1, sizes in bytes; None: unknown.

    ``shards_begun``, parts, rows and bytes are those of the commits; totals of the cache are known once it is finished.
    ``num_parts_planned``, ``builder``, ``log_age_s`` (seconds since it renewed its log) and ``eta_s`` are those of a
    running build; ``eta_s`` is None after a long silence.
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
    num_parts_planned: int | None
    builder: str | None
    log_age_s: float | None
    eta_s: float | None
    parts_by_block: dict[str, int]
    rows_by_block: dict[str, int]
    size_bytes: int
    bytes_per_row: float | None
    skipped: dict[str, int] | None
    outputs: dict[str, str]
    derived: str | None
    class_means: str
    moments: str | None
    labels: str | None
    teacher_metrics: dict[str, float | None]
    teacher_by_domain: dict[str, dict[str, float | None]]
    kl_nats: dict[str, float]
    pearson: dict[str, float]
    total_variation: float | None
    argmax_flips: float | None
    embedding_cosine: float | None
    token_cosine: float | None
    warnings: tuple[str, ...]

    @property
    def teacher_top1(self) -> float | None:
        return self.teacher_metrics.get("top-1")

    def as_dict(self) -> dict[str, Any]:
        """The fields by name; ``log_age_s`` and the teacher's top-1 accuracy also by their former names."""
        return {**asdict(self), "last_heard_s": self.log_age_s, "teacher_top1": self.teacher_top1}


def inspect_cache(cache_url: str, *, now_s: float | None = None) -> CacheReport:
    """Reads header, manifest and commits, and the log of a running build.

    Args:
        now_s: seconds since 1970.

    Raises:
        CacheError: there is no cache here, or it is damaged.
    """
    header = read_header(cache_url)
    task = task_of(header.data)
    # Streamed: with their class counts, the commits of many shards do not fit into memory.
    commits: list[CommitSummary] = []
    fold = StatisticsFold(task)
    for commit in stream_commits(cache_url):
        commits.append(CommitSummary.of(commit))
        fold.add(commit.statistics)
    finished = storage.exists(storage.join(cache_url, layout.MANIFEST))
    manifest = read_manifest(cache_url)[0] if finished else None
    rows: Counter[str] = Counter()
    for commit in commits:
        rows[commit.block.name] += commit.num_rows
    log = read_last_log(cache_url)
    now_s = time.time() if now_s is None else now_s
    labels = _labels(cache_url, header, commits, manifest)
    settings = manifest.labels.data if manifest and manifest.labels else header.data
    finished_cache = cache_url if finished else None
    warnings: tuple[str | None, ...] = ()
    if labels is not None and (labels.num_labelled < labels.num_images or labels.num_without_domain):
        rules = reading_rules(settings)
        warnings = (label_warning(labels, rules, finished_cache=finished_cache), domain_warning(labels, rules))
    size_bytes, model = sum(commit.part_size_bytes for commit in commits), header.teacher["architecture"]["model"]
    heads = [" ".join(filter(None, (head.name, str(head.num_classes)))) for head in task.heads]
    classes = [f"{', '.join(heads)} classes"] if heads else []
    statistics = manifest.statistics if manifest else fold.result()
    return CacheReport(
        url=redact(cache_url),
        finished=finished,
        fingerprint=header.fingerprint,
        views_id=header.views_id,
        teacher=", ".join([model, *classes, header.teacher["precision"]]),
        views=f"{', '.join(_view_names(header))}, seed {header.views['seed']}, {size_text(header.input_size)} px",
        num_shards=manifest.num_shards if manifest else None,
        num_ok=manifest.num_ok if manifest else None,
        num_views=manifest.num_views if manifest else None,
        shards_begun=len({commit.shard_id for commit in commits}),
        num_parts=len(commits),
        num_parts_planned=log.num_parts if log else None,
        builder=f"process {log.process} on {log.host}" if log else None,
        log_age_s=now_s - log.renewed_s if log else None,
        eta_s=_eta_s(log, len(commits), now_s) if log else None,
        parts_by_block=dict(sorted(Counter(commit.block.name for commit in commits).items())),
        rows_by_block=dict(sorted(rows.items())),
        size_bytes=size_bytes,
        bytes_per_row=size_bytes / rows.total() if rows.total() else None,
        skipped=manifest.skipped if manifest else None,
        outputs={output.name: _encoding(header, output) for output in header.outputs},
        derived=_derived(header),
        class_means=str(header.teacher["class_means"]),
        moments=_moments(cache_url) if manifest else None,
        labels=None if labels is None else str(labels),
        teacher_metrics=task.teacher_metrics(statistics),
        teacher_by_domain=task.teacher_metrics_by_domain(statistics),
        **mean_fidelity(header, statistics),
        warnings=tuple(filter(None, warnings)),
    )


def _labels(
    cache_url: str, header: Header, commits: list[CommitSummary], manifest: Manifest | None
) -> LabelCount | None:
    """None if no labels are read, nothing is committed, or an index is not readable, which ``verify`` reports."""
    reads_labels = task_of(header.data).members or (manifest is not None and manifest.labels is not None)
    if not reads_labels or not commits:
        return None
    try:
        return cached_labels(open_cache(cache_url)) if manifest else committed_labels(cache_url, commits)
    except CacheError:
        return None


def _moments(cache_url: str) -> str | None:
    record = find_moments(open_cache(cache_url))
    return None if record is None else f"of {record.num_rows} rows, {record.num_mixed} of them mixed"


def _eta_s(log: BuildLog, num_commits: int, now_s: float) -> float | None:
    """From the mean time of the parts that this driver has built so far."""
    num_built = log.num_done - log.num_before
    if not num_built:
        return None
    part_s = (log.renewed_s - log.began_s) / num_built
    if now_s - log.renewed_s > max(STALE_S, _SILENT_PARTS * part_s):
        return None
    return max(log.num_parts - num_commits, 0) * part_s


def _view_names(header: Header) -> list[str]:
    """The kind of the views and the options of the plan."""
    options = (name for name, field in ViewsConfig.model_fields.items() if field.default is None and name != "size")
    letterbox = ["letterbox"] if header.views.get("eval_box") == "letterbox" else []
    stored = [] if header.pixels is None else [f"stored as {header.pixels}"]
    repeat = [f"mix_repeat {header.views['mix_repeat']}"] if "mix_repeat" in header.views else []
    return [
        str(header.views["kind"]),
        *(name for name in options if name in header.views),
        *letterbox,
        *repeat,
        *stored,
    ]


def _derived(header: Header) -> str | None:
    """What the cache was made from, if that is not a teacher."""
    derived = header.derived
    if derived is None:
        return None
    changes = [f"{key} {old} -> {new}" for key, (old, new) in derived.encodings.items()]
    sources = ", ".join(sha256[:16] for sha256 in derived.sources)
    return ", ".join([derived.kind, *changes, f"from the manifests {sources}"])


def _encoding(header: Header, output: Output) -> str:
    encoding = header.teacher.get(config_key(output.name), output.encoding)
    # A value of --json, unchanged since the first version.
    return f"{encoding} {list(output.shape)}, {row_bytes(output)} bytes a row"
