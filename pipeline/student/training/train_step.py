"""One training step: forward, loss and backward of each micro-batch, then one update of the weights."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from pipeline.augment.pixels import to_input
from pipeline.augment.random_bits import key_of
from pipeline.cache.format.codec import LinearHead
from pipeline.models import forward_with_maps
from pipeline.student.data.batch import Batch
from pipeline.student.data.teacher_outputs import TeacherOutputs
from pipeline.student.losses import BatchShare, LossInputs, TeacherInputs
from pipeline.student.networks.student import StudentOutputs
from pipeline.student.training.gradients import TermGradients, with_row_weights
from pipeline.student.training.micro_batches import combined, micro_batches, num_micro_batches
from pipeline.student.training.optimizer_step import Update
from pipeline.student.training.setup import TrainingSetup, input_size
from pipeline.tasks import EMBEDDING
from pipeline.tasks.classification import LOGITS
from pipeline.teacher.inference import Teacher
from pipeline.teacher.numerics import autocast


@dataclass(frozen=True, slots=True)
class StepResult:
    """The total loss and its terms, 0-d on the device, and the update that they led to.

    Attributes:
        gradient_norms: by term, see ``TermGradients``; empty in a step that does not measure them.
    """

    total: Tensor
    terms: Mapping[str, Tensor]
    update: Update
    gradient_norms: Mapping[str, Tensor]


class TrainStep:
    """``step(batch)`` trains on one batch, on the device."""

    def __init__(self, setup: TrainingSetup) -> None:
        self.loss, self.distributed = setup.loss, setup.distributed
        self.student, self.optimizer_step = setup.student.module, setup.optimizer_step
        self.module: nn.Module = self.student
        self._train, self._supervision = setup.config.train, setup.supervision
        self._channels_last, self._row_weights = setup.student.channels_last, setup.row_weights
        self._targets = [column for column in self._supervision.source.task.columns if column.name in self.loss.targets]
        self._may_lack_targets = setup.config.data.missing_labels == "ignore"
        self._mean_C, self._std_C = (
            torch.tensor(values, device=self.distributed.device)
            for values in (setup.student.input_spec.mean, setup.student.input_spec.std)
        )

    def wrap(self) -> None:
        """Wraps the student for several ranks, and compiles it if ``train.compile``. The weights must be loaded."""
        if self.distributed.size > 1:
            self.module = DistributedDataParallel(self.student)
        if self._train.compile:
            # In place, so that the names in a state dict do not change.
            self.module.compile()

    def __call__(self, batch: Batch) -> StepResult:
        train = self._train
        chunks = micro_batches(
            batch, num_micro_batches(train.accumulate, batch.num_rows_global, train.global_batch_size)
        )
        num_labelled_global = self._num_labelled_global(batch)
        losses: list[tuple[Tensor, dict[str, Tensor]]] = []
        every_steps = train.gradient_norms_every_steps
        measures = every_steps is not None and batch.step % every_steps == 0
        gradients = TermGradients(self.distributed) if measures else None
        for number, chunk in enumerate(chunks):
            with self._gradient_sync(last=number == len(chunks) - 1):
                losses.append(self._accumulate(chunk, number, num_labelled_global, gradients))
        total, terms = combined(losses, [chunk.num_rows for chunk in chunks])
        norms = {} if gradients is None else gradients.norms()
        return StepResult(total, terms, self.optimizer_step.step(), norms)

    def _gradient_sync(self, *, last: bool) -> AbstractContextManager[None]:
        """Ranks exchange gradients once a step, in its last backward pass."""
        if last or not isinstance(self.module, DistributedDataParallel):
            return nullcontext()
        return self.module.no_sync()

    def _accumulate(
        self,
        batch: Batch,
        number: int,
        num_labelled_global: Mapping[str, int | Tensor],
        gradients: TermGradients | None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Adds the gradients of one micro-batch. Returns its part of the total loss, and its terms."""
        # Dropout must not depend on what ran before, or a resumed run would differ from an undisturbed one.
        key = key_of("dropout", self._train.seed, batch.step, self.distributed.rank, *([number] if number else []))
        torch.manual_seed(int(key[0] >> 1))
        student = self.forward(self._images(batch))
        inputs = self.loss_inputs(student, batch)
        share = self._share(batch, num_labelled_global)
        summands, terms = self.loss.summands(inputs, share, epoch=batch.epoch)
        if gradients is not None:
            gradients.add(summands, student.outputs[EMBEDDING], scale=self.optimizer_step.scale)
        total = self.loss.total(inputs, summands)
        self.optimizer_step.backward(total)
        return total.detach(), terms

    def _images(self, batch: Batch) -> Tensor:
        """The student's input, fp32 [B,3,S,S]: mixed and normalised."""
        images = to_input(
            batch.pixels_BCHW,
            mean_C=self._mean_C,
            std_C=self._std_C,
            partner_B=batch.partner_B,
            lambda_B=batch.lambda_B,
            cutmix_box_B4=batch.cutmix_box_B4,
        )
        # A convolution takes the layout of its input, whatever that of its weights.
        return images if self._channels_last else images.contiguous()

    def forward(self, images: Tensor) -> StudentOutputs:
        with autocast(self.distributed.device, self._train.precision):
            student: StudentOutputs = self.module(images)
        return student

    def loss_inputs(self, student: StudentOutputs, batch: Batch) -> LossInputs:
        """The outputs of the student and of each teacher on one batch."""
        if self._row_weights is not None:
            student = with_row_weights(student, self._row_weights.of_rows(batch))
        return LossInputs(
            outputs=student.outputs,
            targets=batch.targets,
            teachers=tuple(
                TeacherInputs(
                    outputs=teacher_outputs,
                    weight=self._supervision.weights[number],
                    standardized=self._standardized(number, teacher_outputs),
                    projected={key: by_teacher[number] for key, by_teacher in student.projected.items()},
                    class_directions=self._supervision.class_directions[number],
                    student_maps=student.maps or None,
                    teacher_maps=teacher_maps or None,
                )
                for number, (teacher_outputs, teacher_maps) in enumerate(self._teacher_outputs(batch))
            ),
            partner_B=batch.partner_B,
            lambda_B=batch.lambda_B,
            log_priors=self._supervision.log_priors,
            sum_over_ranks=self.distributed.sum_with_gradient,
            join_over_ranks=self.distributed.join_with_gradient,
        )

    def _standardized(self, number: int, outputs: TeacherOutputs) -> dict[str, Tensor]:
        standardizer, embedding_BD = self._supervision.standardizers[number], outputs.at(EMBEDDING)
        return {} if standardizer is None or embedding_BD is None else {EMBEDDING: standardizer(embedding_BD)}

    def _teacher_outputs(self, batch: Batch) -> list[tuple[TeacherOutputs, tuple[Tensor, ...]]]:
        """The outputs of each teacher, online or cached, and the feature maps that ``review_kd`` compares."""
        online = [
            self._infer(teacher, head, batch)
            for teacher, head in zip(self._supervision.teachers, self._supervision.heads, strict=True)
        ]
        return online or [(outputs, ()) for outputs in batch.teacher_outputs]

    def _infer(
        self, teacher: Teacher, head: LinearHead | None, batch: Batch
    ) -> tuple[TeacherOutputs, tuple[Tensor, ...]]:
        review = self.student.review
        pixels_BCHW = batch.teacher_pixels.get(input_size(teacher.loaded.input), batch.pixels_BCHW)
        mixing = batch.partner_B, batch.lambda_B, batch.cutmix_box_B4
        observed = () if review is None else review.plan.teacher
        outputs, maps = forward_with_maps(observed, teacher.forward, pixels_BCHW, *mixing)
        levels = () if review is None else review.plan.levels(maps, outputs[EMBEDDING])
        if head is not None:
            outputs = {**outputs, LOGITS: head.logits_of_exact(outputs[EMBEDDING])}
        return TeacherOutputs({(name, None): tensor for name, tensor in outputs.items()}), levels

    def _num_labelled(self, batch: Batch) -> dict[str, Tensor]:
        """0-d, by the losses' targets: rows that have the target. A mixed row needs its partner's too."""
        counts: dict[str, Tensor] = {}
        for column in self._targets:
            target_B = batch.targets[column.name]
            has_target_B = (target_B != column.missing).reshape(len(target_B), -1).any(1)
            if batch.partner_B is not None:
                has_target_B = has_target_B & has_target_B[batch.partner_B]
            counts[column.name] = has_target_B.sum()
        return counts

    def _num_labelled_global(self, batch: Batch) -> Mapping[str, int | Tensor]:
        """The same over all ranks; every row where none may lack a target."""
        names = [column.name for column in self._targets]
        if not names or not self._may_lack_targets:
            return dict.fromkeys(names, batch.num_rows_global)
        counts = self.distributed.sum(torch.stack([*self._num_labelled(batch).values()]))
        return dict(zip(names, counts.unbind(), strict=True))

    def _share(self, batch: Batch, num_labelled_global: Mapping[str, int | Tensor]) -> BatchShare:
        return BatchShare(
            world_size=self.distributed.size,
            num_rows=batch.num_rows,
            num_rows_global=batch.num_rows_global,
            num_labelled=self._num_labelled(batch),
            num_labelled_global=num_labelled_global,
        )
