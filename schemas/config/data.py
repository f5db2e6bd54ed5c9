"""``data``: shards, indexes, labels, and the caches that a student reads."""

from __future__ import annotations

import re
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from schemas.config.heads import HEAD_NAME, HeadConfig
from schemas.config.labels import LabelSection
from schemas.config.section import local_path

# A text member, or a field of a JSON member.
_DOMAIN_MEMBER = r"(?!\S*(?i:json)$)[^\s:/]+|(\S+\.)?(?i:json):[^\s:]+"
DENSE_TASKS = {
    "segmentation": {"image": "jpg;jpeg;webp", "label": "mask.png;png"},
    "detection": {"label": "json"},
}
"""Defaults of tasks whose targets are masks or boxes."""
_JSON_LABEL = r"(\S+\.)?(?i:json)(:[^\s:]+)?"


class DataConfig(LabelSection):
    """Images, labels, and the treatment of bad samples."""

    task: Literal["classification", "heads", "embedding", "segmentation", "detection"] = Field(
        "classification",
        description="classification: a class index per sample; heads: the targets of data.heads; embedding: teachers "
        "and students without a classifier, labels for evaluation alone; segmentation, detection: masks or boxes, "
        "which this version packs, indexes and checks, without networks for them.",
    )
    shards: str | tuple[str, ...] | None = Field(
        None, description="Training shards: URL with {a..b} braces, or a list."
    )
    val_shards: str | tuple[str, ...] | None = Field(None, description="Validation shards, same form.")
    num_classes: int | None = Field(
        None, ge=1, description="K. Classes must lie in [0, K). Default: the number of classes. 1: only task detection."
    )
    image: str = Field(
        "jpg;jpeg;png;webp",
        description="Member extensions that hold the image, first match wins; task segmentation: jpg;jpeg;webp.",
    )
    label: str | None = Field(
        "cls",
        description="Extension of the member that holds the class, as text or JSON; json:FIELD or json:a.b for a "
        "field of its JSON object; null: no labels. Task segmentation: mask.png;png, extensions of the mask, first "
        "match wins; detection: json, with boxes and classes.",
    )
    ignore_index: int = Field(
        255, ge=0, le=65_535, description="task segmentation: the value of mask pixels that count nowhere."
    )
    heads: dict[str, HeadConfig] = Field(
        default_factory=dict[str, HeadConfig], description="task heads: the targets by name, each with a head."
    )
    domain: str | dict[str, str] | None = Field(
        None,
        description="Domain of a sample, such as its camera: json:FIELD, the extension of a text member, or domains by "
        "shard id or glob, also in a file.",
    )
    cache: str | tuple[str, ...] | None = Field(
        None, description="URL of a finished teacher cache to train from, or a list with one for each teacher."
    )
    num_views: int | None = Field(
        None, ge=1, description="With a cache: train on its first n views alone; default: on all of them."
    )
    index: str | None = Field(None, description="URL of the folder with <shard_id>.parquet; default <run url>/index.")
    bad_samples: Literal["fail", "skip"] = Field(
        "fail", description="Action for images, masks and boxes that cannot be used: stop, or record and skip."
    )
    max_bad_share: float = Field(
        0.1, ge=0, le=1, description="Under skip: a shard with a larger share of bad samples fails."
    )
    missing_labels: Literal["refuse", "ignore"] = Field(
        "refuse", description="Samples without a label: refuse for losses that need one, or average over the others."
    )
    max_pixels: int = Field(64_000_000, gt=0, description="Images with more pixels are not decoded (status too_large).")

    allow_pixel_drift: int = Field(
        0, ge=0, le=255, description="Levels by which block means of a canary may differ from those in the cache."
    )
    local_dir: str | None = Field(
        None, description="Folder on every node for copies of shards and cached views; default: the temporary folder."
    )
    local_bytes: int | None = Field(
        None, gt=0, description="Maximum bytes in local_dir on a node; default: four fifths of the free disk space."
    )

    @model_validator(mode="before")
    @classmethod
    def _read_members_of_task(cls, values: Any) -> Any:
        """A PNG next to a JPEG is a mask with task segmentation."""
        task = str(values.get("task")) if isinstance(values, dict) else ""
        return {**DENSE_TASKS[task], **values} if task in DENSE_TASKS else values

    @field_validator("local_dir")
    @classmethod
    def _check_local_dir(cls, local_dir: str | None) -> str | None:
        return local_dir if local_dir is None else local_path(local_dir, key="local_dir")

    @field_validator("heads")
    @classmethod
    def _check_head_names(cls, heads: dict[str, HeadConfig]) -> dict[str, HeadConfig]:
        if wrong := [name for name in heads if not HEAD_NAME.fullmatch(name)]:
            raise ValueError(f"{wrong[0]!r} is no name of a head; expected lower-case letters, digits and _")
        return heads

    @field_validator("domain")
    @classmethod
    def _check_domain(cls, domain: str | dict[str, str] | None) -> str | dict[str, str] | None:
        if isinstance(domain, dict):
            if not domain or not all(name.strip() for name in domain.values()):
                raise ValueError(
                    "domain has no domains, or empty ones; expected such as {cam1-*: north, cam2-*: south}"
                )
        elif domain is not None and "/" not in domain and not re.fullmatch(_DOMAIN_MEMBER, domain):
            raise ValueError(
                f"domain is {domain!r}; expected json:FIELD, the extension of a text member, or a file with a / in its "
                "name, such as ./domains.txt"
            )
        return domain

    @property
    def domain_file(self) -> str | None:
        """The path or URL of a file of domains, until its content replaces it: no extension of a member has a slash."""
        is_file = isinstance(self.domain, str) and not re.fullmatch(_DOMAIN_MEMBER, self.domain)
        return str(self.domain) if is_file else None

    @model_validator(mode="after")
    def _check_heads(self) -> DataConfig:
        if self.heads and self.task != "heads":
            raise ValueError(f"heads are given, but task is {self.task}; expected task: heads")
        if self.task == "heads" and not self.heads:
            raise ValueError("task is heads, but heads is empty; expected such as heads: {color: {num_classes: 8}}")
        if self.task == "heads" and (given := self._label_keys()):
            raise ValueError(f"{given[0]} is given; with task: heads each head has its own")
        if self.task == "heads" and not re.fullmatch(_JSON_LABEL, self.label or ""):
            raise ValueError(
                f"label is {self.label!r}, but heads are fields of a JSON member: expected json, or json:FIELD for the "
                "fields of an object"
            )
        if ":" in (self.label or "") and not re.fullmatch(_JSON_LABEL, self.label or ""):
            raise ValueError(f"label is {self.label!r}, and only a JSON member has fields; expected such as json:FIELD")
        return self

    @model_validator(mode="after")
    def _check_dense(self) -> DataConfig:
        if self.num_classes == 1 and self.task != "detection":
            raise ValueError("num_classes is 1; expected at least 2")
        if self.task != "segmentation" and self.ignore_index != DataConfig.model_fields["ignore_index"].default:
            raise ValueError(f"ignore_index is given, but task is {self.task}; expected task: segmentation")
        if self.is_dense and self.num_classes is None and not isinstance(self.classes, str):
            raise ValueError(f"num_classes is not given; task {self.task} needs it, or classes")
        if self.is_dense and (given := [key for key in self._label_keys() if key.startswith("label_")]):
            raise ValueError(f"{given[0]} is given; masks and boxes have class indexes from 0")
        return self

    @property
    def is_dense(self) -> bool:
        """Whether targets are masks or boxes."""
        return self.task in DENSE_TASKS

    def _label_keys(self) -> list[str]:
        fields = LabelSection.model_fields
        return [name for name, field in fields.items() if getattr(self, name) != field.default]

    @property
    def caches(self) -> tuple[str, ...]:
        """The URLs of ``cache``."""
        return (self.cache,) if isinstance(self.cache, str) else self.cache or ()
