"""What the metrics of one head have in common: their keys, titles and what they need; and sums of several heads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.nn.functional import cosine_similarity

from pipeline.student.distributed import DistributedContext
from pipeline.student.evaluation.metrics.metric_set import (
    EvaluationScope,
    Metric,
    MetricSums,
    Outputs,
    RowMeans,
)
from pipeline.tasks import EMBEDDING, Targets


@dataclass(frozen=True, slots=True)
class Head:
    """A head of student and teacher, and the target that it predicts.

    Attributes:
        name: None: the only head, whose metrics have no prefix.
        output: the name of its logits.
        target: the column of its labels.
        num_classes: K; None: not known yet, so nothing can be measured.
    """

    name: str | None
    output: str
    target: str
    num_classes: int | None

    def key(self, metric: str) -> str:
        return metric if self.name is None else f"{self.name}/{metric}"

    def metric(self, key: str, title: str, *needs: str, teacher_key: str | None = None, **fields: Any) -> Metric:
        """A metric of this head. ``needs`` contains ``student`` if it reads the student's logits."""
        return Metric(
            key=self.key(key),
            title=title if self.name is None else f"{title} ({self.name})",
            needs=tuple(self.output if need == "student" else need for need in needs),
            teacher_outputs=(self.output,) if "teacher" in needs else (),
            teacher_key=None if teacher_key is None else self.key(teacher_key),
            **fields,
        )

    def is_measured(self, scope: EvaluationScope) -> bool:
        return self.output not in scope.untrained


class CombinedSums(MetricSums):
    """Sums of several parts, such as one for each head, whose keys differ."""

    def __init__(self, parts: Sequence[MetricSums]) -> None:
        self._parts = parts

    def add(self, student: Outputs, teacher: Outputs | None, targets: Targets) -> None:
        for part in self._parts:
            part.add(student, teacher, targets)

    def finish(self, distributed: DistributedContext) -> dict[str, float | None]:
        return {key: value for part in self._parts for key, value in part.finish(distributed).items()}

    def by_row(self) -> dict[str, Tensor]:
        return {key: value_N for part in self._parts for key, value_N in part.by_row().items()}

    def per_class(self) -> dict[str, list[float | None]]:
        return {key: values for part in self._parts for key, values in part.per_class().items()}


COSINE = Metric(
    # Mean over the rows of the cosine between the embeddings of student and teacher, through the projector of the
    # first loss that has one; for students that learn from embeddings.
    key="cosine",
    title="cosine to the teacher",
    unit="none",
    needs=("teacher", "projector"),
    teacher_outputs=(EMBEDDING,),
)


class CosineSums(MetricSums):
    """``COSINE``, which no head has."""

    def __init__(self, scope: EvaluationScope) -> None:
        self._has_projector = scope.projector is not None
        self._means = RowMeans((COSINE.key,))

    def add(self, student: Outputs, teacher: Outputs | None, targets: Targets) -> None:  # noqa: ARG002
        if teacher is not None and self._has_projector:
            cosine_N = cosine_similarity(student[EMBEDDING].double(), teacher[EMBEDDING].double())
            self._means.add(COSINE.key, float(cosine_N.sum()), len(cosine_N))

    def finish(self, distributed: DistributedContext) -> dict[str, float | None]:
        return self._means.over_ranks(distributed)
