"""The teacher of a run, for metrics that compare a student with it."""

from __future__ import annotations

import torch

from pipeline.core.errors import CacheError, StorageInputError
from pipeline.core.hashing import differences, weights_digest
from pipeline.core.redaction import redact
from pipeline.student.supervision.spec import SupervisionSpec
from pipeline.tasks import task_of
from pipeline.teacher.inference import Teacher, load_teacher
from schemas.cache_format import Header
from schemas.config import Config, TeacherConfig

# In the architecture of teachers that have a text head.
_TEXT_HEAD_KEYS = ("text_head", "embedding")


def teacher_for_agreement(
    config: Config, supervision: SupervisionSpec, device: torch.device, *, or_else: str
) -> Teacher | None:
    """As ``teacher_of_run``; ``or_else`` is the remedy if the weights cannot be read."""
    try:
        return teacher_of_run(config, supervision, device)
    except StorageInputError as error:
        raise StorageInputError(
            "the teacher's weights cannot be read, so agreement and KL cannot be measured",
            code=error.code,
            where=error.where,
            got=error.got,
            next_step=f"restore the file, or {or_else}",
        ) from error


def teacher_of_run(config: Config, supervision: SupervisionSpec, device: torch.device) -> Teacher | None:
    """The teacher of a run, if its config names exactly one, with weights. Agreement is measured with one teacher.

    Raises:
        CacheError: the run's cache has the outputs of another teacher.
    """
    if config.teacher.model is None or config.teacher.weights is None or config.teacher.others:
        return None
    widths = task_of(supervision.data).widths
    teacher = load_teacher(config.teacher, widths=widths, size=config.views.size or supervision.size, device=device)
    # With several caches the config names no teacher.
    if supervision.caches:
        _check_same_teacher(config.teacher, teacher, supervision.caches[0].header)
    return teacher


def _check_same_teacher(config: TeacherConfig, teacher: Teacher, header: Header) -> None:
    """Compares what only a loaded teacher shows; the other keys were compared before."""
    cached = header.teacher
    stored, given = (
        {key: architecture.get(key) for key in _TEXT_HEAD_KEYS}
        for architecture in (cached["architecture"], teacher.loaded.architecture)
    )
    if weights_digest(teacher.state()) != cached["weights"]:
        where, got = "teacher.weights", redact(str(config.weights))
        expected = f"weights with digest {str(cached['weights'])[:16]}"
    elif changed := differences(stored, given):
        where, got = "teacher.text_head", "; ".join(changed)
        expected = ", ".join(f"{key}: {value}" for key, value in stored.items())
    else:
        return
    raise CacheError(
        "the teacher of this config is not the teacher of the cache",
        code="cache.other-teacher",
        where=where,
        got=got,
        expected=expected,
        next_step="name the cache's teacher or none; a run with teacher.mode=cache needs none",
    )
