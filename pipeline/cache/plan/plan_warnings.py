"""Warnings about a plan: one sentence each, with its numbers and a next step."""

from __future__ import annotations

from collections.abc import Callable
from math import prod

from pipeline.cache.format.codec import sampled_temperature
from pipeline.cache.format.header import planned_views, stored_views
from pipeline.cache.plan.build_plan import CachePlan, outputs_of
from pipeline.cache.plan.class_warnings import class_range, sorted_by_class
from pipeline.cache.plan.plan_inputs import PlanInputs
from pipeline.core.hashing import differences
from pipeline.models import random_weights_warnings
from pipeline.shards.index import index_settings
from pipeline.shards.labels import domain_warning, label_warning
from pipeline.tasks import task_of
from pipeline.teacher.tokens import DEFAULT_LAYER

_MANY_CLASSES = 1000
_MIN_VIEWS_OF_SAMPLES = 10
_MANY_OBJECTS = 1_000_000
_MANY_READS = 5
_LARGE_GROUP_BYTES = 4e9


_Checks = tuple[Callable[[PlanInputs, CachePlan], str | None], ...]


def plan_warnings(inputs: PlanInputs, plan: CachePlan) -> list[str]:
    checks = (*_CONFIG_CHECKS, *_TARGET_CHECKS.get(inputs.config.data.task, ()), *_SIZE_CHECKS)
    warnings = (check(inputs, plan) for check in checks)
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
    if cache.tokens != "none" or "tokens" in header.teacher:
        expected["tokens"] = cache.tokens
    if cache.tokens != "none":
        expected["tokens_layer"] = teacher.tokens_layer or DEFAULT_LAYER
    if cache.tokens_grid is not None:
        expected["tokens_grid"] = cache.tokens_grid
    changed = [
        *differences(stored_views(header), planned_views(inputs.config.views), "views."),
        *differences({key: header.teacher.get(key, "none") for key in expected}, expected, "teacher."),
        *differences(header.data, index_settings(inputs.config.data), "data."),
    ]
    if not changed:
        return None
    return f"cache.url holds a cache of another config, which a build refuses: {'; '.join(changed)}"


def _missing_labels(inputs: PlanInputs, _: CachePlan) -> str | None:
    data, count = inputs.config.data, inputs.survey.label_count
    missing = count.num_images - count.num_labelled
    if not missing or not inputs.num_class_sums or data.missing_labels == "ignore":
        return label_warning(count, data)
    return (
        f"{missing} of {count.num_images} sampled images have no label, which class means refuse; "
        "data.missing_labels=ignore averages over the other images"
    )


def _missing_domains(inputs: PlanInputs, _: CachePlan) -> str | None:
    return domain_warning(inputs.survey.label_count, inputs.config.data)


def _int8_resolution(inputs: PlanInputs, plan: CachePlan) -> str | None:
    task = task_of(inputs.config.data)
    for output in task.outputs(inputs.cache, inputs.widths):
        num_classes = output.shape[-1]
        if output.kind != "int8" or task.roles[output.name] != "class" or num_classes <= _MANY_CLASSES:
            continue
        name, size_bytes = output.name, plan.size.outputs[output.name]
        return (
            f"int8 spreads 256 levels over {num_classes} {name} and stores {size_bytes} bytes per row, "
            f"{size_bytes * plan.work.forwards.expected / 1e9:.1f} GB in all: close {name} become equal; "
            "cache.logits=int8t preserves differences between the largest of them in hardly more bytes, int4 in half"
        )
    return None


def _few_views_of_samples(inputs: PlanInputs, _: CachePlan) -> str | None:
    num_views = inputs.config.views.count
    if sampled_temperature(inputs.cache.logits) is None or num_views >= _MIN_VIEWS_OF_SAMPLES:
        return None
    return (
        f"cache.logits={inputs.cache.logits} stores samples, whose errors average out over views, and there are "
        f"{num_views}; views.count of {_MIN_VIEWS_OF_SAMPLES} or more, or cache.logits=int8t, is closer to the teacher"
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


def _large_groups(inputs: PlanInputs, _: CachePlan) -> str | None:
    """A task holds the outputs of the views of a mix group as fp32."""
    numbers = {output.name: prod(output.shape) for output in outputs_of(inputs)}
    num_views = min(inputs.cache.views_per_part, inputs.config.views.count)
    size_bytes = 4 * sum(numbers.values()) * inputs.config.views.mix_group * num_views
    if size_bytes <= _LARGE_GROUP_BYTES:
        return None
    largest = max(numbers, key=lambda name: numbers[name])
    return (
        f"the outputs of a mix group take {size_bytes / 1e9:.1f} GB of a task's memory as float32, most of it "
        f"{largest}; cache.views_per_part below {num_views} or a smaller cache.tokens_grid needs less"
    )


def _large_class_sums(_: PlanInputs, plan: CachePlan) -> str | None:
    means, parts = plan.size.means, plan.size.parts.expected
    if means is None or means <= parts:
        return None
    return f"class sums may take {means / 1e9:.1f} GB, more than the parts; larger shards need fewer"


def _random_teacher(inputs: PlanInputs, _: CachePlan) -> str | None:
    return next(iter(random_weights_warnings({"teacher": inputs.config.teacher})), None)


_CONFIG_CHECKS: _Checks = (_random_teacher, _different_header)
_TARGET_CHECKS: dict[str, _Checks] = {"classification": (sorted_by_class, class_range)}
"""By the name of the task."""
_SIZE_CHECKS: _Checks = (
    _missing_labels,
    _missing_domains,
    _int8_resolution,
    _few_views_of_samples,
    _many_objects,
    _many_reads,
    _large_groups,
    _large_class_sums,
)
