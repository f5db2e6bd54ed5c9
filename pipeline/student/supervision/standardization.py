"""Standardised targets: teacher embeddings with mean 0 and variance 1 in each dimension, by the moments of a cache.

Teachers differ in the scale of their embeddings, and dimensions of one teacher by orders of magnitude: one teacher or a
few dimensions would dominate a squared difference (Ranzinger 2024, 2410.01680).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pipeline.cache.build.moments import EmbeddingMoments
from pipeline.cache.read.moments import read_moments
from pipeline.core.errors import CacheError
from pipeline.core.redaction import redact
from pipeline.student.losses import CompositeLoss
from pipeline.student.losses.arithmetic import no_autocast
from pipeline.student.supervision.rotations import phi_s_rotation
from pipeline.student.supervision.spec import SupervisionSpec
from pipeline.tasks import EMBEDDING
from schemas.config import Config

# A dimension with a smaller share of the largest standard deviation is constant up to rounding.
_MIN_SHARE = 1e-6


@dataclass(frozen=True, slots=True)
class Standardizer:
    """``(embedding − mean) · scale`` in fp32, on the device of its tensors. With a rotation ``scale`` is [D,D]."""

    mean_D: Tensor
    scale: Tensor

    @classmethod
    def of(cls, kind: str, moments: EmbeddingMoments, device: torch.device, *, where: str) -> Standardizer:
        """
        Args:
            kind: ``mean_std``: each dimension is divided by its standard deviation; one that is constant stays at 0.
                ``phi_s``: a rotation gives all dimensions the same variance, and one number scales it to 1.

        Raises:
            CacheError: all embeddings are equal.
        """
        variance_D = np.diag(moments.covariance_DD)
        if not variance_D.max() > 0:
            raise CacheError(
                "all embeddings of this cache are equal, so they cannot be standardised",
                code="cache.constant-embeddings",
                where=where,
                got="a variance of 0 in every dimension",
                next_step="set teacher.standardize=none, or check teacher.weights of the cache",
            )
        if kind == "phi_s":
            scale = phi_s_rotation(moments.covariance_DD) / np.sqrt(variance_D.mean())
        else:
            deviation_D = np.sqrt(variance_D)
            varies_D = deviation_D > _MIN_SHARE * deviation_D.max()
            scale = np.where(varies_D, 1 / np.where(varies_D, deviation_D, 1), 0)
        mean_D, scale = (torch.from_numpy(array.astype(np.float32)).to(device) for array in (moments.mean_D, scale))
        return cls(mean_D, scale)

    def __call__(self, embedding_BD: Tensor) -> Tensor:
        """fp32 [B,D]."""
        with no_autocast(embedding_BD):
            centred_BD = embedding_BD.float() - self.mean_D
            return centred_BD * self.scale if self.scale.ndim == 1 else centred_BD @ self.scale


def standardizers_of(config: Config, spec: SupervisionSpec, device: torch.device) -> tuple[Standardizer | None, ...]:
    """Of each teacher's embeddings; None: losses compare them as they are.

    Raises:
        CacheError: the moments of a cache are missing or damaged, or all of its embeddings are equal.
    """
    kinds, caches = config.teacher.standardizations(len(spec.moments)), spec.caches or spec.moments_caches
    return tuple(
        None
        if cache is None or record is None
        else Standardizer.of(kind, read_moments(cache, record), device, where=redact(cache.url))
        for kind, cache, record in zip(kinds, caches, spec.moments, strict=True)
    )


def standardizer_of(loss: CompositeLoss, standardizers: Sequence[Standardizer | None]) -> Standardizer | None:
    """Of a single teacher, for evaluations: they compare its embedding with the student's through the projector of the
    first term that has one, and nd's leads to embeddings as they are."""
    terms = loss.projected
    compares = bool(terms) and terms[0] in loss.terms_that_read(EMBEDDING)
    return standardizers[0] if compares and len(standardizers) == 1 else None
