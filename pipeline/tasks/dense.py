"""What tasks with a target for places of an image share: the index has the place of the target in its shard, not the
target, and a sample whose target cannot be used has the status ``bad_target``."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import xxhash
from numpy.typing import NDArray

from pipeline.tasks.boxes import BadBoxesError, Boxes, check_boxes, parse_boxes
from pipeline.tasks.confusion import MASK, ConfusionRecount, ConfusionSum, confusion_of, segmentation_metrics
from pipeline.tasks.masks import BadMaskError, check_mask, decode_mask, mask_of_view
from pipeline.tasks.task import (
    LOGITS,
    MapWidth,
    OutputSpec,
    Recount,
    StatisticsAccumulator,
    TargetColumn,
    TargetMember,
    Targets,
    Task,
    TaskHead,
    TeacherOutputs,
)
from schemas.cache_format import Statistics
from schemas.config import CacheConfig

# Of most networks for segmentation.
_GRID = 8
OFFSET, SIZE, HASH = "target_offset", "target_size", "target_hash"


class StoredTarget(NamedTuple):
    """A member with a target: its byte range in the tar, the XXH3-64 of its bytes, and, until it is checked, these."""

    offset: int
    size: int
    content_hash: int
    data: bytes = b""


class NoStatistics(StatisticsAccumulator, Recount):
    """Of tasks without networks."""

    def add(self, outputs: TeacherOutputs, targets: Targets) -> None: ...

    def add_part(self, statistics: Statistics) -> None: ...

    def result(self) -> dict[str, Any]:
        return {}

    def add_view(self, mix_lambda_M: NDArray[np.float32], rows: slice) -> None: ...

    def add_outputs(self, name: str, values: NDArray[np.float32], rows: slice, *, exact: bool) -> None: ...

    def compare(self, stated: Statistics, expect: Callable[[str, object, object], object]) -> None: ...


@dataclass(frozen=True, slots=True)
class DenseTask(Task):
    """A task that reads and checks targets, and has no networks.

    Attributes:
        label: extensions of the member with the target, best first, separated by semicolons; None: no targets are read.
        num_labels: K, the number of classes.
        max_pixels: of a mask.
    """

    label: str | None
    num_labels: int
    max_pixels: int

    max_bytes = 64 << 20
    required_keys = ("data.num_classes",)
    has_networks = False
    embedding = None

    @property
    def settings(self) -> dict[str, Any]:
        return {"label": self.label, "num_classes": self.num_labels}

    @property
    def members(self) -> tuple[str, ...]:
        names = (self.label or "").split(";")
        return tuple(name.strip().lower() for name in names if name.strip())

    @property
    def columns(self) -> tuple[TargetColumn, ...]:
        """The hash of a target may be 0 in theory, so only the offset shows that there is none."""
        return (
            TargetColumn(OFFSET, pa.int64(), -1),
            TargetColumn(SIZE, pa.int32(), -1),
            TargetColumn(HASH, pa.uint64(), 0),
        )

    def parse_members(self, members: Mapping[str, TargetMember]) -> StoredTarget | None:
        for name in self.members:
            if name in members:
                data, offset, size = members[name]
                return StoredTarget(offset, size, xxhash.xxh3_64_intdigest(data), data)
        return None

    def parse(self, texts: Mapping[str, bytes]) -> StoredTarget | None:
        """Without the place of the member."""
        return self.parse_members({name: TargetMember(text, 0, len(text)) for name, text in texts.items()})

    def try_parse(self, texts: Mapping[str, bytes]) -> StoredTarget | None:
        return self.parse(texts)

    def encode(self, target: StoredTarget) -> dict[str, bytes]:
        return {self.members[0]: target.data}

    def target_data(self, target: StoredTarget | None) -> bytes | None:
        return None if target is None else target.data

    def without_content(self, target: StoredTarget | None) -> StoredTarget | None:
        return None if target is None else target._replace(data=b"")

    def rows(self, targets: Iterable[StoredTarget | None]) -> dict[str, NDArray[Any]]:
        places = [(-1, -1, 0) if target is None else target[:3] for target in targets]
        return {
            column.name: np.array([place[at] for place in places], column.type.to_pandas_dtype())
            for at, column in enumerate(self.columns)
        }

    def has_target(self, targets: Targets) -> NDArray[np.bool_]:
        return targets[OFFSET] != -1

    def num_invalid(self, targets: Targets) -> int:
        return int(((targets[OFFSET] < -1) | (targets[SIZE] < 0) & (targets[OFFSET] != -1)).sum())

    @property
    def statistics_fields(self) -> tuple[str, ...]:
        return ()

    @property
    def statistics_outputs(self) -> tuple[str, ...]:
        return ()

    @property
    def widths(self) -> dict[str, int]:
        return {}

    @property
    def roles(self) -> dict[str, str]:
        return {}

    def outputs(self, cache: CacheConfig, widths: Mapping[str, int]) -> tuple[OutputSpec, ...]:
        del cache, widths
        return ()

    def accumulate(self) -> StatisticsAccumulator:
        return NoStatistics()

    def recount(self, targets: Targets, *, mix_group: int, outputs: Iterable[str]) -> Recount:
        del targets, mix_group, outputs
        return NoStatistics()

    def teacher_metrics(self, statistics: Statistics) -> dict[str, float | None]:
        del statistics
        return {}


@dataclass(frozen=True, slots=True)
class MapHead(TaskHead):
    """Logits of a class at each position. ``ignore``: the value of pixels that count nowhere."""

    ignore: int

    @property
    def column(self) -> str:
        return MASK

    @property
    def arguments(self) -> Mapping[str, Any]:
        return {"ignore_index": self.ignore}


@dataclass(frozen=True, slots=True)
class Segmentation(DenseTask):
    """``ignore``: the value of pixels that count nowhere."""

    ignore: int

    name = "segmentation"
    member_content = "a mask of class indexes as PNG"
    default_member = "mask.png"
    view_target = MASK

    @classmethod
    def of(cls, settings: Mapping[str, Any]) -> Segmentation:
        return cls(settings["label"], settings["num_classes"], settings["max_pixels"], settings["ignore_index"])

    @property
    def settings(self) -> dict[str, Any]:
        return {"label": self.label, "num_classes": self.num_labels, "ignore_index": self.ignore}

    @property
    def heads(self) -> tuple[MapHead, ...]:
        return (MapHead(None, "map", self.num_labels, self.ignore),)

    @property
    def widths(self) -> dict[str, int]:
        return {LOGITS: MapWidth(self.num_labels)}

    def is_target(self, text: bytes) -> bool:
        try:
            decode_mask(text, max_pixels=self.max_pixels)
        except BadMaskError:
            return False
        return True

    def check_target(self, target: StoredTarget | None, width: int, height: int) -> str | None:
        if target is None:
            return None
        try:
            mask_HW = decode_mask(target.data, max_pixels=self.max_pixels)
        except BadMaskError as error:
            return str(error)
        return check_mask(mask_HW, width, height, num_classes=self.num_labels, ignore=self.ignore)

    def decode_target(self, data: bytes) -> NDArray[Any]:
        """Class indexes [H,W]: uint8, or uint16 if ``ignore`` or the number of classes needs it."""
        mask_HW = decode_mask(data, max_pixels=self.max_pixels)
        return mask_HW.astype(self._mask_type, copy=False)

    def target_of_view(
        self, target: NDArray[Any] | None, box: Sequence[int], flip: bool, size: tuple[int, int]
    ) -> NDArray[Any]:
        """Class indexes [h,w] of the type of ``decode_target``; ``ignore`` outside of the image, and without a mask."""
        if target is None:
            return np.full(size, self.ignore, self._mask_type)
        return mask_of_view(target, box, flip, size, ignore=self.ignore)

    @property
    def roles(self) -> dict[str, str]:
        return {LOGITS: "map"}

    def outputs(self, cache: CacheConfig, widths: Mapping[str, int]) -> tuple[OutputSpec, ...]:
        return (OutputSpec(LOGITS, (widths[LOGITS],), cache.logits),) if LOGITS in widths else ()

    def grid(self, stride: int | None) -> int | None:
        return stride or _GRID

    @property
    def default_logits(self) -> str:
        return "int8"

    @property
    def statistics_fields(self) -> tuple[str, ...]:
        return ("labelled", "sums")

    @property
    def statistics_outputs(self) -> tuple[str, ...]:
        return (LOGITS,)

    def accumulate(self) -> ConfusionSum:
        return ConfusionSum(self.num_labels)

    def recount(self, targets: Targets, *, mix_group: int, outputs: Iterable[str]) -> ConfusionRecount:
        del mix_group
        return ConfusionRecount(self.has_target(targets), self.num_labels, has_logits=LOGITS in outputs)

    def teacher_metrics(self, statistics: Statistics) -> dict[str, float | None]:
        return segmentation_metrics(confusion_of(statistics, self.num_labels))

    @property
    def _mask_type(self) -> np.dtype[Any]:
        return np.min_scalar_type(max(self.ignore, self.num_labels - 1))


@dataclass(frozen=True, slots=True)
class Detection(DenseTask):
    name = "detection"
    member_content = "boxes and their classes as JSON"
    default_member = "json"

    @classmethod
    def of(cls, settings: Mapping[str, Any]) -> Detection:
        return cls(settings["label"], settings["num_classes"], settings["max_pixels"])

    def is_target(self, text: bytes) -> bool:
        try:
            parse_boxes(text)
        except BadBoxesError:
            return False
        return True

    def check_target(self, target: StoredTarget | None, width: int, height: int) -> str | None:
        if target is None:
            return None
        try:
            boxes = parse_boxes(target.data)
        except BadBoxesError as error:
            return str(error)
        return check_boxes(boxes, width, height, num_classes=self.num_labels)

    def decode_target(self, data: bytes) -> Boxes:
        return parse_boxes(data)
