"""``views``: the augmented views of an image."""

from __future__ import annotations

import re
from typing import Literal

from pydantic import Field, field_validator, model_validator

from schemas.config.section import Level, Section
from schemas.config.size import Size, SizeKey

_AUGMENTING = ("jitter", "randaugment", "erasing")
_PLACED, _SCALED = ("area", "aspect"), ("scale", "relative_to")
_JPEG = "jpeg:"
_MIN_SCALE, _MAX_SCALE = 0.01, 100.0


class JitterConfig(Section):
    """Colour jitter in a random order: sampled factors of brightness, contrast, saturation, and a shift of hue."""

    probability: float = Field(1.0, gt=0, le=1, description="Share of the jittered views.")
    brightness: float = Field(0.4, ge=0, le=1, description="b: the factor is uniform in 1 - b to 1 + b.")
    contrast: float = Field(0.4, ge=0, le=1, description="The same, away from the mean of the grey view.")
    saturation: float = Field(0.4, ge=0, le=1, description="The same, away from the grey view.")
    hue: float = Field(0.0, ge=0, le=0.5, description="h: the shift is uniform in -h to h turns of the colour circle.")

    @model_validator(mode="after")
    def _check_any(self) -> JitterConfig:
        if not (self.brightness or self.contrast or self.saturation or self.hue):
            raise ValueError("brightness, contrast, saturation and hue are all 0, so nothing is jittered")
        return self


class RandAugmentConfig(Section):
    """Operations sampled with replacement from the 14 of Cubuk 2019, at a strength of 0 to 30."""

    num_ops: int = Field(2, ge=1, le=8, description="Operations on each view, one after another.")
    magnitude: float = Field(9.0, ge=0, le=30, description="Strength of an operation; 30 is the strongest.")
    magnitude_spread: float = Field(0.0, ge=0, le=30, description="The strength is uniform within magnitude ± this.")


class ErasingConfig(Section):
    """A box of one colour over a part of the view (Zhong 2017)."""

    probability: float = Field(0.25, gt=0, le=1, description="Share of the partly erased views.")
    area: tuple[float, float] = Field((0.02, 1 / 3), description="Area as a share of the view, sampled uniformly.")
    aspect: tuple[float, float] = Field((0.3, 10 / 3), description="Width / height, sampled log-uniformly.")
    fill: Literal["random"] | tuple[Level, Level, Level] = Field(
        "random", description="Colour: sampled for each view, or [red, green, blue] from 0 to 255."
    )

    @model_validator(mode="after")
    def _check_ranges(self) -> ErasingConfig:
        _check_area_and_aspect(self.area, self.aspect)
        return self


def _check_area_and_aspect(area: tuple[float, float], aspect: tuple[float, float]) -> None:
    if not 0 < area[0] <= area[1] <= 1:
        raise ValueError(f"area is {list(area)}; expected 0 < low <= high <= 1")
    if not 0 < aspect[0] <= aspect[1]:
        raise ValueError(f"aspect is {list(aspect)}; expected 0 < low <= high")


class ViewsConfig(Section):
    """The plan of augmented views. The views id depends on all keys except count, size and raw pixels."""

    kind: Literal["eval", "crop", "function_matching", "scale_crop"] = Field(
        "crop", description="See docs/reference/format.md."
    )
    count: int = Field(1, ge=1, le=65_535, description="V, views per image in a cache.")
    seed: int = Field(0, ge=0, lt=2**63, description="Views are a pure function of it and the sample id.")
    size: SizeKey | None = Field(
        None, description="The teacher's input in pixels: height and width in one number, or [height, width]."
    )
    area: tuple[float, float] = Field((0.05, 1.0), description="Box area as a share of the image, sampled uniformly.")
    aspect: tuple[float, float] = Field((0.75, 4 / 3), description="Box width / height, sampled log-uniformly.")
    flip: float = Field(0.5, ge=0, le=1, description="Probability of a horizontal flip.")
    scale: tuple[float, float] | tuple[float, float, float] = Field(
        (0.5, 2.0),
        description="scale_crop: how large the image is shown, uniform in [low, high], or of [low, high, step] one of "
        "low, low + step and so on to high.",
    )
    relative_to: Literal["image", "size"] = Field(
        "image", description="scale_crop: scale 1 shows the pixels of the image as they are, or all of it in size."
    )
    fill: tuple[Level, Level, Level] = Field(
        (124, 116, 104), description="scale_crop and letterbox: red, green, blue of what is outside of the image."
    )
    crop_fraction: float = Field(0.875, gt=0, le=1, description="Eval views: side of the centred box / shorter edge.")
    eval_box: Literal["centre", "letterbox"] = Field(
        "centre", description="Eval views: the centred box, or the whole image, padded at its right or lower edge."
    )
    mix_group: int = Field(256, ge=2, description="Consecutive ok rows among which mixup partners are matched.")
    mix_repeat: int = Field(
        1, ge=1, le=65_535, description="r, views in a row with the same partners, for train.views_per_image."
    )
    # The views id leaves out null options, so a new option does not change the ids of existing plans.
    jitter: JitterConfig | None = Field(None, description="Colour jitter of the flipped crop.")
    randaugment: RandAugmentConfig | None = Field(None, description="RandAugment, after jitter.")
    erasing: ErasingConfig | None = Field(
        None, description="Random erasing, after all other operations on a single view."
    )
    cutmix: float | None = Field(
        None, gt=0, le=1, description="Share of the mixed rows whose partner is pasted as a box instead of blended."
    )

    pixels: str = Field(
        "none",
        description="none, raw or jpeg:Q, quality 1 to 100: how a cache stores the views, for training without shards. "
        "With jpeg:Q teacher and student see the decoded JPEG.",
    )

    @field_validator("pixels")
    @classmethod
    def _check_pixels(cls, pixels: str) -> str:
        if not re.fullmatch(rf"none|raw|{_JPEG}([1-9][0-9]?|100)", pixels):
            raise ValueError(
                f"pixels is {pixels!r}; expected none, raw or jpeg:Q with Q from 1 to 100, such as jpeg:90"
            )
        return pixels

    @model_validator(mode="after")
    def _check_ranges(self) -> ViewsConfig:
        _check_area_and_aspect(self.area, self.aspect)
        _check_scale(self.scale)
        if unused := [name for name in self._without_effect() if getattr(self, name) != _default(name)]:
            raise ValueError(f"{unused[0]} is given, and views of kind {self.kind} do not depend on it")
        if self.kind == "eval" and self.count != 1:
            raise ValueError(f"kind eval has one view, count is {self.count}")
        if self.kind == "eval" and (named := [name for name in _AUGMENTING if getattr(self, name) is not None]):
            raise ValueError(f"kind eval is never augmented, but {', '.join(named)} is set")
        if self.cutmix is not None and not self.mixes:
            raise ValueError(f"cutmix needs partners, and kind {self.kind} mixes nothing; expected function_matching")
        if self.mix_repeat > 1 and not self.mixes:
            raise ValueError(f"mix_repeat is {self.mix_repeat}, and kind {self.kind} mixes nothing; expected 1")
        return self

    def _without_effect(self) -> tuple[str, ...]:
        """Keys that these views do not depend on; but area and aspect of eval views are in ids of earlier versions."""
        is_scaled, is_letterbox = self.kind == "scale_crop", self.eval_box == "letterbox"
        fill = () if is_scaled or is_letterbox else ("fill",)
        return (*(_PLACED if is_scaled else _SCALED), *fill, *(("crop_fraction",) if is_letterbox else ()))

    @property
    def keys_outside_id(self) -> set[str]:
        """Keys that the views id does not have, so that plans that are older than these keys have the same."""
        return {
            "count",
            "size",
            "pixels",
            *self._without_effect(),
            *(("eval_box",) if self.eval_box == "centre" else ()),
        }

    @property
    def mixes(self) -> bool:
        return self.kind == "function_matching"

    @property
    def box_size(self) -> Size | None:
        """The size of the teacher's input, if the boxes of the views depend on it: those of eval views have its
        aspect ratio."""
        is_needed = self.kind == "scale_crop" or (self.kind == "eval" and not isinstance(self.size, int))
        return self.size if is_needed else None

    @property
    def jpeg_quality(self) -> int | None:
        """None: the pixels of a view are those that were rendered."""
        return int(self.pixels.removeprefix(_JPEG)) if self.pixels.startswith(_JPEG) else None


def _default(name: str) -> object:
    return ViewsConfig.model_fields[name].default


def _check_scale(scale: tuple[float, ...]) -> None:
    low, high, *step = scale
    if not _MIN_SCALE <= low <= high <= _MAX_SCALE:
        raise ValueError(f"scale is {list(scale)}; expected {_MIN_SCALE} <= low <= high <= {_MAX_SCALE:g}")
    if step and not (step[0] > 0 and abs((high - low) / step[0] - round((high - low) / step[0])) < 1e-6):
        raise ValueError(f"scale is {list(scale)}; expected whole steps from low to high, such as [0.5, 2.0, 0.1]")
