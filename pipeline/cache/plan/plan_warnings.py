"""Warnings about a plan: one sentence each, with its numbers and a next step."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from pipeline.augment.random_bits import key_of, permutation
from pipeline.cache.format.header import views_body
from pipeline.cache.plan.build_plan import CachePlan
from pipeline.cache.plan.plan_inputs import PlanInputs
from pipeline.core.hashing import differences
from pipeline.models import random_weights_warnings
from pipeline.shards.index import NO_LABEL, index_settings
from pipeline.shards.labels import label_warning

_MIN_LABEL_SPREAD = 0.5
_MANY_CLASSES = 1000
_MANY_OBJECTS = 1_000_000
_MANY_READS = 5
# With so many labels a class, the last class is not absent by chance.
_MIN_LABELS_PER_CLASS = 10


def plan_warnings(inputs: PlanInputs, plan: CachePlan) -> list[str]:
    warnings = (check(inputs, plan) for check in _CHECKS)
    return [warning for warning in warnings if warning is not None]


def _different_header(inputs: PlanInputs, _: CachePlan) -> str | None:
    """Compares all keys but the teacher's weights, which a build compares when it claims the cache."""
    header = inputs.header
    if header is None:
        return None
    cache, teacher = inputs.cache, inputs.config.teacher
    expected = {
        "precision": teacher.precision,
        **{name: getattr(cache, name) for name in ("logits", "embeddings", "class_means")},
    }
    if cache.class_means_url is not None:
        # The header has the digest of this file, which a plan does not read.
        del expected["class_means"]
    changed = [
        *differences(header.views, views_body(inputs.config.views), "views."),
        *differences({key: header.teacher[key] for key in expected}, expected, "teacher."),
        *differences(header.data, index_settings(inputs.config.data), "data."),
    ]
    if not changed:
        return None
    return f"cache.url holds a cache of another config, which a build refuses: {'; '.join(changed)}"


def _class_sorted(inputs: PlanInputs, _: CachePlan) -> str | None:
    group = inputs.config.views.mix_group
    spread = label_spread(inputs.survey.labels, group)
    if spread is None or spread >= _MIN_LABEL_SPREAD:
        return None
    harm = "images are mixed within few classes" if inputs.config.views.mixes else "a batch has few classes"
    return (
        f"the shards are sorted by class: {group} neighbours have {spread:.0%} of the label entropy of a shuffled set, "
        f"so {harm}; shuffle them (stillroom shards pack shuffles image folders)"
    )


def label_spread(labels: Sequence[NDArray[np.int32]], group: int) -> float | None:
    """Mean label entropy of runs of ``group`` rows, as a share of the entropy after shuffling: 1 if the order is
    independent of the labels, 0 if each run has one class; None if there are too few labels.

    Args:
        labels: int32 labels of each shard in tar order.
    """
    labelled = [label_N[label_N != NO_LABEL] for label_N in labels]
    size = min(group, max(map(len, labelled), default=0))
    if size < 2:
        return None
    pooled = np.concatenate(labelled)
    shuffled = _mean_entropy([pooled[permutation(key_of("plan/labels"), len(pooled))]], size)
    return _mean_entropy(labelled, size) / shuffled if shuffled > 0 else None


def _mean_entropy(labels: Sequence[NDArray[np.int32]], size: int) -> float:
    """In nats, over all complete runs of ``size`` rows."""
    runs = [run for label_N in labels for run in label_N[: len(label_N) // size * size].reshape(-1, size)]
    return float(np.mean([_entropy(run) for run in runs]))


def _entropy(label_N: NDArray[np.int32]) -> float:
    share_C = np.unique(label_N, return_counts=True)[1] / len(label_N)
    return float(-(share_C * np.log(share_C)).sum())


def _class_range(inputs: PlanInputs, _: CachePlan) -> str | None:
    num_classes = inputs.config.data.num_classes
    assert num_classes is not None
    label_N = np.concatenate([np.empty(0, np.int32), *inputs.survey.labels])
    label_N = label_N[label_N != NO_LABEL]
    if not len(label_N):
        return None
    largest = int(label_N.max())
    if largest >= num_classes:
        return f"a label is {largest}, and data.num_classes is {num_classes}: a build refuses it"
    if largest < num_classes - 1 and len(label_N) >= _MIN_LABELS_PER_CLASS * num_classes:
        return (
            f"data.num_classes is {num_classes}, but none of {len(label_N)} sampled labels is above {largest}: "
            "is it the K of the teacher, and do labels and teacher use the same classes?"
        )
    return None


def _missing_labels(inputs: PlanInputs, _: CachePlan) -> str | None:
    data, count = inputs.config.data, inputs.survey.label_count
    missing = count.num_images - count.num_labelled
    if not missing or not inputs.num_class_sums or data.missing_labels == "ignore":
        return label_warning(count, data)
    return (
        f"{missing} of {count.num_images} sampled images have no label, which class means refuse; "
        "data.missing_labels=ignore averages over the other images"
    )


def _int8_resolution(inputs: PlanInputs, plan: CachePlan) -> str | None:
    num_classes, kind = inputs.config.data.num_classes, str(inputs.cache.logits)
    assert num_classes is not None
    if kind != "int8" or num_classes <= _MANY_CLASSES:
        return None
    size_bytes = plan.size.outputs["logits"]
    return (
        f"int8 spreads 256 levels over {num_classes} logits and stores {size_bytes} bytes a row, "
        f"{size_bytes * plan.work.forwards.expected / 1e9:.1f} GB in all: close logits become equal; "
        "cache.logits=int4 keeps the largest logits distinct in about half of the bytes"
    )


def _many_objects(inputs: PlanInputs, plan: CachePlan) -> str | None:
    if plan.traffic.num_objects <= _MANY_OBJECTS:
        return None
    return (
        f"{plan.traffic.num_objects} objects take long to list and delete, and cost requests; larger shards "
        f"({plan.work.num_shards} now) or cache.views_per_part above {inputs.cache.views_per_part} need fewer"
    )


def _many_reads(inputs: PlanInputs, plan: CachePlan) -> str | None:
    if not inputs.is_remote or plan.work.blocks_per_shard < _MANY_READS:
        return None
    return (
        f"every shard is fetched {plan.work.blocks_per_shard} times, once a part: {plan.size.read / 1e9:.1f} GB; "
        f"cache.views_per_part above {inputs.cache.views_per_part} reads less"
    )


def _large_class_sums(_: PlanInputs, plan: CachePlan) -> str | None:
    means, parts = plan.size.means, plan.size.parts.expected
    if means is None or means <= parts:
        return None
    return f"class sums may take {means / 1e9:.1f} GB, more than the parts; larger shards need fewer"


def _random_teacher(inputs: PlanInputs, _: CachePlan) -> str | None:
    return next(iter(random_weights_warnings({"teacher": inputs.config.teacher})), None)


_CHECKS: tuple[Callable[[PlanInputs, CachePlan], str | None], ...] = (
    _random_teacher,
    _different_header,
    _class_sorted,
    _class_range,
    _missing_labels,
    _int8_resolution,
    _many_objects,
    _many_reads,
    _large_class_sums,
)
