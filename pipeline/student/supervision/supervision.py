"""The supervision of a run: its rows, their views, and its teachers, cached or online."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline.cache.build.header_claim import head_of
from pipeline.cache.format.codec import LinearHead
from pipeline.student.data.sources import RowSource, check_any_labelled, index_url, open_cached, open_indexed
from pipeline.student.losses import ClassDirections, CompositeLoss
from pipeline.student.supervision.canaries import CanaryReport, check_canaries
from pipeline.student.supervision.class_frequencies import balanced_head, counts_by_head, log_prior
from pipeline.student.supervision.class_means import cached_means, check_same_teacher, online_means
from pipeline.student.supervision.requirements import check_cached_outputs, check_online_class_means
from pipeline.student.supervision.spec import SupervisionSpec, teacher_sizes
from pipeline.student.supervision.standardization import Standardizer, standardizers_of
from pipeline.student.supervision.tokens import token_requests
from pipeline.tasks import TOKENS, task_of
from pipeline.teacher.inference import Teacher, load_teacher
from schemas.config import Config


@dataclass(frozen=True, slots=True)
class Supervision:
    """An opened ``SupervisionSpec``.

    Attributes:
        teachers: the online ones; empty where outputs come from caches, or there is no teacher.
        class_directions: of each teacher, by the column of the classes; those that the loss needs.
        teacher_dims: widths D of the teachers' embeddings.
        teacher_tokens: (P, D) of the teachers' patch tokens; empty if the loss needs none.
        class_counts: how many training rows each class has, [K] by the column of the classes, where priors or weights
            of rows need it.
        log_priors: logarithms of the classes' frequencies by their column; those that the loss needs.
        standardizers: of each teacher's embeddings; None: losses compare them as they are.
        weights: factors of the losses of each teacher.
        heads: of each online teacher; its logits are computed as a cache with this config stores them. None: they are
            the network's.
    """

    spec: SupervisionSpec
    source: RowSource
    teachers: tuple[Teacher, ...]
    class_directions: tuple[Mapping[str, ClassDirections], ...]
    teacher_dims: tuple[int, ...]
    canaries: CanaryReport = field(default_factory=CanaryReport)
    class_counts: Mapping[str, NDArray[np.int64]] = field(default_factory=dict[str, NDArray[np.int64]])
    log_priors: Mapping[str, Tensor] = field(default_factory=dict[str, Tensor])
    standardizers: tuple[Standardizer | None, ...] = ()
    weights: tuple[float, ...] = ()
    teacher_tokens: tuple[tuple[int, int], ...] = ()
    heads: tuple[LinearHead | None, ...] = ()


def open_supervision(
    config: Config,
    spec: SupervisionSpec,
    loss: CompositeLoss,
    device: torch.device,
    *,
    teachers: Sequence[Teacher] | None = None,
) -> Supervision:
    """Opens the rows and the teachers of a spec, and checks that they provide what the loss needs.

    Args:
        teachers: online teachers that are loaded already; None loads them.

    Raises:
        ConfigError: a loss needs what this teacher mode does not offer, or labels that are missing.
        CacheError: the cache is not usable, or this machine computes pixels that differ from the teacher's input.
    """
    supervision = _open(config, spec, loss, device, teachers)
    source, balance = supervision.source, config.train.balance
    balanced = [] if balance is None else [balanced_head(balance, source.task)]
    counts = counts_by_head(source, [*loss.heads_of_priors, *balanced])
    return replace(
        supervision,
        class_counts=counts,
        log_priors={head.column: log_prior(counts[head.column], device) for head in loss.heads_of_priors},
        standardizers=standardizers_of(config, spec, device) if supervision.teacher_dims else (),
        weights=config.teacher.loss_weights or (1.0,) * len(supervision.teacher_dims),
    )


def _open(
    config: Config, spec: SupervisionSpec, loss: CompositeLoss, device: torch.device, teachers: Sequence[Teacher] | None
) -> Supervision:
    check_cached_outputs(loss, spec.caches)
    check_online_class_means(config, loss, spec)
    if spec.caches:
        return _cached_supervision(spec, loss, device)
    source = open_indexed(index_url(config), spec.data, spec.plan)
    source.check_labelled(required_targets(config, loss))
    check_any_labelled(source, loss.targets)
    if config.teacher.mode == "none":
        return Supervision(spec, source, (), (), ())
    teachers = _load_teachers(config, spec, loss, device) if teachers is None else tuple(teachers)
    return _online_supervision(config, spec, source, loss, teachers, device)


def required_targets(config: Config, loss: CompositeLoss) -> tuple[str, ...]:
    """The columns in which a row without a target is an error."""
    return loss.targets if config.data.missing_labels == "refuse" else ()


def _load_teachers(
    config: Config, spec: SupervisionSpec, loss: CompositeLoss, device: torch.device
) -> tuple[Teacher, ...]:
    widths, requests = task_of(spec.data).widths, token_requests(config, loss)
    return tuple(
        load_teacher(section, widths=widths, size=size, device=device, where=name, tokens=requests.get(name))
        for (name, section), size in zip(config.teacher.models.items(), teacher_sizes(config), strict=True)
    )


def _online_supervision(
    config: Config,
    spec: SupervisionSpec,
    source: RowSource,
    loss: CompositeLoss,
    teachers: tuple[Teacher, ...],
    device: torch.device,
) -> Supervision:
    heads_of_means = loss.heads_of_class_means
    directions = tuple(
        {} if cache is None else _directions(online_means(cache, teacher, source, heads_of_means, section=name), device)
        for name, cache, teacher in zip(config.teacher.models, spec.means_caches, teachers, strict=True)
    )
    for name, cache, teacher in zip(config.teacher.models, spec.moments_caches, teachers, strict=True):
        if cache is not None:
            check_same_teacher(cache, teacher, f"{name}.moments")
    widths = tuple(teacher.module.embedding_dim for teacher in teachers)
    tokens = tuple(teacher.tokens.shape for teacher in teachers if teacher.tokens is not None)
    heads = tuple(None if config.cache is None else head_of(teacher, config.cache, spec.data) for teacher in teachers)
    return Supervision(
        spec,
        source,
        teachers,
        directions,
        widths,
        teacher_tokens=tokens,
        heads=tuple(None if head is None else head.to(device) for head in heads),
    )


def _cached_supervision(spec: SupervisionSpec, loss: CompositeLoss, device: torch.device) -> Supervision:
    source = open_cached(spec.caches, spec.data, reads=loss.teacher_outputs)
    check_any_labelled(source, loss.targets)
    # On every rank, since each may run on a machine whose decoder differs.
    canaries = check_canaries(source, spec.data)
    heads = loss.heads_of_class_means
    directions = tuple(_directions(cached_means(cache, source, heads), device) for cache in spec.caches)
    widths = tuple(cache.header.embedding_dim for cache in spec.caches)
    outputs = [cache.header.output(TOKENS) for cache in spec.caches if TOKENS in loss.teacher_outputs]
    tokens = tuple((output.shape[0], output.shape[1]) for output in outputs if output is not None)
    return Supervision(spec, source, (), directions, widths, canaries, teacher_tokens=tokens)


def _directions(means: Mapping[str, Tensor], device: torch.device) -> dict[str, ClassDirections]:
    return {column: ClassDirections.of(means_KD.to(device)) for column, means_KD in means.items()}
