"""``cache``: what a build stores, and how it is encoded."""

from __future__ import annotations

import re
from typing import Literal

from pydantic import Field, field_validator, model_validator

from schemas.config.section import Section

_NUMBER = "[1-9][0-9]*"
# One spelling for each number, since the fingerprint contains it.
_T = rf"(?:{_NUMBER}|(?:0|{_NUMBER})\.[0-9]*[1-9])"


class CacheConfig(Section):
    """Which teacher outputs are stored, and where."""

    url: str = Field(description="Folder of the cache; any allowed URL.")
    logits: str = Field(
        "auto",
        description="fp32, fp16, int8, int8t, int4, topk:k, sampled:n@T or none: encoding of the logits; task "
        "embedding: none. auto: that of an existing cache; of a new one int8t from 256 classes, below that and with "
        "several heads fp16, of maps int8. head: computed from the stored embedding.",
    )
    embeddings: Literal["fp32", "fp16", "int8", "none"] = Field(
        "none", description="Encoding of the penultimate embedding; default of task embedding: fp16."
    )
    tokens: Literal["fp32", "fp16", "int8", "none"] = Field(
        "none", description="Encoding of the patch tokens, the positions of the output of teacher.tokens_layer."
    )
    tokens_grid: int | None = Field(
        None, ge=1, description="Side of the grid to which tokens are pooled; null: that of the layer."
    )
    grid: int | None = Field(
        None,
        ge=1,
        le=256,
        description="task segmentation: pixels of a view, along an axis, for each position of the stored logits; "
        "default: 8.",
    )
    class_means: str = Field(
        "none", min_length=1, description="none, eval (one extra eval pass), view0, or the URL of ND's JSON."
    )
    views_per_part: int = Field(
        5, ge=1, le=500, description="Views in one part, the unit of work: a killed task loses at most one."
    )

    @field_validator("logits")
    @classmethod
    def _check_logits(cls, logits: str) -> str:
        if not re.fullmatch(rf"auto|fp32|fp16|int8|int8t|int4|head|none|topk:{_NUMBER}|sampled:{_NUMBER}@{_T}", logits):
            raise ValueError(
                f"logits is {logits!r}; expected auto, fp32, fp16, int8, int8t, int4, head, none, topk:k, such as "
                "topk:16, or sampled:n@T, such as sampled:20@4"
            )
        return logits

    @model_validator(mode="after")
    def _check_tokens(self) -> CacheConfig:
        if self.tokens_grid is not None and self.tokens == "none":
            raise ValueError(f"tokens_grid is {self.tokens_grid}, but tokens is none; expected fp32, fp16 or int8")
        return self

    @model_validator(mode="after")
    def _check_head(self) -> CacheConfig:
        if self.logits == "head" and self.embeddings == "none":
            raise ValueError(
                "logits is head, which computes logits from stored embeddings, but embeddings is none; expected int8, "
                "fp16 or fp32"
            )
        return self

    @property
    def computes_class_means(self) -> bool:
        return self.class_means in ("eval", "view0")

    @property
    def class_means_url(self) -> str | None:
        """The URL of imported class means; None if the build computes them or stores none."""
        return None if self.class_means == "none" or self.computes_class_means else self.class_means
