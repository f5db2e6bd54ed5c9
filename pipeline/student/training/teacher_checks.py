"""Checks of the keys that say how losses take each teacher: standardised, and with which weight."""

from __future__ import annotations

from pipeline.core.errors import ConfigError
from pipeline.core.redaction import redact
from pipeline.student.losses import CompositeLoss
from pipeline.tasks import EMBEDDING
from schemas.config import Config


def check_teacher_keys(config: Config) -> None:
    """Checks what the config alone shows.

    Raises:
        ConfigError: a list has another length than the teachers, or there is no teacher; the caches of moments do not
            fit ``teacher.mode`` or ``teacher.standardize``.
    """
    teacher = config.teacher
    num_teachers = {"none": 0, "cache": len(config.data.caches), "online": len(teacher.models)}[teacher.mode]
    given = {"teacher.standardize": teacher.standardize} if teacher.standardize != "none" else {}
    given |= {"teacher.loss_weights": teacher.loss_weights} if teacher.loss_weights else {}
    for key, values in given.items():
        if not num_teachers or (not isinstance(values, str) and len(values) != num_teachers):
            raise ConfigError(
                f"{key} does not fit the number of teachers",
                code="config.other-number-of-teachers",
                where=key,
                got=values if isinstance(values, str) else f"{len(values)} values",
                expected=f"{num_teachers}, one for each teacher" if num_teachers else "none without a teacher",
            )
    _check_moments(config, num_teachers)


def _check_moments(config: Config, num_teachers: int) -> None:
    """A cache has its own moments; an online teacher takes those of a named cache."""
    teacher, is_online = config.teacher, config.teacher.mode == "online"
    kinds = teacher.standardizations(num_teachers) if is_online else ("none",) * len(teacher.models)
    for (name, section), kind in zip(teacher.models.items(), kinds, strict=True):
        if section.moments is not None and kind == "none":
            raise ConfigError(
                "moments are named, and nothing is standardised by them",
                code="config.moments-unused",
                where=f"{name}.moments",
                got=f"{redact(section.moments)}, with teacher.mode={teacher.mode}"
                + (" and standardize none for this teacher" if is_online else ""),
                next_step=f"set teacher.standardize, or remove {name}.moments"
                + ("" if is_online else ": a cache has its own moments (stillroom cache moments)"),
            )
        if section.moments is None and kind != "none":
            raise ConfigError(
                "standardised targets of an online teacher need the moments of a cache",
                code="config.no-moments",
                where=f"{name}.moments",
                expected="the URL of a finished cache of this teacher, best with the same views, that has moments",
                next_step="build one with cache.embeddings=fp16, and run: stillroom cache moments CACHE",
            )


def check_standardized(config: Config, loss: CompositeLoss) -> None:
    """
    Raises:
        ConfigError: targets would be standardised, and no loss compares embeddings.
    """
    if config.teacher.standardizes and EMBEDDING not in loss.teacher_outputs:
        raise ConfigError(
            "teacher.standardize has no effect: no loss compares the teacher's embeddings",
            code="config.standardize-unused",
            where="teacher.standardize",
            got=config.teacher.standardize,
            expected="one of cosine, mse, smooth_l1, similarity in the loss section",
            next_step="add such a loss, or set teacher.standardize=none",
        )
