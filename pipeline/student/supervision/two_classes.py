"""Refuses losses on the relations among classes for heads of two classes, which have no such relations."""

from __future__ import annotations

from pipeline.core.errors import ConfigError
from pipeline.student.losses import CompositeLoss
from pipeline.student.run.checkpoint import has_begun
from schemas.config import DistLoss, DkdLoss

REASONS = {
    "dist": "1 - correlation of two probabilities is 0 or 2, so inter shows only which class has the larger "
    "probability",
    "dkd": "there is one class besides the target, so NCKD is 0 and TCKD is kd",
}
"""By the name of a loss."""


def two_class_heads(loss: CompositeLoss) -> list[tuple[int, DistLoss | DkdLoss, str | None]]:
    """The position and the section of each such term, and the name of each of its heads of two classes."""
    return [
        (number, section, head.name)
        for number, (section, heads) in enumerate(loss.heads_by_term)
        if isinstance(section, DistLoss | DkdLoss) and section.weight
        for head in heads
        if head.kind != "multilabel" and head.num_classes == 2
    ]


def check_two_classes(loss: CompositeLoss, *, run_url: str) -> None:
    """A run that began before may resume: ``loss_warnings`` has a warning.

    Raises:
        ConfigError: a term is for heads of two classes, and does not allow them.
    """
    refused = [found for found in two_class_heads(loss) if not found[1].allow_two_classes]
    if not refused or has_begun(run_url):
        return
    number, section, head = refused[0]
    named = "data.num_classes is 2" if head is None else f"head {head} has K = 2"
    rest = "" if head is None else f", and leave {head} out of `heads` of {section.name}"
    raise ConfigError(
        f"{section.name} compares relations among classes, and two classes have none: {REASONS[section.name]}",
        code="loss.two-classes",
        where=f"loss.{number}",
        got=named,
        expected="heads of three classes or more",
        next_step=f"use kd{rest}; for measurements, set allow_two_classes: true",
    )
