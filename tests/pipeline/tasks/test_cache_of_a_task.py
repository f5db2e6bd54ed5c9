"""A second task, with another output, target and statistic: the same code builds, reads and verifies its cache."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from numpy.typing import NDArray

from pipeline.cache.build.context import BuildContext, current_context
from pipeline.cache.build.header_claim import make_header
from pipeline.cache.build.manifest import publish_manifest
from pipeline.cache.build.part import BusyTime, PartBuild
from pipeline.cache.format.header import read_header
from pipeline.cache.ops.inspect import inspect_cache
from pipeline.cache.read.reader import open_cache
from pipeline.cache.verify import recompute, verify_cache
from pipeline.cache.verify.report import Findings
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
    task_of,
)
from pipeline.teacher.inference import Teacher
from schemas.cache_format import Statistics
from schemas.config import CacheConfig, Config, DataConfig
from tests.pipeline.cache.verify.forge import replace_commit, republish
from tests.pipeline.caches import TinyCache, cache_section, open_tasks, read_commits, shard_urls
from tests.pipeline.conftest import TinyConfig

MISSING = -1


class ErrorSum(StatisticsAccumulator):
    """Σ |score of the teacher − target| over the rows that have a target, and their number."""

    def __init__(self) -> None:
        self._sums = {"rows": 0.0, "absolute_error": 0.0}

    def add(self, outputs: TeacherOutputs, targets: Targets) -> None:
        scored = targets["score"] != MISSING
        errors = np.abs(outputs["score"][scored, 0].astype(np.float64) - targets["score"][scored])
        self._sums["rows"] += float(scored.sum())
        self._sums["absolute_error"] += float(errors.sum())

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
        if name == "score":
            assert exact
            self._sum.add({name: values}, {key: column[rows] for key, column in self._targets.items()})

    def compare(self, stated: Statistics, expect: Callable[[str, object, object], object]) -> None:
        expect(
            "the commit's errors do not match the stored scores", stated.sums, pytest.approx(self._sum.result()["sums"])
        )


class Score(Task):
    """A score from 0 to 100 for each image."""

    name = "score"
    member_content = "a score from 0 to 100 as text"
    max_bytes = 8
    columns = (TargetColumn("score", pa.int32(), MISSING),)
    statistics_fields = ("sums",)

    def settings(self, data: DataConfig) -> dict[str, Any]:
        return {"member": self.member(data)}

    def member(self, data: DataConfig) -> str | None:
        return data.label

    def parse(self, text: bytes, data: DataConfig) -> int:  # noqa: ARG002
        score = self.try_parse(text)
        if score is None:
            raise BadTargetError(self.member_content)
        return score

    def try_parse(self, text: bytes) -> int | None:
        return int(text) if text.isdigit() and int(text) <= 100 else None

    def encode(self, target: int) -> bytes:
        return str(target).encode()

    def rows(self, targets: Iterable[int | None]) -> dict[str, NDArray[Any]]:
        return {"score": np.array([MISSING if score is None else score for score in targets], np.int32)}

    def has_target(self, targets: Targets) -> NDArray[np.bool_]:
        return targets["score"] != MISSING

    def num_invalid(self, targets: Targets, *, num_classes: int) -> int:  # noqa: ARG002
        return int(((targets["score"] < MISSING) | (targets["score"] > 100)).sum())

    def outputs(self, cache: CacheConfig, *, num_classes: int, embedding_dim: int) -> tuple[OutputSpec, ...]:  # noqa: ARG002
        return (OutputSpec("score", 1, cache.logits),)

    def is_output(self, name: str) -> bool:
        return name == "score"

    def accumulate(self) -> ErrorSum:
        return ErrorSum()

    def recount(self, targets: Targets, *, mix_group: int, outputs: Iterable[str]) -> ErrorRecount:  # noqa: ARG002
        return ErrorRecount(targets)

    def teacher_metrics(self, statistics: Statistics) -> dict[str, float | None]:
        return {"mean absolute error": statistics.sums["absolute_error"] / statistics.sums["rows"]}


TASKS[Score.name] = Score()


class ScoreTeacher(Teacher):
    """Its score is the first logit; it stores no logits."""

    def forward(self, *args: Any, **kwargs: Any) -> dict[str, torch.Tensor]:
        outputs = super().forward(*args, **kwargs)
        return {"score": outputs["logits"][:, :1], "embedding": outputs["embedding"]}


def context_of(config: Config) -> BuildContext:
    """Like ``current_context``, for a task that no config may name yet."""
    loaded = current_context(config).teacher
    config = config.model_copy(update={"data": config.data.model_copy(update={"task": Score.name})})
    teacher = ScoreTeacher(
        loaded.loaded, device=loaded.device, precision=loaded.precision, batch_size=loaded.batch_size
    )
    cache = cache_section(config)
    header = make_header(teacher, plan=config.views, cache=cache, data=config.data)
    return BuildContext(config, cache, teacher, header, None, gpus=None).claimed()


@pytest.fixture
def context(tiny_config: TinyConfig, tmp_path: Path) -> BuildContext:
    """Of a cache with two unmixed views of 35 images, finished."""
    config = tiny_config(views={"kind": "crop", "count": 2}, cache={"class_means": "none", "embeddings": "none"})
    context = context_of(config)
    for number, task in enumerate(open_tasks(context.config)):
        (scratch := tmp_path / f"scratch-{number}").mkdir()
        PartBuild(context, task, scratch, BusyTime()).run()
    publish_manifest(context.cache.url, shard_urls(context.config))
    return context


def test_a_cache_of_another_task_has_its_outputs_targets_and_statistics(context: BuildContext) -> None:
    url = context.cache.url
    header, cache = read_header(url), open_cache(url)
    assert task_of(header.data).name == "score"
    assert [(output.name, output.shape) for output in header.outputs] == [("score", (1,))]
    errors: list[float] = []
    for shard in cache.shards:
        score_N = cache.index(shard).targets["score"]
        for view in range(2):
            columns = cache.view(shard.shard_id, view)
            assert columns.logits_NK is columns.embedding_ND is None
            errors += np.abs(columns.outputs["score"].decode()[:, 0].astype(np.float64) - score_N).tolist()
    statistics = cache.manifest.statistics
    assert len(errors) == 70
    assert statistics.sums == pytest.approx({"rows": 70, "absolute_error": sum(errors)})
    assert (statistics.labelled, statistics.class_counts, statistics.fidelity_rows > 0) == (0, {}, True)
    report = inspect_cache(url)
    assert (report.teacher_top1, report.outputs) == (None, {"score": "dense [1], 4 bytes a row"})


def test_a_cache_of_another_task_is_verified_by_its_own_recount(context: BuildContext) -> None:
    url = context.cache.url
    assert verify_cache(url).problems == []
    findings = Findings()
    recomputed = recompute(url, context, findings, num_rows=1000, shard_urls={})
    assert (findings.problems, recomputed.rows, recomputed.identical) == ([], 70, 70)
    commit = read_commits(url)[0]
    sums = {**commit.statistics.sums, "absolute_error": commit.statistics.sums["absolute_error"] + 1}
    statistics = commit.statistics.model_copy(update={"sums": sums})
    replace_commit(TinyCache(url, context.config), commit.model_copy(update={"statistics": statistics}))
    republish(TinyCache(url, context.config))
    (problem,) = verify_cache(url).problems
    assert problem.file == commit.part.path
