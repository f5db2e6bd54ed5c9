"""Metrics of an evaluation: accuracy and calibration on labels, agreement with a teacher, summed over ranks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity, kl_div

from pipeline.core.errors import EvaluationError
from pipeline.student.distributed import DistributedContext
from pipeline.tasks.classification import class_ranks, predicted_classes

if TYPE_CHECKING:
    from torchmetrics.classification import MulticlassCalibrationError

_ECE_BINS = 15
_NUM_NAMED = 3
_SELECTION_ORDER = ("top1", "agreement", "cosine")


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Metrics of a student; None for a metric that was not measured.

    Attributes:
        top1, top5: shares of the labelled rows, by the rank of ``class_ranks``.
        ece: expected calibration error (Guo 2017): mean over the labelled rows of |accuracy - confidence| in 15 bins.
        agreement: share of the rows for which student and teacher predict the same class.
        kl: mean over the rows of KL(teacher ‖ student) at T = 1, in nats.
        teacher_top1: share of the labelled rows.
        cosine: mean over the rows of the cosine between the embeddings of student and teacher, through the projector of
            the first loss that has one; for students that learn from embeddings.
        head_trained: False: no loss read the student's logits, and its head began with random weights. Its logits are
            then not measured.
    """

    num_rows: int
    top1: float | None
    top5: float | None
    ece: float | None
    agreement: float | None
    kl: float | None
    teacher_top1: float | None
    cosine: float | None = None
    head_trained: bool = True

    def as_dict(self) -> dict[str, float | int | None]:
        return asdict(self)

    def measured(self) -> dict[str, float | int | None]:
        """Only the metrics."""
        return {name: value for name, value in self.as_dict().items() if name != "head_trained"}


@dataclass(frozen=True, slots=True)
class Score:
    """The metric that selects the best checkpoint; higher is better."""

    metric: str
    value: float

    @classmethod
    def of(cls, evaluation: Mapping[str, float | int | None]) -> Score | None:
        """Top-1; without labels the agreement with the teacher; without a trained head the cosine to the teacher.

        None if none of these was measured.
        """
        values = ((name, evaluation.get(name)) for name in _SELECTION_ORDER)
        return next((cls(name, value) for name, value in values if value is not None), None)

    def beats(self, best: Score | None) -> bool:
        """Equal values are no improvement; another metric starts a new comparison."""
        return best is None or best.metric != self.metric or self.value > best.value


@dataclass(frozen=True, slots=True)
class EvaluationScope:
    """Which metrics apply to a student.

    Attributes:
        head_trained: see ``Evaluation``.
        projector: from the student's embedding to the teacher's width, if a loss compares embeddings.
    """

    head_trained: bool = True
    projector: nn.Module | None = None


@dataclass(frozen=True, slots=True)
class NetworkOutputs:
    """Outputs of one network for N images, fp32 on the CPU; the student's embedding is in the teacher's width."""

    logits_NK: Tensor
    embedding_ND: Tensor

    @property
    def is_finite_N(self) -> Tensor:
        return self.logits_NK.isfinite().all(1) & self.embedding_ND.isfinite().all(1)


@dataclass(slots=True)
class MetricSums:
    """Sums of the metrics over the images of one rank."""

    scope: EvaluationScope
    calibration: MulticlassCalibrationError
    rows: int = 0
    labelled: int = 0
    top1: int = 0
    top5: int = 0
    agreed: int = 0
    teacher_top1: int = 0
    kl: float = 0.0
    cosine: float = 0.0

    @classmethod
    def empty(cls, scope: EvaluationScope, num_classes: int, device: torch.device) -> MetricSums:
        # The import takes seconds, which only a process that evaluates should pay.
        from torchmetrics.classification import MulticlassCalibrationError

        return cls(scope, MulticlassCalibrationError(num_classes, n_bins=_ECE_BINS, norm="l1").to(device))

    def add(self, student: NetworkOutputs, teacher: NetworkOutputs | None, label_N: Tensor) -> None:
        """Adds rows, whose outputs must be finite."""
        self.rows += len(label_N)
        self.labelled += int((label_N >= 0).sum())
        if self.scope.head_trained:
            self._add_accuracy(student.logits_NK, label_N)
        if teacher is not None:
            class_N = predicted_classes(teacher.logits_NK.numpy())
            self.teacher_top1 += int((class_N == label_N.numpy()).sum())
            self._add_agreement(student, teacher, class_N)

    def _add_accuracy(self, logits_NK: Tensor, label_N: Tensor) -> None:
        is_labelled_N = label_N >= 0
        logits_MK, label_M = logits_NK[is_labelled_N], label_N[is_labelled_N].long()
        rank_M = class_ranks(logits_MK.numpy(), label_M.numpy())
        self.top1 += int((rank_M < 1).sum())
        self.top5 += int((rank_M < 5).sum())
        if len(label_M):
            # torchmetrics would take logits that lie in [0, 1] for probabilities.
            device = self.calibration.device
            self.calibration.update(logits_MK.softmax(1).to(device), label_M.to(device))

    def _add_agreement(self, student: NetworkOutputs, teacher: NetworkOutputs, class_N: NDArray[np.int64]) -> None:
        if self.scope.head_trained:
            self.agreed += int((predicted_classes(student.logits_NK.numpy()) == class_N).sum())
            log_p, log_q = (outputs.logits_NK.double().log_softmax(1) for outputs in (teacher, student))
            self.kl += float(kl_div(log_q, log_p, reduction="sum", log_target=True))
        if self.scope.projector is not None:
            self.cosine += float(cosine_similarity(student.embedding_ND.double(), teacher.embedding_ND.double()).sum())

    def finish(self, distributed: DistributedContext, *, compared: bool) -> Evaluation | None:
        """The metrics over all ranks, each of which must call this; None if no rank added a row."""
        sums = [self.rows, self.labelled, self.top1, self.top5, self.agreed, self.teacher_top1, self.kl, self.cosine]
        total = distributed.sum(torch.tensor(sums, dtype=torch.float64, device=distributed.device)).tolist()
        rows, labelled, top1, top5, agreed, teacher_top1, kl, cosine = total
        if not rows:
            return None
        head_trained = self.scope.head_trained
        has_accuracy = head_trained and labelled > 0
        return Evaluation(
            num_rows=int(rows),
            top1=top1 / labelled if has_accuracy else None,
            top5=top5 / labelled if has_accuracy else None,
            # torchmetrics gathers the confidences of all ranks, also of ranks without any.
            ece=float(self.calibration.compute()) if has_accuracy else None,
            agreement=agreed / rows if compared and head_trained else None,
            kl=kl / rows if compared and head_trained else None,
            teacher_top1=teacher_top1 / labelled if compared and labelled else None,
            cosine=cosine / rows if compared and self.scope.projector is not None else None,
            head_trained=head_trained,
        )


@dataclass(slots=True)
class FiniteRows:
    """Finds the rows of one shard whose outputs are not finite, and therefore have no rank, confidence or agreement."""

    rows: int = 0
    bad_keys: dict[str, list[str]] = field(default_factory=lambda: {"student": [], "teacher": []})
    """Sample keys by network."""

    def add(self, keys: Sequence[str], student: NetworkOutputs, teacher: NetworkOutputs | None) -> bool:
        """Returns whether all outputs so far are finite."""
        self.rows += len(keys)
        for name, outputs in (("student", student), ("teacher", teacher)):
            if outputs is not None:
                bad_rows: list[int] = (~outputs.is_finite_N).nonzero().flatten().tolist()
                self.bad_keys[name].extend(keys[row] for row in bad_rows)
        return not any(self.bad_keys.values())

    def check(self, *, where: str) -> None:
        """
        Raises:
            EvaluationError: there are such rows.
        """
        for name, keys in self.bad_keys.items():
            if keys:
                raise EvaluationError(
                    f"the {name}'s outputs are not finite",
                    code="evaluate.student-not-finite" if name == "student" else "evaluate.teacher-not-finite",
                    where=f"{where}, first keys {', '.join(keys[:_NUM_NAMED])}",
                    got=f"NaN or infinity in {len(keys)} of {self.rows} rows",
                    next_step="train again with a lower train.lr or with train.clip_norm, in another run.url"
                    if name == "student"
                    else "set teacher.precision=fp32, or check teacher.weights",
                )
