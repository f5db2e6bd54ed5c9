"""A second task, with another kind of target and output than classification: the position of one point."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from numpy.typing import NDArray

from pipeline.tasks import (
    TASKS,
    BadTargetError,
    OutputSpec,
    Recount,
    StatisticsAccumulator,
    TargetColumn,
    Targets,
    Task,
    TeacherOutputs,
)
from schemas.cache_format import Statistics
from schemas.config import CacheConfig

_POINT = re.compile(rb"(\d+),(\d+)")


class ErrorSum(StatisticsAccumulator):
    """Σ |x of the teacher − x| over the rows that have a target, and their number."""

    def __init__(self) -> None:
        self._sums = {"rows": 0.0, "absolute_error": 0.0}

    def add(self, outputs: TeacherOutputs, targets: Targets) -> None:
        has_target_N = targets["x"] != -1
        error_M = np.abs(outputs["x"][has_target_N, 0].astype(np.float64) - targets["x"][has_target_N])
        self._sums["rows"] += float(has_target_N.sum())
        self._sums["absolute_error"] += float(error_M.sum())

    def add_part(self, statistics: Statistics) -> None:
        for name in self._sums:
            self._sums[name] += statistics.sums[name]

    def result(self) -> dict[str, Any]:
        return {"sums": dict(self._sums)}


class ErrorRecount(Recount):
    """For plans that do not mix, and an encoding that stores fp32."""

    def __init__(self, targets: Targets) -> None:
        self._targets, self._sum = targets, ErrorSum()

    def add_view(self, mix_lambda_M: NDArray[np.float32], rows: slice) -> None:  # noqa: ARG002
        assert (mix_lambda_M == 1).all()

    def add_outputs(self, name: str, values: NDArray[np.float32], rows: slice, *, exact: bool) -> None:
        assert exact
        self._sum.add(
            {name: values.reshape(len(values), -1)}, {key: column[rows] for key, column in self._targets.items()}
        )

    def compare(self, stated: Statistics, expect: Callable[[str, object, object], object]) -> None:
        expect("the commit's errors do not match", stated.sums, pytest.approx(self._sum.result()["sums"]))


class ParityColumn(TargetColumn):
    """int8 [N,2], stored as a string of two bytes."""

    def to_arrow(self, values_N: NDArray[Any]) -> pa.Array:
        return pa.array([None if row[0] == self.missing else row.tobytes() for row in values_N], self.type)

    def to_numpy(self, column: pa.ChunkedArray) -> NDArray[Any]:
        return np.array([*b"".join(column.fill_null(b"\xff\xff").to_pylist())], np.uint8).astype(np.int8).reshape(-1, 2)


@dataclass(frozen=True)
class Point(Task):
    """``x,y`` in pixels, of which a second member may replace y. The head of its teacher returns an output ``x``."""

    label: str

    name = "point"
    member_content = "x,y as text"
    max_bytes = 12

    @classmethod
    def of(cls, settings: Mapping[str, Any]) -> Point:
        return cls(settings["label"])

    @property
    def settings(self) -> dict[str, Any]:
        return {"label": self.label}

    @property
    def members(self) -> tuple[str, ...]:
        return (self.label, "y")

    @property
    def columns(self) -> tuple[TargetColumn, ...]:
        return (
            TargetColumn("x", pa.int16(), -1),
            TargetColumn("y", pa.int64(), -7),
            ParityColumn("parity", pa.binary(2), -1),
        )

    @property
    def statistics_fields(self) -> tuple[str, ...]:
        return ("sums",)

    @property
    def statistics_outputs(self) -> tuple[str, ...]:
        return ("x",)

    def parse(self, texts: Mapping[str, bytes]) -> tuple[int, int] | None:
        if self.label not in texts:
            return None
        if not self.is_target(texts[self.label]):
            raise BadTargetError(self.label, "x,y", next_step="write two numbers")
        if "y" in texts and not texts["y"].isdigit():
            raise BadTargetError("y", "a number", next_step="write one number")
        return self.try_parse(texts)

    def try_parse(self, texts: Mapping[str, bytes]) -> tuple[int, int] | None:
        match = _POINT.fullmatch(texts.get(self.label, b""))
        return None if match is None else (int(match[1]), int(texts.get("y", match[2])))

    def is_target(self, text: bytes) -> bool:
        return _POINT.fullmatch(text) is not None

    def encode(self, target: tuple[int, int]) -> dict[str, bytes]:
        return {self.label: b"%d,%d" % target}

    def rows(self, targets: Iterable[tuple[int, int] | None]) -> dict[str, NDArray[Any]]:
        point_N2 = np.array([(-1, -7) if point is None else point for point in targets], np.int64).reshape(-1, 2)
        parity_N2 = np.where(point_N2[:, 1:] == -7, -1, point_N2 % 2).astype(np.int8)
        return {"x": point_N2[:, 0].astype(np.int16), "y": point_N2[:, 1].copy(), "parity": parity_N2}

    def has_target(self, targets: Targets) -> NDArray[np.bool_]:
        return targets["y"] != -7

    def num_invalid(self, targets: Targets) -> int:
        return int((targets["x"] < -1).sum())

    @property
    def widths(self) -> dict[str, int]:
        return {"x": 1}

    def outputs(self, cache: CacheConfig, widths: Mapping[str, int]) -> tuple[OutputSpec, ...]:
        return (OutputSpec("x", (widths["x"],), cache.logits),)

    @property
    def roles(self) -> dict[str, str]:
        return {"x": "position"}

    def accumulate(self) -> ErrorSum:
        return ErrorSum()

    def recount(self, targets: Targets, *, mix_group: int, outputs: Iterable[str]) -> ErrorRecount:  # noqa: ARG002
        return ErrorRecount(targets)

    def teacher_metrics(self, statistics: Statistics) -> dict[str, float | None]:
        return {"mean absolute error": statistics.sums["absolute_error"] / statistics.sums["rows"]}


class GridPoint(Point):
    """Its output is a map of one number."""

    name = "grid point"

    def outputs(self, cache: CacheConfig, widths: Mapping[str, int]) -> tuple[OutputSpec, ...]:
        return (OutputSpec("x", (widths["x"], 1, 1), cache.logits),)


TASKS.update({task.name: task for task in (Point, GridPoint)})
