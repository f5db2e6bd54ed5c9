"""Reads and checks all validation samples before the first step, so that a bad one cannot stop the training later."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any

import torch

from pipeline import storage
from pipeline.core.errors import CacheError, ConfigError
from pipeline.core.hashing import seal, short_digest, unseal
from pipeline.core.redaction import redact
from pipeline.core.threads import map_ordered
from pipeline.shards.index import STATUSES, ShardIndex, check_samples, index_settings, index_shard
from pipeline.shards.omissions import Omissions, merged
from pipeline.shards.shard_urls import shard_id
from pipeline.student.data.local_store import NodeStore
from pipeline.student.distributed import DistributedContext
from pipeline.student.evaluation.evaluator import Evaluator
from pipeline.tasks import DOMAIN, task_of

VALIDATION = "validation.json"
_NUM_THREADS = 16


@dataclass(frozen=True, slots=True)
class ValidationSamples:
    """Counts over all ranks.

    Attributes:
        samples: all samples of the shards.
        images: samples that can be used.
        labelled: images with a label.
        left_out: number of the other samples by reason.
        stamps: by shard, a digest of its file's stamp in the store and of the reading rules; it changes with the file.
        by_column: images with a value in each column of the task: a head's label, or the domain.
        omitted: ignored members of the tars, a line for each kind; see ``Omissions``.
        was_read: whether this start has read the images; False: an earlier start of the run has.
    """

    samples: int
    images: int
    labelled: int
    left_out: dict[str, int]
    stamps: dict[str, str]
    was_read: bool
    by_column: Mapping[str, int] = field(default_factory=dict[str, int])
    omitted: Sequence[str] = ()

    def warnings(self, *, head_trained: bool, best_by: str | None, untrained: Sequence[str] = ()) -> list[str]:
        """Which samples are left out, and which metrics are not measured.

        Args:
            head_trained: whether any of the student's heads is trained; see ``TrainingSetup.untrained``.
            best_by: the metric that ``checkpoints/best.pt`` follows if no accuracy is measured; None: there is none.
            untrained: names of the outputs whose heads are not trained.
        """
        texts = [self._left_out(), self._without_domain(), *(f"validation: left out {line}" for line in self.omitted)]
        if not head_trained:
            texts.append(f"validation: no loss reads the outputs of the student's head; {_not_measured(best_by)}")
            return [text for text in texts if text]
        if untrained:
            texts.append(
                f"validation: no loss reads the student's {', '.join(untrained)}, so nothing is measured on it"
            )
        if self.labelled < self.images:
            labelled = "metrics that need labels are those of the labelled samples"
            effect = labelled if self.labelled else _not_measured(best_by)
            texts.append(f"validation: labels: {self.labelled} of {self.images} samples (data.label); {effect}")
        return [text for text in texts if text]

    def _without_domain(self) -> str:
        in_domain = self.by_column.get(DOMAIN, self.images)
        if in_domain == self.images:
            return ""
        return f"validation: {self.images - in_domain} of {self.images} images are in no domain (data.domain)"

    def _left_out(self) -> str:
        reasons = ", ".join(f"{count} {status}" for status, count in self.left_out.items())
        missing = self.samples - self.images
        return f"validation: {missing} of {self.samples} samples are left out: {reasons}" if missing else ""


def _not_measured(best_by: str | None) -> str:
    best = (
        "there will be no checkpoints/best.pt; train.eval_agreement=true lets it follow the teacher of a cache"
        if best_by is None
        else f"checkpoints/best.pt follows the {best_by}"
    )
    return f"no accuracy is measured, and {best}"


def read_validation(evaluator: Evaluator, run_url: str) -> ValidationSamples:
    """Decodes all validation images, unless the run has a record of them. Every rank calls it and reads its share.

    Raises:
        ShardError: a shard is damaged, a label cannot be used, or ``data.bad_samples`` refuses a sample.
        ConfigError: the shards hold no images.
    """
    recorded = _read_record(evaluator, run_url)
    if recorded is not None:
        return recorded
    distributed = evaluator.distributed
    rank_counts, rank_omissions = _index_shards(evaluator)
    columns = [column.name for column in task_of(evaluator.data).columns]
    totals: list[int] = distributed.sum(rank_counts.to(distributed.device)).tolist()
    by_status, (labelled, *in_columns) = totals[: len(STATUSES)], totals[len(STATUSES) :]
    omitted = _gather(rank_omissions, distributed).lines()
    counts: dict[str, int] = dict(zip(STATUSES, by_status, strict=True))
    images = counts.pop("ok")
    left_out = {status: count for status, count in counts.items() if count}
    if not images:
        raise ConfigError(
            "there are no images to evaluate on",
            code="data.no-validation-images",
            where="data.val_shards",
            got=f"{sum(left_out.values())} samples in {len(evaluator.urls)} shards, none of which can be used",
            next_step="name shards with images, or leave data.val_shards out",
        )
    # Only the main rank writes them.
    urls = evaluator.urls if distributed.is_main_rank else []
    stamps = dict(zip(map(shard_id, urls), _stamps(evaluator, urls), strict=True))
    samples = images + sum(left_out.values())
    return ValidationSamples(
        samples,
        images,
        labelled,
        left_out,
        stamps=stamps,
        was_read=True,
        by_column=dict(zip(columns, in_columns, strict=True)),
        omitted=omitted,
    )


def record_validation(samples: ValidationSamples, run_url: str) -> None:
    """Lets later starts of the run skip the reading while shards and reading rules are the same."""
    body = {name: value for name, value in asdict(samples).items() if name != "was_read"}
    storage.write(storage.join(run_url, VALIDATION), seal(body))


def _index_shards(evaluator: Evaluator) -> tuple[torch.Tensor, Omissions]:
    """Over this rank's shards: number of samples by status, then of labelled images, then of those with a value in each
    column of the task; and ignored members."""
    counts = torch.zeros(len(STATUSES) + 1 + len(task_of(evaluator.data).columns), dtype=torch.int64)
    omissions = Omissions()
    for url in evaluator.rank_urls:
        with evaluator.report_moved():
            lease = NodeStore.of(evaluator.data).acquire_url(url)
        with lease as file:
            index = index_shard(file.path, evaluator.data, where=url, threads=evaluator.num_threads)
        check_samples(index, evaluator.data, where=url)
        counts += _count(index)
        omissions.include(index.omitted)
    return counts, omissions


def _gather(omissions: Omissions, distributed: DistributedContext) -> Omissions:
    """The omissions of all ranks, on every rank."""
    line = json.dumps({"counts": omissions.counts, "examples": omissions.examples}).encode() + b"\n"
    joined = distributed.join(torch.tensor(list(line), dtype=torch.uint8, device=distributed.device))
    bodies = map(json.loads, bytes(joined.tolist()).splitlines())
    return merged(Omissions(Counter(body["counts"]), body["examples"]) for body in bodies)


def _count(index: ShardIndex) -> torch.Tensor:
    by_status = torch.bincount(torch.from_numpy(index.status).long(), minlength=len(STATUSES))
    targets = index.ok_targets
    has_value = [index.task.has_target(targets), *(item.has_target(targets[item.name]) for item in index.task.columns)]
    return torch.cat([by_status, torch.tensor([int(has_value_N.sum()) for has_value_N in has_value])])


def _read_record(evaluator: Evaluator, run_url: str) -> ValidationSamples | None:
    """The record of an earlier start, if it is of these shards: each rank checks its share, and all ranks agree."""
    url = storage.join(run_url, VALIDATION)
    body = _parse(storage.read_if_exists(url, max_bytes=storage.MAX_RECORD_BYTES), url)
    urls = evaluator.rank_urls
    stamps = dict(zip(map(shard_id, urls), _stamps(evaluator, urls), strict=True))
    recorded: Mapping[str, str] = body.get("stamps", {})
    changed = len(recorded) != len(evaluator.urls) or any(recorded.get(name) != stamps[name] for name in stamps)
    if evaluator.distributed.sum(torch.tensor(int(changed), device=evaluator.distributed.device)):
        return None
    return ValidationSamples(**body, was_read=False)


def _parse(data: bytes | None, url: str) -> dict[str, Any]:
    """The record without its digest; empty if it is missing, or damaged, in which case it is written again."""
    if data is None:
        return {}
    try:
        body = unseal(data, where=redact(url))
    except CacheError:
        return {}
    body = {name: value for name, value in body.items() if name != "digest"}
    # Another version may have written other fields.
    return body if body.keys() == {item.name for item in fields(ValidationSamples)} - {"was_read"} else {}


def _stamps(evaluator: Evaluator, urls: list[str]) -> list[str]:
    """A digest for each shard, of its stamp and the rules by which it is read."""
    rules = {
        **index_settings(evaluator.data),
        "bad_samples": evaluator.data.bad_samples,
        "max_bad_share": evaluator.data.max_bad_share,
    }
    with evaluator.report_moved():
        return [short_digest([stamp, rules]) for stamp in map_ordered(storage.stamp, urls, threads=_NUM_THREADS)]
