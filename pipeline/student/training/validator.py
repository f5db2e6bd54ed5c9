"""Evaluations of a student while it trains, on the validation shards of its config."""

from __future__ import annotations

import time
from typing import Any

from pipeline.core.errors import ConfigError, EvaluationError, TrainingError
from pipeline.models import EmbeddingModel
from pipeline.student.data.sources import RowSource
from pipeline.student.evaluation.compared_teacher import teacher_for_agreement
from pipeline.student.evaluation.evaluator import PrecomputedTeacher, build_evaluator
from pipeline.student.evaluation.metrics import Evaluation, EvaluationScope, metrics_of
from pipeline.student.evaluation.validation import ValidationSamples, read_validation, record_validation
from pipeline.student.supervision.overlap import SeenImages
from pipeline.student.supervision.standardization import standardizer_of
from pipeline.student.training.run_log import Emit
from pipeline.student.training.setup import TrainingSetup
from pipeline.tasks import DOMAIN, TaskHead, task_of
from pipeline.teacher.inference import Teacher

_NEEDS = {
    "targets": "their labels",
    DOMAIN: "their domains",
    "teacher": "a teacher to compare with (train.eval_agreement)",
    "projector": "a loss on embeddings",
    "reference": "a reference (train.eval_reference)",
    "probe": "a reference (train.eval_reference)",
}
"""What a metric may need, for messages."""


class Validator:
    """Without ``data.val_shards`` it evaluates nothing."""

    def __init__(self, setup: TrainingSetup, emit: Emit) -> None:
        config, spec = setup.config, setup.spec
        self._config, self._spec, self._distributed, self._emit = config, spec, setup.distributed, emit
        self._input_spec, self._teachers = setup.student.input_spec, setup.supervision.teachers
        self._scope, self._total_steps = _scope(setup), setup.total_steps
        self._student = setup.student.module.model
        self._metrics = metrics_of(spec.data, config.train.best)
        self._evaluator = None
        if config.data.val_shards is not None:
            self._evaluator = build_evaluator(
                config.data.val_shards,
                spec.data,
                spec.student_plan,
                setup.distributed,
                num_threads=config.ray.cpus_per_worker,
                reference=config.train.eval_reference,
            )
        self._samples: ValidationSamples | None = None
        self._teacher: Teacher | PrecomputedTeacher | None = None
        self._compared_with_training = False

    @property
    def is_enabled(self) -> bool:
        return self._evaluator is not None

    def prepare(self, run_url: str) -> None:
        """Reads and checks the validation samples, and the teacher that evaluations compare with. Every rank calls it.

        Raises:
            ShardError: a validation shard is damaged, a label cannot be used, or ``data.bad_samples`` refuses a sample.
            ConfigError: the shards hold no images, or ``train.best`` cannot be measured on them.
            StillroomError: the weights of the cache's teacher cannot be read, or are not those that were cached.
        """
        if self._evaluator is None:
            return
        began = time.monotonic()
        samples = self._samples = read_validation(self._evaluator, run_url)
        if samples.was_read:
            seconds = time.monotonic() - began
            self._emit("validation", samples=samples.samples, shards=len(samples.stamps), read_s=round(seconds, 3))
        if self._evaluator.reference is not None:
            # Read once before the first step, so that a bad sample cannot stop the training later.
            self._evaluator.reference.embed(self._student, self._input_spec, fits_probe=False)
        self._teacher = self._compared_teacher()
        self._check_best(samples)

    def _check_best(self, samples: ValidationSamples) -> None:
        """
        Raises:
            ConfigError: the metric of ``train.best`` cannot be measured on these samples.
        """
        if self._config.train.best is None:
            return
        metric = self._metrics.main
        columns = {head.column for head in task_of(self._spec.data).heads if _is_of(metric.key, head)}
        num_labelled = sum(samples.by_column[column] for column in columns) if columns else samples.labelled
        counts = {"targets": num_labelled, DOMAIN: samples.by_column.get(DOMAIN, 0)}
        missing = self._missing() | {need for need, count in counts.items() if not count}
        if absent := {_NEEDS.get(need, f"a loss that reads {need}"): None for need in metric.needs if need in missing}:
            raise ConfigError(
                "the metric that selects the best checkpoint cannot be measured",
                code="train.best-not-measured",
                where="train.best",
                got=f"{metric.key} of {samples.images} images, without {' and without '.join(absent)}",
                next_step="name another metric in train.best, or null for the main metric of the task",
            )

    def _compared_teacher(self) -> Teacher | PrecomputedTeacher | None:
        """The online teacher, or the outputs of a cache's teacher, whose network is released again."""
        assert self._evaluator is not None
        expected = self._config.train.eval_agreement
        if expected is False:
            return None
        if self._teachers or not expected:
            return self._teachers[0] if len(self._teachers) == 1 else None
        teacher = teacher_for_agreement(
            self._config, self._spec, self._distributed.device, or_else="set train.eval_agreement=null"
        )
        assert teacher is not None, "ensured by check_config"
        began = time.monotonic()
        outputs = self._evaluator.precompute(teacher, scope=self._scope)
        seconds = time.monotonic() - began
        self._emit("validation-teacher", size_bytes=outputs.size_bytes, seconds=round(seconds, 3))
        return outputs

    def record_samples(self, run_url: str) -> None:
        """Later starts of the run need not read the samples again."""
        if self._samples is not None and self._samples.was_read:
            record_validation(self._samples, run_url)

    def warnings(self) -> list[str]:
        if self._samples is None:
            return []
        heads = task_of(self._spec.data).widths
        untrained = [name for name in heads if name in self._scope.untrained]
        texts = self._samples.warnings(
            head_trained=not heads or len(untrained) < len(heads),
            untrained=untrained,
            best_by=self._best_without_labels(),
        )
        if not heads and self._samples.labelled and self._best_by(set()) is None:
            texts.append(
                "validation: nothing is measured, and there will be no checkpoints/best.pt; train.eval_agreement=true "
                "measures the cosine to the teacher of a cache, train.eval_reference=SHARDS the accuracy of neighbours"
            )
        return texts

    def _missing(self) -> set[str]:
        """What metrics may need and do not get, but for targets and domains."""
        missing = self._scope.missing(teacher=self._teacher is not None)
        has_reference = self._evaluator is not None and self._evaluator.reference is not None
        return missing - {"reference", "probe"} if has_reference else missing

    def _best_without_labels(self) -> str | None:
        """The metric that the best checkpoint follows where it cannot be accuracy; None: there is none."""
        return self._best_by({"targets"})

    def _best_by(self, missing: set[str]) -> str | None:
        """The metric that the best checkpoint follows where these are missing besides what evaluations lack."""
        metric = self._metrics.selected_without(missing | self._missing())
        return None if metric is None else metric.title

    def evaluate(self, model: EmbeddingModel, source: RowSource, *, step: int) -> Evaluation:
        """Evaluates the weights after ``step`` steps. Every rank calls it, if the validator is enabled.

        The first evaluation also compares the validation images with the training rows, and warns of an overlap.

        Raises:
            TrainingError: the student's outputs are not finite.
        """
        assert self._evaluator is not None
        seen = SeenImages()
        try:
            evaluation = self._evaluator(
                model,
                self._input_spec,
                self._teacher,
                scope=self._scope,
                on_index=seen.add,
                is_last=step >= self._total_steps,
            )
        except EvaluationError as error:
            # The student's weights are finite and its outputs are not: this began in earlier steps.
            raise TrainingError(
                f"{error.what} in the evaluation after step {step - 1}",
                code="train.not-finite-evaluation" if error.code == "evaluate.student-not-finite" else error.code,
                where=error.where,
                got=error.got,
                next_step=error.next_step,
            ) from error
        if not self._compared_with_training:
            self._compared_with_training = True
            overlap = seen.overlap(source, self._distributed)
            if overlap.num_rows:
                self._emit("warning", text=overlap.warning())
        return evaluation


def _is_of(key: str, head: TaskHead) -> bool:
    return head.name is None or head.name in key.split("/")[:-1]


def _scope(setup: TrainingSetup) -> EvaluationScope:
    """What evaluations measure besides what labels allow."""
    terms, one_teacher = setup.loss.projected, len(setup.supervision.teacher_dims) == 1
    projectors: Any = setup.student.module.projectors[terms[0]] if terms and one_teacher else [None]
    standardizer = standardizer_of(setup.loss, setup.supervision.standardizers)
    return EvaluationScope(setup.untrained, projectors[0], standardizer)
