"""What can be known to be wrong before any work is done, so that it is found first and nothing is written."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from pipeline import storage
from pipeline.cache.read.reader import TeacherCache
from pipeline.core.config_loading import require
from pipeline.core.errors import ConfigError
from pipeline.core.redaction import redact
from pipeline.core.threads import map_ordered
from pipeline.models import LoadedModel, load_model, load_untrained, require_weights, unreadable_weights
from pipeline.shards.shard_urls import report_moved, shard_ids, shard_urls
from pipeline.student.evaluation.evaluator import teacher_of_run
from pipeline.student.losses import CompositeLoss
from pipeline.student.networks.freeze import freeze
from pipeline.student.networks.review import plan_review, review_section
from pipeline.student.supervision.spec import SupervisionSpec, asked_sizes, lesson_facts, student_views
from schemas.config import CacheConfig, Config, DistLoss

_LOOK_UPS = 16
# What a teacher says depends on these keys and the input size.
_OF_WORDS = {"model", "kwargs", "weights", "mean", "std", "interpolation", "precision"}


def check_config(config: Config) -> str:
    """What the config alone shows; reads nothing. Returns the run's URL.

    Raises:
        ConfigError: a key is missing, or two sections contradict each other.
    """
    require(config, "student.model", "run.url", "loss", command="train")
    mode = config.teacher.mode
    _check_review(config)
    _check_gathers(config)
    _check_agreement(config)
    if mode != "online":
        _refuse_others(config)
        _refuse_class_means(config)
    if mode == "cache":
        require(config, "data.cache", command="train")
        _check_caches(config.data.caches)
    else:
        require(config, "data.shards", "data.num_classes", command="train")
        _check_teacher_needs(config, CompositeLoss(config.loss, where="loss"))
        _check_others(config)
    assert config.run is not None
    if config.run.url in (*config.data.caches, config.cache.url if config.cache else None):
        raise ConfigError(
            "a run and a cache cannot share a folder", where="run.url", got=config.run.url, expected="another folder"
        )
    return config.run.url


def _check_review(config: Config) -> None:
    """Feature maps are far larger than images, so no cache keeps them."""
    mode = config.teacher.mode
    if review_section(config.loss) is not None and mode != "online":
        raise ConfigError(
            "review_kd needs feature maps of the teacher, which no cache holds",
            where="teacher.mode",
            got=mode,
            expected="online",
            next_step="set teacher.mode=online (with teacher.model and data.shards), or drop review_kd",
        )
    if review_section(config.loss) is not None and config.teacher.others:
        raise ConfigError(
            "review_kd reviews the feature maps of one teacher",
            where="teacher.others",
            got=f"{len(config.teacher.others)} beside teacher.model",
            next_step="append teacher.others=[], or drop review_kd",
        )


def _check_gathers(config: Config) -> None:
    """Relations over all ranks are of the rows of one backward pass, and a step has several where it accumulates."""
    gathers = any(isinstance(term, DistLoss) and term.gather for term in config.loss)
    if gathers and config.train.accumulate > 1:
        raise ConfigError(
            "dist gathers the rows of a whole step, which no micro-batch has",
            where="train.accumulate",
            got=config.train.accumulate,
            expected="1 beside gather: true of dist",
            next_step="set train.accumulate=1, or gather: false, which relates the rows of one micro-batch",
        )


def _check_agreement(config: Config) -> None:
    """Of a cache the teacher's outputs on the training shards are known, and those on validation shards are not."""
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


def _check_caches(urls: Sequence[str]) -> None:
    """Twice the same words would weigh as two teachers'."""
    twice = sorted({url for url in urls if urls.count(url) > 1})
    if twice:
        raise ConfigError("data.cache names a cache twice", where="data.cache", got=", ".join(map(redact, twice)))


def _check_others(config: Config) -> None:
    """Twice the same words would weigh as two teachers': ``others`` are those beside the first, who is not listed."""
    seen: list[dict[str, Any]] = []
    for (where, section), size in zip(config.teacher.models.items(), asked_sizes(config), strict=True):
        words = {**section.model_dump(include=_OF_WORDS), "size": size}
        if words in seen:
            raise ConfigError(
                "a teacher is named twice",
                where=where,
                got=section.model,
                expected="in teacher.others the teachers beside the one of the teacher section",
            )
        seen.append(words)


def _refuse_others(config: Config) -> None:
    if config.teacher.others:
        raise ConfigError(
            "several teachers are named, and none is asked online",
            where="teacher.others",
            got=f"{len(config.teacher.others)} beside teacher.model, with teacher.mode={config.teacher.mode}",
            next_step="set teacher.mode=online, or remove teacher.others: data.cache takes a list of caches",
        )


def _check_teacher_needs(config: Config, loss: CompositeLoss) -> None:
    """Without a teacher there is nothing but labels, and a teacher online has class means only if it is given them."""
    mode = config.teacher.mode
    needs = {
        "logits": loss.needs_logits,
        "embeddings": loss.needs_teacher_embedding,
        "class means": loss.needs_class_means,
    }
    for words, needed in needs.items():
        if needed and mode == "none":
            raise ConfigError(
                f"a loss needs the teacher's {words}", where="teacher.mode", got=mode, expected="cache or online"
            )
    if mode == "online":
        require(config, *(f"{name}.model" for name in config.teacher.models), command="train with teacher.mode=online")
        for where, section in config.teacher.models.items():
            require_weights(section, where=where)
        if loss.needs_class_means:
            _require_class_means(config)


def _require_class_means(config: Config) -> None:
    for where, section in config.teacher.models.items():
        if section.class_means is None:
            raise ConfigError(
                "nd needs class means, and a teacher online makes none",
                where=f"{where}.class_means",
                expected="the URL of a finished cache of this teacher that has class means",
                next_step="build one with views.count=1, cache.logits=none and cache.class_means=eval, or use "
                "teacher.mode=cache",
            )


def _refuse_class_means(config: Config) -> None:
    """Silently learning from others than those that the config names would be a lie."""
    if config.teacher.class_means is not None:
        raise ConfigError(
            "class means beside a teacher that is not asked online",
            where="teacher.class_means",
            got=f"{redact(config.teacher.class_means)}, with teacher.mode={config.teacher.mode}",
            next_step="remove teacher.class_means: a cache has its own (cache.class_means)",
        )


def check_training(config: Config) -> list[str]:
    """What a look at the cache's header, the models and the validation shards shows; trains nothing, writes nothing.

    Returns:
        Warnings about what could not be checked.

    Raises:
        StillroomError: a model cannot be built, a validation shard is missing, or a cache is not there, not of the
            teacher that the config names, or lacks what the loss needs.
    """
    check_config(config)
    facts = lesson_facts(config)
    loss = CompositeLoss(config.loss, where="loss")
    check_caches_serve(loss, facts.caches)
    check_means_serve(config, loss, facts)
    _check_layers(config, _check_student(config, facts.num_classes, facts.size))
    _check_val_shards(config)
    return _check_teacher_weights(config, facts)


def _check_teacher_weights(config: Config, facts: SupervisionSpec) -> list[str]:
    """A teacher beside a cache must be the cache's. Its file is only compared: training from a cache needs none."""
    if not facts.caches or config.teacher.weights == "pretrained":
        return []
    reason = None if config.train.eval_agreement else unreadable_weights(config.teacher)
    if reason is not None:
        return [
            f"teacher.weights was not compared ({reason}); the cache's fingerprint "
            f"{facts.caches[0].header.fingerprint} stands for it"
        ]
    teacher_of_run(config, facts, torch.device("cpu"))
    return []


def check_means_serve(config: Config, loss: CompositeLoss, facts: SupervisionSpec) -> None:
    """
    Raises:
        ConfigError: a cache beside a teacher online has no class means, or its classes are not the data's.
    """
    if facts.caches or not loss.needs_class_means:
        return
    for name, cache in zip(config.teacher.models, facts.means_caches, strict=True):
        assert cache is not None, "check_config has seen to it"
        where = f"{name}.class_means: {redact(cache.url)}"
        if cache.manifest.class_means is None:
            raise ConfigError(
                "nd needs class means, and this cache has none",
                where=where,
                next_step="name a cache that was built with cache.class_means=eval",
            )
        if cache.header.num_classes != facts.num_classes:
            raise ConfigError(
                "these class means are of another number of classes",
                where=where,
                got=f"K = {cache.header.num_classes}",
                expected=f"K = {facts.num_classes}, data.num_classes",
            )


def check_caches_serve(loss: CompositeLoss, caches: Sequence[TeacherCache]) -> None:
    """
    Raises:
        ConfigError: a cache does not hold what the loss needs.
    """
    for cache in caches:
        if loss.needs_logits and cache.header.output("logits") is None:
            raise ConfigError(
                "a loss needs the teacher's logits, and this cache keeps none",
                where=redact(cache.url),
                got="a cache built with cache.logits=none",
                next_step="train with nd or ce alone, or build a cache with logits (into another cache.url)",
            )
        if loss.needs_teacher_embedding and cache.header.output("embedding") is None:
            raise ConfigError(
                "a loss needs the teacher's embeddings, and this cache keeps none",
                where=redact(cache.url),
                got="a cache built with cache.embeddings=none",
                next_step="drop cosine and mse from the loss section, or build a cache with cache.embeddings=fp16 "
                "(into another cache.url)",
            )
        if loss.needs_class_means and cache.manifest.class_means is None:
            raise ConfigError(
                "nd needs class means, and this cache has none",
                where=redact(cache.url),
                next_step="build a cache with cache.class_means=eval (into another cache.url)",
            )


def training_of(config: Config) -> Config:
    """The config of the training that follows the build of ``distill``.

    Raises:
        ConfigError: a key is missing, or several caches are named.
    """
    require(
        config,
        *("cache.url", "data.shards", "data.num_classes", "teacher.model", "student.model", "run.url", "loss"),
        command="distill",
    )
    assert config.cache is not None
    if len(config.data.caches) > 1:
        raise ConfigError(
            "distill builds one cache and trains from it",
            where="data.cache",
            got=f"{len(config.data.caches)} caches",
            next_step="run: stillroom cache build CONFIG for each, then: stillroom train CONFIG",
        )
    return config.model_copy(update={"data": config.data.model_copy(update={"cache": config.cache.url})})


def check_distillation(config: Config) -> None:
    """The same for a config whose cache is still to be built; ``data.cache`` is its URL already.

    Raises:
        StillroomError: as ``check_training``; or the cache would lack what the loss needs.
    """
    check_plan(config)
    student_views(config, config.views)
    assert config.data.num_classes is not None
    _check_layers(config, _check_student(config, config.data.num_classes, config.views.size))
    _check_val_shards(config)


def check_plan(config: Config) -> None:
    """What such a config alone shows; reads nothing.

    Raises:
        ConfigError: as ``check_config``; or the cache would lack what the loss needs.
    """
    check_config(config)
    assert config.cache is not None
    if config.teacher.mode == "cache":
        require_weights(config.teacher, where="teacher")
        _check_cache_will_serve(CompositeLoss(config.loss, where="loss"), config.cache)


def _check_cache_will_serve(loss: CompositeLoss, cache: CacheConfig) -> None:
    if loss.needs_logits and cache.logits == "none":
        raise ConfigError(
            "a loss needs the teacher's logits, and this cache would keep none",
            where="cache.logits",
            got="none",
            expected="an encoding, or a loss section of nd and ce",
        )
    if loss.needs_teacher_embedding and cache.embeddings == "none":
        raise ConfigError(
            "a loss needs the teacher's embeddings, and this cache would keep none",
            where="cache.embeddings",
            got="none",
            expected="fp32, fp16 or int8, or a loss section without cosine and mse",
        )
    if loss.needs_class_means and cache.class_means == "none":
        raise ConfigError(
            "nd needs class means, and this cache would have none",
            where="cache.class_means",
            got="none",
            expected="eval, the URL of a file, or view0 where views are not mixed",
        )


def _check_student(config: Config, num_classes: int, size: int | None) -> LoadedModel:
    assert config.student is not None
    loaded = load_model(
        config.student,
        num_classes=num_classes,
        size=config.student.size or size,
        seed=config.train.seed,
        where="student",
        allow_new_head=True,
    )
    freeze(loaded.module.network, config.train.freeze)
    return loaded


def _check_layers(config: Config, student: LoadedModel) -> None:
    """Both networks answer with maps where ``review_kd`` looks, whatever their weights."""
    section = review_section(config.loss)
    if section is None:
        return
    assert config.data.num_classes is not None
    teacher = load_untrained(config.teacher, num_classes=config.data.num_classes, size=config.views.size)
    plan_review(section, student, teacher)


def _check_val_shards(config: Config) -> None:
    if config.data.val_shards is None:
        return
    urls = shard_urls(config.data.val_shards, key="data.val_shards")
    shard_ids(urls)
    with report_moved(urls, "append data.val_shards={}"):
        list(map_ordered(storage.size, urls, threads=_LOOK_UPS))
