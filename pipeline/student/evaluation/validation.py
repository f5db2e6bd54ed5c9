"""Validation samples are read and checked before the first step, so that none of them can end a training later."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch

from pipeline import storage
from pipeline.core.errors import CacheError, ConfigError
from pipeline.core.hashing import seal, short, unseal
from pipeline.core.redaction import redact
from pipeline.core.threads import map_ordered
from pipeline.shards.index import STATUSES, ShardIndex, check_samples, index_settings, index_shard
from pipeline.shards.omissions import Omissions, merged
from pipeline.shards.shard_urls import shard_id
from pipeline.student.data.local_store import NodeStore
from pipeline.student.distributed import DistributedContext
from pipeline.student.evaluation.evaluator import Evaluator

VALIDATION = "validation.json"
_LOOK_UPS = 16


@dataclass(frozen=True, slots=True)
class ValidationSamples:
    """Counts over all ranks.

    Attributes:
        samples: all of the shards.
        images: those that can be used.
        labelled: images with a label.
        left_out: the others, by the reason.
        stamps: by shard, what its store says of the file; another text after it was replaced.
        omitted: what was passed over in the tars, a line for each kind; see ``Omissions``.
        was_read: whether this start has read the images; False: a former start of the run has.
    """

    samples: int
    images: int
    labelled: int
    left_out: dict[str, int]
    stamps: dict[str, str]
    was_read: bool
    omitted: Sequence[str] = ()

    def warnings(self, *, head_trained: bool, best_by: str | None) -> list[str]:
        """What is left out, and what is not measured.

        Args:
            head_trained: whether a loss reads the student's logits; see ``head_is_trained``.
            best_by: the metric that ``checkpoints/best.pt`` follows where no accuracy is measured; None: there is none.
        """
        texts = [self._left_out(), *(f"validation: left out {line}" for line in self.omitted)]
        if not head_trained:
            texts.append(f"validation: no loss reads the student's logits; {_not_measured(best_by)}")
        elif self.labelled < self.images:
            rest = "accuracy and calibration are those of the labelled samples"
            what = rest if self.labelled else _not_measured(best_by)
            texts.append(f"validation: labels: {self.labelled} of {self.images} samples (data.label); {what}")
        return [text for text in texts if text]

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
    """Every rank calls it; each decodes all images of its share of the shards, unless the run has a record of them.

    Raises:
        ShardError: a shard is damaged, a label cannot be used, or ``data.bad_samples`` refuses a sample.
        ConfigError: the shards hold no images.
    """
    recorded = _recorded(evaluator, run_url)
    if recorded is not None:
        return recorded
    counts, omissions = _counts(evaluator)
    found = _sum(torch.stack([torch.zeros(len(STATUSES) + 1, dtype=torch.int64), *counts]), evaluator.distributed)
    omitted = _over_ranks(omissions, evaluator.distributed).lines()
    left_out = {status: count for status, count in zip(STATUSES, found, strict=False) if count and status != "ok"}
    images = found[STATUSES.index("ok")]
    if not images:
        raise ConfigError(
            "there are no images to evaluate on",
            code="data.no-validation-images",
            where="data.val_shards",
            got=f"{sum(left_out.values())} samples in {len(evaluator.urls)} shards, none of which can be used",
            next_step="name shards with images, or leave data.val_shards out",
        )
    # Rank 0 alone writes them.
    urls = evaluator.urls if evaluator.distributed.is_main_rank else []
    stamps = dict(zip(map(shard_id, urls), _stamps(evaluator, urls), strict=True))
    samples = images + sum(left_out.values())
    return ValidationSamples(samples, images, found[-1], left_out, stamps=stamps, was_read=True, omitted=omitted)


def record_validation(found: ValidationSamples, run_url: str) -> None:
    """Lets later starts of the run leave out the reading, as long as shards and reading rules are the same."""
    body = {name: value for name, value in asdict(found).items() if name != "was_read"}
    storage.write(storage.join(run_url, VALIDATION), seal(body))


def _counts(evaluator: Evaluator) -> tuple[list[torch.Tensor], Omissions]:
    """Of each shard of this rank: samples by status, and labelled images; and what was passed over in all of them."""
    counts: list[torch.Tensor] = []
    omissions = Omissions()
    for url in evaluator.own_urls:
        with evaluator.report_moved():
            file = NodeStore.of(evaluator.data).acquire_url(url)
        with file as held:
            index = index_shard(held.path, evaluator.data, where=url, threads=evaluator.num_threads)
        check_samples(index, evaluator.data, where=url)
        counts.append(_count(index))
        omissions.include(index.omitted)
    return counts, omissions


def _over_ranks(own: Omissions, distributed: DistributedContext) -> Omissions:
    """Those of all ranks, on every rank."""
    line = json.dumps({"counts": own.counts, "examples": own.examples}).encode() + b"\n"
    joined = distributed.join(torch.tensor(list(line), dtype=torch.uint8, device=distributed.device))
    bodies = map(json.loads, bytes(joined.tolist()).splitlines())
    return merged(Omissions(Counter(body["counts"]), body["examples"]) for body in bodies)


def _count(index: ShardIndex) -> torch.Tensor:
    by_status = torch.bincount(torch.from_numpy(index.status).long(), minlength=len(STATUSES))
    labelled = int((index.label[index.ok] >= 0).sum())
    return torch.cat([by_status, torch.tensor([labelled])])


def _sum(counts: torch.Tensor, distributed: DistributedContext) -> list[int]:
    return distributed.sum(counts.sum(0).to(distributed.device)).tolist()


def _recorded(evaluator: Evaluator, run_url: str) -> ValidationSamples | None:
    """The record of a former start, if it is of these shards: each rank looks at its share, and all agree."""
    url = storage.join(run_url, VALIDATION)
    data = storage.read_if_exists(url, max_bytes=storage.MAX_RECORD_BYTES)
    body = _opened(data, url)
    stamps = dict(zip(map(shard_id, evaluator.own_urls), _stamps(evaluator, evaluator.own_urls), strict=True))
    known: Mapping[str, str] = body.get("stamps", {})
    changed = len(known) != len(evaluator.urls) or any(known.get(name) != stamp for name, stamp in stamps.items())
    if evaluator.distributed.sum(torch.tensor(int(changed), device=evaluator.distributed.device)):
        return None
    return ValidationSamples(**body, was_read=False)


def _opened(data: bytes | None, url: str) -> dict[str, Any]:
    """Without its digest; empty where there is none, or a damaged one, which is written again."""
    if data is None:
        return {}
    try:
        body = unseal(data, where=redact(url))
    except CacheError:
        return {}
    body = {name: value for name, value in body.items() if name != "digest"}
    # Another version may have written other counts.
    return body if body.keys() == {field.name for field in fields(ValidationSamples)} - {"was_read"} else {}


def _stamps(evaluator: Evaluator, urls: list[str]) -> list[str]:
    """Of each shard, with the rules by which it is read."""
    rules = {
        **index_settings(evaluator.data),
        "bad_samples": evaluator.data.bad_samples,
        "max_bad_share": evaluator.data.max_bad_share,
    }
    with evaluator.report_moved():
        return [short([stamp, rules]) for stamp in map_ordered(storage.stamp, urls, threads=_LOOK_UPS)]
