"""Checks of a config before any work is done and anything is written."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from pipeline import storage
from pipeline.core.config_loading import require
from pipeline.core.errors import ConfigError
from pipeline.core.redaction import redact
from pipeline.core.threads import map_ordered
from pipeline.models import LoadedModel, load_model, load_untrained, require_weights, unreadable_weights
from pipeline.shards.shard_urls import report_moved, shard_ids, shard_urls
from pipeline.student.data.order import check_units
from pipeline.student.data.sources import check_num_views, planned_num_views
from pipeline.student.evaluation.compared_teacher import teacher_of_run
from pipeline.student.evaluation.metrics import metrics_of
from pipeline.student.evaluation.reference_images import check_reference
from pipeline.student.losses import CompositeLoss
from pipeline.student.networks.freeze import freeze
from pipeline.student.networks.review import plan_review, review_section
from pipeline.student.networks.tokens import token_maps
from pipeline.student.supervision.pixel_inputs import Input, cache_inputs, check_same_input, input_of
from pipeline.student.supervision.requirements import (
    check_cached_outputs,
    check_online_class_means,
    check_planned_outputs,
    check_teacher_mode,
)
from pipeline.student.supervision.spec import SupervisionSpec, resolve_spec, student_views, teacher_sizes
from pipeline.student.supervision.tokens import check_token_keys, token_requests
from pipeline.student.supervision.two_classes import check_two_classes
from pipeline.student.training.teacher_checks import check_standardized, check_teacher_keys
from pipeline.tasks import network_keys, task_of
from schemas.config import Config, DataConfig, Size, ViewsConfig

_LOOK_UPS = 16
# A teacher's outputs depend on these keys and the input size.
_OUTPUT_KEYS = {
    *("model", "kwargs", "weights", "mean", "std", "interpolation", "precision"),
    *("tokens_layer", "tokens_grid"),
}


def check_config(config: Config) -> str:
    """Checks what the config alone shows; reads nothing. Returns the run's URL.

    Raises:
        ConfigError: a key is missing, or two sections contradict each other.
    """
    keys = network_keys(config.data)
    require(config, "student.model", "run.url", "loss", command="train")
    mode = config.teacher.mode
    _check_review(config)
    _check_gathers(config)
    _check_balance(config)
    _check_agreement(config)
    _check_best(config)
    if mode != "online":
        _refuse_others(config)
        _refuse_class_means(config)
    if mode == "cache":
        require(config, "data.cache", command="train")
        _check_caches(config.data.caches)
    else:
        _refuse_num_views(config)
        require(config, "data.shards", *keys, command="train")
        check_teacher_mode(config, CompositeLoss(config.loss, task_of(config.data), where="loss"))
        _check_others(config)
    check_teacher_keys(config)
    check_token_keys(config)
    assert config.run is not None
    if config.run.url in (*config.data.caches, config.cache.url if config.cache else None):
        raise ConfigError(
            "a run and a cache cannot share a folder",
            code="config.run-in-cache",
            where="run.url",
            got=config.run.url,
            expected="another folder",
        )
    return config.run.url


def _check_review(config: Config) -> None:
    """Feature maps are far larger than images, so no cache stores them."""
    if review_section(config.loss) is None:
        return
    mode = config.teacher.mode
    if mode != "online":
        raise ConfigError(
            "review_kd needs feature maps of the teacher, which no cache holds",
            code="config.review-needs-online",
            where="teacher.mode",
            got=mode,
            expected="online",
            next_step="set teacher.mode=online (with teacher.model and data.shards), or drop review_kd",
        )
    if config.teacher.others:
        raise ConfigError(
            "review_kd takes the feature maps of one teacher",
            code="config.review-needs-one-teacher",
            where="teacher.others",
            got=f"{len(config.teacher.others)} in addition to teacher.model",
            next_step="append teacher.others=[], or drop review_kd",
        )


def _check_gathers(config: Config) -> None:
    """Relations over all ranks cover the rows of one backward pass, and a step that accumulates has several."""
    gathering = [term.name for term in config.loss if getattr(term, "gather", False)]
    if gathering and config.train.accumulate > 1:
        raise ConfigError(
            f"{gathering[0]} gathers the rows of a step, and a micro-batch has only some of them",
            code="config.gather-accumulate",
            where="train.accumulate",
            got=config.train.accumulate,
            expected=f"1 with gather: true of {gathering[0]}",
            next_step="set train.accumulate=1, or gather: false, which relates the rows of one micro-batch",
        )


def _check_balance(config: Config) -> None:
    """A relation between two rows has no weight of a row."""
    related = [term.name for term in config.loss if term.relates_rows]
    if config.train.balance is not None and related:
        raise ConfigError(
            f"{related[0]} compares the rows of a batch with each other, so they cannot have weights of their own",
            code="config.balance-relations",
            where="train.balance",
            got=f"with {', '.join(related)}",
            expected="losses that are means over rows",
            next_step="set train.balance=null, or leave them out; dist with intra_weight: 0 is a mean over rows",
        )


def _check_agreement(config: Config) -> None:
    """A cache holds the teacher's outputs for the training shards, not for validation shards."""
    if not config.train.eval_agreement:
        return
    teacher, num_caches = config.teacher, len(config.data.caches)
    if config.data.val_shards is None:
        missing, next_step = "data.val_shards", "name validation shards"
    elif teacher.mode == "none":
        missing, next_step = "a teacher", "set teacher.mode=cache or online"
    elif teacher.others or (teacher.mode == "cache" and num_caches > 1):
        missing, next_step = "a single teacher", "train with one teacher"
    elif teacher.model is None or teacher.weights is None:
        missing, next_step = "the teacher's network", "set teacher.model and teacher.weights to those of the cache"
    else:
        return
    raise ConfigError(
        f"agreement cannot be measured without {missing}",
        code="config.eval-agreement",
        where="train.eval_agreement",
        got=True,
        next_step=f"{next_step}, or set train.eval_agreement=null",
    )


def _check_best(config: Config) -> None:
    """The metric that selects the best checkpoint exists, and there are images to measure it on."""
    if config.train.best is None:
        return
    metrics_of(config.data, config.train.best)
    if config.data.val_shards is None:
        raise ConfigError(
            "the best checkpoint is selected on validation shards, and none are named",
            code="config.best-without-validation",
            where="train.best",
            got=config.train.best,
            next_step="name data.val_shards, or set train.best=null",
        )


def _check_caches(urls: Sequence[str]) -> None:
    """A cache listed twice would get double weight."""
    repeated = sorted({url for url in urls if urls.count(url) > 1})
    if repeated:
        raise ConfigError(
            "data.cache names a cache twice",
            code="config.cache-repeated",
            where="data.cache",
            got=", ".join(map(redact, repeated)),
        )


def _check_others(config: Config) -> None:
    """A teacher named twice would get double weight. ``teacher.others`` does not list the first teacher again."""
    seen: list[dict[str, Any]] = []
    for (where, section), size in zip(config.teacher.models.items(), teacher_sizes(config), strict=True):
        identity = {**section.model_dump(include=_OUTPUT_KEYS), "size": size}
        if identity in seen:
            raise ConfigError(
                "a teacher is named twice",
                code="config.teacher-repeated",
                where=where,
                got=section.model,
                expected="in teacher.others only teachers that differ from that of the teacher section",
            )
        seen.append(identity)


def _refuse_others(config: Config) -> None:
    if config.teacher.others:
        raise ConfigError(
            "several teachers are named, and none runs online",
            code="config.online-keys-unused",
            where="teacher.others",
            got=f"{len(config.teacher.others)} in addition to teacher.model, with teacher.mode={config.teacher.mode}",
            next_step="set teacher.mode=online, or remove teacher.others: data.cache takes a list of caches",
        )


def _refuse_class_means(config: Config) -> None:
    """A cache has its own class means, and would silently override those that the config names."""
    if config.teacher.class_means is not None:
        raise ConfigError(
            "class means are named for a teacher that does not run online",
            code="config.online-keys-unused",
            where="teacher.class_means",
            got=f"{redact(config.teacher.class_means)}, with teacher.mode={config.teacher.mode}",
            next_step="remove teacher.class_means: a cache has its own (cache.class_means)",
        )


def _refuse_num_views(config: Config) -> None:
    if config.data.num_views is not None:
        raise ConfigError(
            "data.num_views selects views of a cache, and this training reads none",
            code="config.num-views",
            where="data.num_views",
            got=f"{config.data.num_views}, with teacher.mode={config.teacher.mode}",
            expected="null",
            next_step="remove data.num_views, or set teacher.mode=cache",
        )


def check_training(config: Config) -> list[str]:
    """Checks a config against the cache's header, the models and the validation shards; writes nothing.

    Returns:
        Warnings about what could not be checked.

    Raises:
        StillroomError: a model cannot be built, a validation shard is missing, or a cache is not there, not of the
            teacher that the config names, or lacks what the loss needs.
    """
    run_url = check_config(config)
    spec = resolve_spec(config)
    loss = CompositeLoss(config.loss, task_of(spec.data), where="loss")
    check_two_classes(loss, run_url=run_url)
    check_cached_outputs(loss, spec.caches)
    check_online_class_means(config, loss, spec)
    check_standardized(config, loss)
    student = _check_student(config, spec.data, spec.size)
    _check_inputs(config, spec.plan, spec.data, cache_inputs(spec.caches), student)
    _check_layers(config, loss, spec.data, student)
    _check_val_shards(config)
    return _check_teacher_weights(config, spec)


def _check_teacher_weights(config: Config, spec: SupervisionSpec) -> list[str]:
    """A teacher named with a cache must be the cache's. Training from a cache needs no weights file."""
    if not spec.caches or config.teacher.weights == "pretrained":
        return []
    reason = None if config.train.eval_agreement else unreadable_weights(config.teacher)
    if reason is not None:
        return [
            f"teacher.weights was not compared ({reason}); the cache's fingerprint "
            f"{spec.caches[0].header.fingerprint} stands for it"
        ]
    teacher_of_run(config, spec, torch.device("cpu"))
    return []


def training_of(config: Config) -> Config:
    """The config of the training that follows the build of ``distill``.

    Raises:
        ConfigError: a key is missing, or several caches are named.
    """
    require(
        config,
        *("cache.url", "data.shards", *network_keys(config.data)),
        *("teacher.model", "student.model", "run.url", "loss"),
        command="distill",
    )
    assert config.cache is not None
    if len(config.data.caches) > 1:
        raise ConfigError(
            "distill builds one cache and trains from it",
            code="config.several-caches",
            where="data.cache",
            got=f"{len(config.data.caches)} caches",
            next_step="run: stillroom cache build CONFIG for each, then: stillroom train CONFIG",
        )
    return config.model_copy(update={"data": config.data.model_copy(update={"cache": config.cache.url})})


def check_distillation(config: Config) -> None:
    """``check_training`` for a config whose cache is still to be built; ``data.cache`` is its URL already.

    Raises:
        StillroomError: as ``check_training``; or the cache would lack what the loss needs.
    """
    check_plan(config)
    assert config.run is not None, "ensured by check_plan"
    loss = CompositeLoss(config.loss, task_of(config.data), where="loss")
    check_two_classes(loss, run_url=config.run.url)
    student_views(config, config.views)
    student = _check_student(config, config.data, config.views.size)
    _check_inputs(config, config.views, config.data, {}, student)
    _check_layers(config, loss, config.data, student)
    _check_val_shards(config)


def check_plan(config: Config) -> None:
    """Checks what such a config alone shows; reads nothing.

    Raises:
        ConfigError: as ``check_config``; or the cache would lack what the loss needs.
    """
    check_config(config)
    assert config.cache is not None
    check_units(config.train, config.views, planned_num_views(config, config.views.count))
    if config.teacher.mode == "cache":
        if config.data.num_views is not None:
            check_num_views(config.data.num_views, config.views.count, of="views.count")
        require_weights(config.teacher, where="teacher")
        loss = CompositeLoss(config.loss, task_of(config.data), where="loss")
        check_planned_outputs(loss, config)
        check_standardized(config, loss)


def _check_student(config: Config, data: DataConfig, size: Size | None) -> LoadedModel:
    assert config.student is not None
    loaded = load_model(
        config.student,
        widths=task_of(data).widths,
        size=config.student.size or size,
        seed=config.train.seed,
        where="student",
        allow_new_head=True,
    )
    freeze(loaded.module.network, config.train.freeze)
    return loaded


def _check_inputs(
    config: Config, plan: ViewsConfig, data: DataConfig, cached: Mapping[str, Input], student: LoadedModel
) -> None:
    """All networks take the same input, if the plan fixes the pixels; weights do not matter."""
    teachers = {} if cached or plan.pixels == "none" or config.teacher.mode == "none" else config.teacher.models
    inputs = dict(cached)
    for (name, teacher), size in zip(teachers.items(), teacher_sizes(config), strict=False):
        loaded = load_untrained(teacher, widths=task_of(data).widths, size=size)
        inputs[f"the teacher of {name}"] = input_of(loaded.input)
    check_same_input(plan, {**inputs, "the student": input_of(student.input)})


def _check_layers(config: Config, loss: CompositeLoss, data: DataConfig, student: LoadedModel) -> None:
    """Both networks have maps at the layers of ``review_kd``, and patch tokens for losses on them; weights do not
    matter."""
    section, requests = review_section(config.loss), token_requests(config, loss)
    token_maps(loss.token_layers, student)
    for (name, teacher), size in zip(config.teacher.models.items(), teacher_sizes(config), strict=True):
        if section is None and name not in requests:
            continue
        untrained = load_untrained(teacher, widths=task_of(data).widths, size=size)
        if section is not None:
            plan_review(section, student, untrained)
        if name in requests:
            requests[name].plan(untrained)


def _check_val_shards(config: Config) -> None:
    reference = config.train.eval_reference
    if config.data.val_shards is None:
        if reference is not None:
            raise ConfigError(
                "a reference is for evaluations, and there are no shards to evaluate on",
                code="config.reference-without-validation",
                where="train.eval_reference",
                next_step="name data.val_shards, or remove train.eval_reference",
            )
        return
    urls = shard_urls(config.data.val_shards, key="data.val_shards")
    shard_ids(urls)
    _look_up(urls, "data.val_shards")
    if reference is not None:
        reference_urls = shard_urls(reference, key="train.eval_reference")
        shard_ids(reference_urls)
        check_reference(reference_urls, urls, config.data, key="train.eval_reference")
        _look_up(reference_urls, "train.eval_reference")


def _look_up(urls: list[str], key: str) -> None:
    with report_moved(urls, f"append {key}={{}}"):
        list(map_ordered(storage.size, urls, threads=_LOOK_UPS))
