"""The schema of the YAML config: every key with its type, meaning and unit. Each command requires some sections.

Unknown keys are refused. This package does no I/O and loads no model.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import Field, field_validator, model_validator

from schemas.config.cache import CacheConfig
from schemas.config.data import DENSE_TASKS, DataConfig
from schemas.config.heads import HeadConfig
from schemas.config.loss import (
    DistLoss,
    DkdLoss,
    HeadLossSection,
    KdLoss,
    LossConfig,
    LossSection,
    ReviewKdLoss,
    TokenLossSection,
)
from schemas.config.model import (
    Interpolation,
    ModelConfig,
    Precision,
    StudentConfig,
    TeacherConfig,
    TeacherModelConfig,
)
from schemas.config.ray import RayConfig
from schemas.config.section import Section, Share, Triple, local_path
from schemas.config.size import Size, height_width, size_json, size_of, size_text
from schemas.config.train import BalanceConfig, Optimizer, RunConfig, TrainConfig
from schemas.config.views import ErasingConfig, JitterConfig, RandAugmentConfig, ViewsConfig


class Config(Section):
    """The configuration of a run: one checked YAML document."""

    data: DataConfig = Field(default_factory=lambda: DataConfig.model_validate({}))
    teacher: TeacherConfig = Field(default_factory=lambda: TeacherConfig.model_validate({}))
    views: ViewsConfig = Field(default_factory=lambda: ViewsConfig.model_validate({}))
    cache: CacheConfig | None = None
    student: StudentConfig | None = None
    loss: tuple[LossConfig, ...] = ()
    train: TrainConfig = Field(default_factory=lambda: TrainConfig.model_validate({}))
    run: RunConfig | None = None
    ray: RayConfig = Field(default_factory=lambda: RayConfig.model_validate({}))

    @model_validator(mode="before")
    @classmethod
    def _store_embeddings(cls, tree: Any) -> Any:
        """With task embedding a cache stores embeddings, by default in fp16, and no logits."""
        data, cache = (tree.get(name) if isinstance(tree, Mapping) else None for name in ("data", "cache"))
        if not isinstance(data, Mapping) or not isinstance(cache, Mapping) or data.get("task") != "embedding":
            return tree
        chosen = {"logits": "none", "embeddings": "fp16", **cache}
        if chosen["logits"] != "none":
            raise ValueError(f"cache.logits is {chosen['logits']}, but networks of task embedding have no logits")
        if chosen["embeddings"] == "none" and chosen.get("tokens", "none") == "none":
            raise ValueError(
                "cache.embeddings and cache.tokens are none, so a cache of task embedding would store nothing"
            )
        return {**tree, "cache": chosen}

    @model_validator(mode="before")
    @classmethod
    def _show_whole_images(cls, tree: Any) -> Any:
        """Evaluation of masks and boxes needs all of an image, and their views need much memory."""
        data, views = (tree.get(name) if isinstance(tree, Mapping) else None for name in ("data", "views"))
        if not isinstance(data, Mapping) or not isinstance(views, Mapping) or str(data.get("task")) not in DENSE_TASKS:
            return tree
        return {**tree, "views": {"eval_box": "letterbox", "mix_group": 16, **views}}

    @field_validator("loss")
    @classmethod
    def _check_loss(cls, loss: tuple[LossSection, ...]) -> tuple[LossSection, ...]:
        if loss and not any(term.weight for term in loss):
            raise ValueError("every weight is 0, so there is nothing to learn")
        return loss

    @model_validator(mode="after")
    def _check_dense_views(self) -> Config:
        """Of masks and boxes there are those of scaled views and of whole images, in their colours."""
        views = self.views
        if not self.data.is_dense or "views" not in self.model_fields_set:
            return self
        if views.kind not in ("scale_crop", "eval"):
            raise ValueError(f"views.kind is {views.kind} with task {self.data.task}; expected scale_crop, or eval")
        if views.eval_box != "letterbox":
            raise ValueError(f"views.eval_box is {views.eval_box} with task {self.data.task}; expected letterbox")
        if named := [name for name in ("randaugment", "erasing") if getattr(views, name) is not None]:
            raise ValueError(f"views.{named[0]} is set with task {self.data.task}; expected jitter alone")
        return self

    @model_validator(mode="after")
    def _check_box_size(self) -> Config:
        if self.views.kind == "scale_crop" and self.views.size is None:
            raise ValueError(
                "views.size is not given, and the boxes of scale_crop depend on it; expected such as [512, 1024]"
            )
        # A teacher's size is that of the views; a student's is not.
        is_alone = self.views.kind == "eval" and self.views.size is None and self.teacher.mode == "none"
        if is_alone and self.student is not None and isinstance(self.student.size, tuple):
            raise ValueError(
                f"views.size is not given, and the boxes of eval views have its aspect ratio; expected "
                f"{list(self.student.size)}, as student.size"
            )
        return self

    @model_validator(mode="after")
    def _check_teacher_heads(self) -> Config:
        for section, teacher in self.teacher.models.items():
            heads = teacher.heads or ()
            if unknown := [head for head in heads if head not in self.data.heads]:
                expected = ", ".join(self.data.heads) or "none, since data.task is not heads"
                raise ValueError(f"{section}.heads has {unknown[0]!r}, which is not in data.heads; expected {expected}")
            if len(set(heads)) < len(heads):
                raise ValueError(f"{section}.heads names a head twice")
        return self


__all__ = [
    "BalanceConfig",
    "CacheConfig",
    "Config",
    "DataConfig",
    "DistLoss",
    "DkdLoss",
    "ErasingConfig",
    "HeadConfig",
    "HeadLossSection",
    "Interpolation",
    "JitterConfig",
    "KdLoss",
    "LossConfig",
    "LossSection",
    "ModelConfig",
    "Optimizer",
    "Precision",
    "RandAugmentConfig",
    "RayConfig",
    "ReviewKdLoss",
    "RunConfig",
    "Section",
    "Share",
    "Size",
    "StudentConfig",
    "TeacherConfig",
    "TeacherModelConfig",
    "TokenLossSection",
    "TrainConfig",
    "Triple",
    "ViewsConfig",
    "height_width",
    "local_path",
    "size_json",
    "size_of",
    "size_text",
]
