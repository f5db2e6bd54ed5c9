"""The schema of the YAML config: every key with its type, meaning and unit. Each command requires some sections.

Unknown keys are refused. This package does no I/O and loads no model.
"""

from __future__ import annotations

from pydantic import Field, field_validator

from schemas.config.cache import CacheConfig
from schemas.config.data import DataConfig
from schemas.config.loss import (
    CeLoss,
    CosineLoss,
    DistLoss,
    DkdLoss,
    HardLoss,
    KdLoss,
    LossConfig,
    LossSection,
    MseLoss,
    NdLoss,
    ReviewKdLoss,
    SifnLoss,
)
from schemas.config.model import (
    Interpolation,
    ModelConfig,
    OtherTeacherConfig,
    Precision,
    StudentConfig,
    TeacherConfig,
    TeacherModelConfig,
)
from schemas.config.ray import RayConfig
from schemas.config.section import Level, Section, Share, Triple, local_path
from schemas.config.train import Optimizer, RunConfig, TrainConfig
from schemas.config.views import ErasingConfig, JitterConfig, RandAugmentConfig, ViewsConfig


class Config(Section):
    """One YAML document. ``require`` checks the keys that a command needs."""

    data: DataConfig = Field(default_factory=lambda: DataConfig.model_validate({}))
    teacher: TeacherConfig = Field(default_factory=lambda: TeacherConfig.model_validate({}))
    views: ViewsConfig = Field(default_factory=lambda: ViewsConfig.model_validate({}))
    cache: CacheConfig | None = None
    student: StudentConfig | None = None
    loss: tuple[LossConfig, ...] = ()
    train: TrainConfig = Field(default_factory=lambda: TrainConfig.model_validate({}))
    run: RunConfig | None = None
    ray: RayConfig = Field(default_factory=lambda: RayConfig.model_validate({}))

    @field_validator("loss")
    @classmethod
    def _check_loss(cls, loss: tuple[LossSection, ...]) -> tuple[LossSection, ...]:
        if loss and not any(term.weight for term in loss):
            raise ValueError("every weight is 0, so there is nothing to learn")
        return loss


__all__ = [
    "CacheConfig",
    "CeLoss",
    "Config",
    "CosineLoss",
    "DataConfig",
    "DistLoss",
    "DkdLoss",
    "ErasingConfig",
    "HardLoss",
    "Interpolation",
    "JitterConfig",
    "KdLoss",
    "Level",
    "LossConfig",
    "LossSection",
    "ModelConfig",
    "MseLoss",
    "NdLoss",
    "Optimizer",
    "OtherTeacherConfig",
    "Precision",
    "RandAugmentConfig",
    "RayConfig",
    "ReviewKdLoss",
    "RunConfig",
    "Section",
    "Share",
    "SifnLoss",
    "StudentConfig",
    "TeacherConfig",
    "TeacherModelConfig",
    "TrainConfig",
    "Triple",
    "ViewsConfig",
    "local_path",
]
