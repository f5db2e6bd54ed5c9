"""What a loss needs of its teachers, and whether a cache holds it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pipeline.cache.format.codec import config_key, sampled_temperature
from pipeline.cache.read.reader import TeacherCache
from pipeline.core.config_loading import require
from pipeline.core.errors import ConfigError
from pipeline.core.redaction import redact
from pipeline.models import require_weights, selected_widths
from pipeline.student.losses import CompositeLoss
from pipeline.student.supervision.spec import SupervisionSpec
from pipeline.tasks import Task, planned_outputs, task_of
from schemas.config import CacheConfig, Config, TeacherModelConfig

_CODES = {
    "logits": "cache.no-logits",
    "embeddings": "cache.no-embeddings",
    "class_means": "cache.no-class-means",
    "tokens": "cache.no-tokens",
}


@dataclass(frozen=True, slots=True)
class Requirement:
    """Something that losses need of a teacher.

    Attributes:
        output: the name of an output; None: the class means.
        key: of the ``cache`` section; with the value ``none`` a cache lacks it.
        remedy: how to train without it.
    """

    output: str | None
    key: str
    remedy: str

    @classmethod
    def of_output(cls, name: str, *, remedy: str) -> Requirement:
        return cls(name, config_key(name), remedy)

    @property
    def name(self) -> str:
        return self.key.replace("_", " ") if self.output is None or self.key != "logits" else self.output

    @property
    def code(self) -> str:
        return _CODES.get(self.key, "cache.no-output")

    @property
    def value(self) -> str:
        """Of the key, with which a cache has it."""
        return "eval" if self.output is None else "fp16"

    def lacks_head(self, cache: TeacherCache) -> bool:
        """Whether the cache stores logits, and its teacher does not have this head."""
        header = cache.header
        is_stored = self.output is None or header.output(self.output) is not None
        return self.key == "logits" and not is_stored and header.teacher[self.key] != "none"

    def check_stored(self, cache: TeacherCache, *, where: str | None = None) -> None:
        """
        Raises:
            ConfigError: the cache lacks it.
        """
        stored = cache.manifest.class_means if self.output is None else cache.header.output(self.output)
        if stored is None:
            raise ConfigError(
                f"a loss needs the teacher's {self.name}, and this cache has none",
                code=self.code,
                where=where or redact(cache.url),
                got=f"a cache built with cache.{self.key}=none",
                next_step=f"{self.remedy}, or build another cache with cache.{self.key}={self.value}",
            )

    def check_planned(self, cache: CacheConfig, teacher: TeacherModelConfig, task: Task) -> None:
        """
        Raises:
            ConfigError: a cache that is built with these sections would lack it.
        """
        widths = selected_widths(task.widths, teacher)
        if self.output in task.widths and self.output not in widths:
            raise _no_head(self, where="teacher.heads")
        # Whatever their width, the outputs are the same.
        embedding = () if task.embedding is None else (task.embedding,)
        outputs = planned_outputs(task, cache, dict.fromkeys((*widths, *embedding), 1), tokens=(1, 1))
        stored = [output.name for output in outputs if output.kind != "none"]
        if cache.class_means == "none" if self.output is None else self.output not in stored:
            raise ConfigError(
                f"a loss needs the teacher's {self.name}, and this cache would have none",
                code=self.code,
                where=f"cache.{self.key}",
                got="none",
                expected=self.value,
                next_step=f"set cache.{self.key}, or {self.remedy}",
            )


CLASS_MEANS = Requirement(None, "class_means", "leave out nd")


def requirements_of(loss: CompositeLoss) -> list[Requirement]:
    """What a loss section needs of its teachers."""
    outputs = [
        Requirement.of_output(name, remedy=f"leave out {', '.join(loss.terms_that_read(name))}")
        for name in loss.teacher_outputs
    ]
    return [*outputs, *([CLASS_MEANS] if loss.heads_of_class_means else [])]


def check_cached_outputs(loss: CompositeLoss, caches: Sequence[TeacherCache]) -> None:
    """
    Raises:
        ConfigError: a cache does not hold what the loss needs, or holds samples of it that do not suffice. Of several
            teachers, each may lack heads that another has.
    """
    for requirement in requirements_of(loss):
        with_head = [cache for cache in caches if not requirement.lacks_head(cache)]
        if caches and not with_head:
            raise _no_head(requirement, where=", ".join(redact(cache.url) for cache in caches))
        for cache in with_head:
            requirement.check_stored(cache)
    for cache in caches:
        _check_samples(loss, str(cache.header.teacher.get("logits")), where=redact(cache.url))


def _check_samples(loss: CompositeLoss, kind: str, *, where: str) -> None:
    """
    Args:
        kind: ``cache.logits``.

    Raises:
        ConfigError: the logits are sampled, and a loss reads all classes of a row, or another temperature.
    """
    temperature = sampled_temperature(kind)
    logits = {name: read for name, read in loss.teacher_outputs.items() if config_key(name) == "logits"}
    if temperature is None or not logits:
        return
    terms = sorted({term for name in logits for term in loss.terms_without_samples(name)})
    if terms:
        raise ConfigError(
            "a loss reads the logits of all classes, and this cache stores samples of their probabilities",
            code="loss.needs-all-classes",
            where=where,
            got=f"{', '.join(terms)}, with cache.logits={kind}",
            expected="kd alone, whose gradient is linear in the teacher's probabilities",
            next_step="leave them out, or build another cache, such as with cache.logits=int8t",
        )
    others = sorted({read for found in logits.values() for read in found} - {temperature})
    if others:
        raise ConfigError(
            "a loss reads sampled logits at a temperature at which this cache has no samples",
            code="cache.other-temperature",
            where=where,
            got=f"T = {', '.join(f'{other:g}' for other in others)}, with cache.logits={kind}",
            expected=f"T = {temperature:g}",
            next_step="set the temperature of the loss, or build another cache",
        )


def _no_head(requirement: Requirement, *, where: str) -> ConfigError:
    return ConfigError(
        "a loss compares a head that no teacher has",
        code="loss.teacher-lacks-head",
        where=where,
        got=f"no {requirement.output}",
        expected="a teacher with this head; of several teachers, one is enough",
        next_step=f"leave the head out of `heads` of the loss, {requirement.remedy}, or correct teacher.heads",
    )


def check_planned_outputs(loss: CompositeLoss, config: Config) -> None:
    """
    Raises:
        ConfigError: a cache that is built with this config would not hold what the loss needs.
    """
    assert config.cache is not None
    for requirement in requirements_of(loss):
        requirement.check_planned(config.cache, config.teacher, task_of(config.data))
    _check_samples(loss, config.cache.logits, where="cache.logits")


def check_online_class_means(config: Config, loss: CompositeLoss, spec: SupervisionSpec) -> None:
    """
    Raises:
        ConfigError: the cache named for an online teacher has no class means, or another number of classes.
    """
    if spec.caches or not loss.heads_of_class_means:
        return
    for name, cache in zip(config.teacher.models, spec.means_caches, strict=True):
        assert cache is not None, "ensured by check_config"
        where = f"{name}.class_means: {redact(cache.url)}"
        CLASS_MEANS.check_stored(cache, where=where)
        stored, expected = (_class_heads(task_of(data)) for data in (cache.data, spec.data))
        if stored != expected:
            raise ConfigError(
                "these class means have a different number of classes",
                code="config.class-means-mismatch",
                where=where,
                got=stored,
                expected=expected,
            )


def _class_heads(task: Task) -> str:
    """``K = 10``, or ``K = 10 (color), K = 3 (shape)`` of several heads."""
    heads = [head for head in task.heads if head.kind == "class"]
    return ", ".join(f"K = {head.num_classes}" + (f" ({head.name})" if head.name else "") for head in heads)


def check_teacher_mode(config: Config, loss: CompositeLoss) -> None:
    """Checks what the config alone shows, in the modes without a cache.

    Raises:
        ConfigError: there is no teacher for a loss that needs one, or an online teacher lacks a key.
    """
    mode = config.teacher.mode
    for requirement in requirements_of(loss) if mode == "none" else ():
        raise ConfigError(
            f"a loss needs the teacher's {requirement.name}",
            code="config.loss-needs-teacher",
            where="teacher.mode",
            got=mode,
            expected="cache or online",
        )
    if mode == "online":
        require(config, *(f"{name}.model" for name in config.teacher.models), command="train with teacher.mode=online")
        for where, section in config.teacher.models.items():
            require_weights(section, where=where)
        _check_online_heads(config, loss)
        if loss.heads_of_class_means:
            _require_class_means(config)


def _check_online_heads(config: Config, loss: CompositeLoss) -> None:
    widths = task_of(config.data).widths
    teachers = config.teacher.models
    outputs = {output for section in teachers.values() for output in selected_widths(widths, section)}
    for requirement in requirements_of(loss):
        if requirement.output in widths and requirement.output not in outputs:
            raise _no_head(requirement, where=", ".join(f"{name}.heads" for name in teachers))


def _require_class_means(config: Config) -> None:
    for where, section in config.teacher.models.items():
        if section.class_means is None:
            raise ConfigError(
                "nd needs class means, which an online teacher does not compute",
                code="config.no-class-means",
                where=f"{where}.class_means",
                expected="the URL of a finished cache of this teacher that has class means",
                next_step="build one with views.count=1, cache.logits=none and cache.class_means=eval, or use "
                "teacher.mode=cache",
            )
