"""Warnings about losses that suit the data badly, with numbers and a remedy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from pipeline.cache.format.codec import config_key
from pipeline.models import random_weights_warnings
from pipeline.student.data.sources import RowSource
from pipeline.student.losses import CompositeLoss
from pipeline.student.losses.dist import MIN_LABELS
from pipeline.student.supervision.class_frequencies import counts_by_head
from pipeline.student.supervision.spec import SupervisionSpec
from pipeline.student.supervision.two_classes import REASONS, two_class_heads
from pipeline.tasks import TOKENS, TaskHead, task_of
from schemas.cache_format import Header, Statistics
from schemas.config import Config, DistLoss, LossConfig, TokenLossSection

# The smallest ratio of long-tailed benchmarks.
_STRONG_IMBALANCE = 10
# A few rare classes among many are no reason for a warning.
_MANY_ABSENT = 0.1
_NUM_SAMPLED_SHARDS = 16
_NUM_NAMED = 5

# A student ends some tenths of a nat, or of correlation, away from its teacher; a hundredth is a few per cent of that.
_MAX_DISTANCE = 0.01
# 2.6 degrees between the stored token and the teacher's.
_MIN_TOKEN_COSINE = 0.999
_BETTER = {"topk": "int8", "int4": "int8", "int8": "fp16", "int8t": "fp16", "fp16": "fp32"}


def loss_warnings(
    config: Config,
    spec: SupervisionSpec,
    source: RowSource,
    class_counts: Mapping[str, NDArray[np.int64]],
    *,
    world_size: int,
) -> list[str]:
    """One line each. Labels are read only for DIST, the one loss that is known to suffer from their distribution.

    Args:
        class_counts: ``Supervision.class_counts``.
    """
    texts = random_weights_warnings(config.teacher.models) if config.teacher.mode != "none" else []
    loss = CompositeLoss(config.loss, source.task, where="loss")
    texts += [
        f"{_named(section.name, head)} with K = 2: {REASONS[section.name]}; use kd"
        for _, section, head in two_class_heads(loss)
    ]
    texts += _few_labels(loss)
    if config.teacher.standardizes and loss.token_layers:
        named = ", ".join(loss.token_layers)
        texts.append(f"teacher.standardize applies to the embedding alone, so {named} compares tokens as they are")
    texts += _absent_priors(class_counts, loss)
    terms = [(section, heads) for section, heads in loss.heads_by_term if isinstance(section, DistLoss)]
    by_head: dict[TaskHead, list[DistLoss]] = {}
    for section, heads in terms:
        for head in heads:
            if head.kind == "class" and section.weight:
                by_head.setdefault(head, []).append(section)
    counts = _label_counts(spec, source, [*by_head]) if by_head else {}
    for head, sections in by_head.items():
        count_K = counts.get(head.column)
        if count_K is None or not count_K.any():
            continue
        share_K = count_K / count_K.sum()
        texts += _imbalance(_named("dist", head.name), share_K)
        intra = [section for section in sections if section.intra_weight]
        if intra:
            gathers = world_size == 1 or all(section.gather for section in intra)
            rows = config.train.global_batch_size // (1 if gathers else world_size)
            texts += _absent_classes(
                _named("dist", head.name), share_K, rows, config.train.views_per_image, may_gather=not gathers
            )
    return texts


def _named(loss: str, head: str | None) -> str:
    return loss if head is None else f"{loss} of head {head}"


def _few_labels(loss: CompositeLoss) -> list[str]:
    return [
        f"{_named('dist', head.name)}: relations within a row need {MIN_LABELS} labels, and K = {head.num_classes}, so "
        "inter_weight has no effect"
        for section, heads in loss.heads_by_term
        if isinstance(section, DistLoss) and section.weight and section.inter_weight
        for head in heads
        if head.kind == "multilabel" and (head.num_classes or 0) < MIN_LABELS
    ]


def _absent_priors(counts: Mapping[str, NDArray[np.int64]], loss: CompositeLoss) -> list[str]:
    texts: list[str] = []
    for head in loss.heads_of_priors:
        absent = np.flatnonzero(counts[head.column] == 0)
        if len(absent):
            named = ", ".join(map(str, absent[:_NUM_NAMED])) + (", …" if len(absent) > _NUM_NAMED else "")
            texts.append(
                f"{_named('ce', head.name)} with a prior: {len(absent)} of {head.num_classes} classes have no training "
                f"rows ({named}); each counts as half a row"
            )
    return texts


def _imbalance(loss: str, share_K: NDArray[np.float64]) -> list[str]:
    occurring = share_K[share_K > 0]
    ratio = occurring.max() / occurring.min()
    if ratio < _STRONG_IMBALANCE:
        return []
    return [
        f"{loss} on imbalanced classes: the most frequent has {occurring.max():.2%} of the labels, the rarest "
        f"{occurring.min():.2%}, a ratio of {ratio:.0f}; users report DIST below plain KD here: compare with kd"
    ]


def _absent_classes(
    loss: str, share_K: NDArray[np.float64], rows: int, views_per_image: int, *, may_gather: bool
) -> list[str]:
    """For batches of images sampled by these shares; the batches of the order are close to that."""
    images = rows // views_per_image
    absent = float(((1 - share_K) ** images > 0.5).mean())
    if absent <= _MANY_ABSENT:
        return []
    gather = "set gather: true, " if may_gather else ""
    batches = f"batches of {rows} rows" + (f" of {images} images" if views_per_image > 1 else "")
    return [
        f"{loss} in {batches}: {absent:.0%} of the {len(share_K)} classes are absent from most of them, "
        "and intra relations of an absent class are noise; "
        f"{gather}raise train.global_batch_size, or lower intra_weight"
    ]


def _label_counts(
    spec: SupervisionSpec, source: RowSource, heads: Sequence[TaskHead]
) -> Mapping[str, NDArray[np.int64]]:
    """[K] by the column of a head, from the cache's statistics, or from the indexes of a few shards.

    A cache counts labels on views that are not mixed, and those of a single head by class.
    """
    if not source.task.members:
        return {}
    stored = spec.caches[0].manifest.statistics.class_counts if spec.caches else {}
    if stored:
        count_K = np.zeros(source.task.num_classes, np.int64)
        count_K[list(stored)] = list(stored.values())
        return {head.column: count_K[source.task.class_range(head)] for head in heads}
    return counts_by_head(source, heads, shards=_spread(len(source.shard_ids)))


def _spread(num_shards: int) -> Sequence[int]:
    return np.unique(np.linspace(0, num_shards - 1, _NUM_SAMPLED_SHARDS, dtype=np.int64)).tolist()


def fidelity_warnings(header: Header, statistics: Statistics, losses: Sequence[LossConfig]) -> list[str]:
    """One line for each loss at whose temperature the stored outputs are far from the teacher's.

    DIST reads correlations of probabilities, other losses with a temperature their KL.
    """
    if not statistics.fidelity_rows:
        return []
    checks = (_fidelity_warning, _token_warning)
    texts = [check(header, statistics, loss) for loss in losses if loss.weight for check in checks]
    return [text for text in texts if text is not None]


def _token_warning(header: Header, statistics: Statistics, loss: LossConfig) -> str | None:
    """A dimension with large numbers takes the levels of int8 from all others."""
    if not isinstance(loss, TokenLossSection) or header.output(TOKENS) is None:
        return None
    cosine, encoding = statistics.token_cosine_sum / statistics.fidelity_rows, str(header.teacher["tokens"])
    if cosine >= _MIN_TOKEN_COSINE:
        return None
    return (
        f"{loss.name}: tokens in {encoding} have a mean cosine of {cosine:.4f} to the teacher's, below "
        f"{_MIN_TOKEN_COSINE}; cache.tokens={_BETTER[encoding]} is closer"
    )


def _fidelity_warning(header: Header, statistics: Statistics, loss: LossConfig) -> str | None:
    temperature: float | None = getattr(loss, "temperature", None)
    read = CompositeLoss([loss], task_of(header.data), where="loss").teacher_outputs
    stored = [name for name in read if header.output(name) is not None]
    if temperature is None or not stored or not statistics.kl_sum:
        return None
    sums, unit = (
        (statistics.pearson_sum, "of correlation") if loss.name == "dist" else (statistics.kl_sum, "nats of KL")
    )
    distance, measured_at = _at(sums, temperature)
    distance /= statistics.fidelity_rows
    key = name = config_key(stored[0])
    encoding = written = str(header.teacher[key])
    if encoding == "head":
        key, encoding = "embeddings", str(header.teacher["embeddings"])
    better = _BETTER.get(encoding.partition(":")[0])
    if distance <= _MAX_DISTANCE or better is None:
        return None
    return (
        f"{loss.name} at T = {temperature:g}: {name} in {written} are {distance:.2g} {unit} from the teacher's"
        f"{measured_at}, more than {_MAX_DISTANCE}; cache.{key}={better} is closer"
    )


def _at(sums: dict[str, float], temperature: float) -> tuple[float, str]:
    """The sum at a temperature, linear in log T between those of the build and constant beyond; and a note on T."""
    temperatures, values = zip(*sorted((float(key), value) for key, value in sums.items()), strict=True)
    value = float(np.interp(np.log(temperature), np.log(temperatures), values))
    nearest = min(max(temperature, temperatures[0]), temperatures[-1])
    return value, "" if nearest == temperature else f" (measured at T = {nearest:g}, the nearest)"
