"""Warnings about a plan from the class indexes of sampled images."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from pipeline.augment.random_bits import key_of, permutation
from pipeline.cache.plan.build_plan import CachePlan
from pipeline.cache.plan.plan_inputs import PlanInputs
from pipeline.tasks import task_of

_MIN_LABEL_SPREAD = 0.5
# With so many labels a class, the last class is not absent by chance.
_MIN_LABELS_PER_CLASS = 10


def sorted_by_class(inputs: PlanInputs, _: CachePlan) -> str | None:
    group = inputs.config.views.mix_group
    spread = label_spread(_labels(inputs), group)
    if spread is None or spread >= _MIN_LABEL_SPREAD:
        return None
    harm = "images are mixed within few classes" if inputs.config.views.mixes else "a batch has few classes"
    return (
        f"the shards are sorted by class: {group} neighbours have {spread:.0%} of the label entropy of a shuffled set, "
        f"so {harm}; shuffle them (stillroom shards pack shuffles image folders)"
    )


def class_range(inputs: PlanInputs, _: CachePlan) -> str | None:
    num_classes = inputs.config.data.num_classes
    label_N = np.concatenate([np.empty(0, np.int32), *_labels(inputs)])
    # The classes of several heads have no common range.
    if num_classes is None or not len(label_N):
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


def _labels(inputs: PlanInputs) -> list[NDArray[np.int32]]:
    """The labels of each sampled shard, in tar order."""
    task = task_of(inputs.config.data)
    return [task.class_ids(columns)[1] for columns in inputs.survey.targets]


def label_spread(labels: Sequence[NDArray[np.int32]], group: int) -> float | None:
    """Mean label entropy of runs of ``group`` rows, as a share of the entropy after shuffling: 1 if the order is
    independent of the labels, 0 if each run has one class; None if there are too few labels.

    Args:
        labels: of each shard, in tar order.
    """
    size = min(group, max(map(len, labels), default=0))
    if size < 2:
        return None
    pooled = np.concatenate(labels)
    shuffled = _mean_entropy([pooled[permutation(key_of("plan/labels"), len(pooled))]], size)
    return _mean_entropy(labels, size) / shuffled if shuffled > 0 else None


def _mean_entropy(labels: Sequence[NDArray[np.int32]], size: int) -> float:
    """In nats, over all complete runs of ``size`` rows."""
    runs = [run for label_N in labels for run in label_N[: len(label_N) // size * size].reshape(-1, size)]
    return float(np.mean([_entropy(run) for run in runs]))


def _entropy(label_N: NDArray[np.int32]) -> float:
    share_C = np.unique(label_N, return_counts=True)[1] / len(label_N)
    return float(-(share_C * np.log(share_C)).sum())
