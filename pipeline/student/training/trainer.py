"""Train one student: the same loop for a cached teacher, an online one, or none; for one process or many ranks."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, closing, nullcontext
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from pipeline.augment.pixels import to_input
from pipeline.augment.random_bits import key_of
from pipeline.core.errors import ConfigError, EvaluationError, TrainingError
from pipeline.core.hashing import short
from pipeline.core.redaction import redact
from pipeline.models import (
    InputSpec,
    LoadedModel,
    forward_with_maps,
    load_model,
    move_to_device,
    register_map_hooks,
    unsafe_in_channels_last,
)
from pipeline.models.sources.torchvision import input_transform
from pipeline.models.weights import stored_transform_input
from pipeline.student.data.dataset import Batch, InputSize, StepDataset, load_batches
from pipeline.student.data.loader import over_budget
from pipeline.student.data.order import TrainingOrder, order_of
from pipeline.student.data.shared_memory import check_loaders
from pipeline.student.data.sources import RowSource, check_any_labelled, index_url, open_cached, open_indexed
from pipeline.student.data.teacher_outputs import TeacherOutputs
from pipeline.student.distributed import DistributedContext
from pipeline.student.evaluation.evaluator import (
    Evaluation,
    Evaluator,
    PrecomputedTeacher,
    Score,
    Subject,
    make_evaluator,
    teacher_for_agreement,
)
from pipeline.student.evaluation.finite import FiniteWeights
from pipeline.student.evaluation.loaded_run import head_is_trained
from pipeline.student.evaluation.validation import ValidationSamples, read_validation, record_validation
from pipeline.student.losses import BatchShare, ClassDirections, CompositeLoss, LossInputs, TeacherInputs
from pipeline.student.losses.arithmetic import is_labelled
from pipeline.student.networks.freeze import freeze
from pipeline.student.networks.review import Review, ReviewPlan, plan_review, review_section
from pipeline.student.networks.student import Student, StudentOutputs
from pipeline.student.run import checkpoint
from pipeline.student.run.metrics import MetricsFile, StepLog, published_evaluation
from pipeline.student.supervision.canaries import CanaryReport, check_canaries
from pipeline.student.supervision.class_means import cached_means, online_means
from pipeline.student.supervision.fidelity_warnings import fidelity_warnings
from pipeline.student.supervision.loss_warnings import advice
from pipeline.student.supervision.overlap import SeenImages
from pipeline.student.supervision.spec import SupervisionSpec, asked_sizes, lesson_facts
from pipeline.student.training.config_checks import check_caches_serve, check_config, check_means_serve
from pipeline.student.training.micro_batches import combined, micro_batches, num_pieces, smallest_batch
from pipeline.student.training.optimizer_step import OptimizerStep
from pipeline.student.training.throughput import ThroughputMeter
from pipeline.student.training.torch_switches import check_compiler, demand_workspace, deterministic, killed_loaders
from pipeline.teacher.inference import Teacher, load_teacher
from pipeline.teacher.numerics import autocast, pin_numerics, retain_freed_memory
from schemas.config import Config

Report = Callable[[dict[str, Any]], None]
_FLUSH_STEPS = 50
_NUM_NAMED = 3


def _quiet(_: dict[str, Any]) -> None: ...


@dataclass(frozen=True, slots=True)
class Supervision:
    """What the student learns from: rows, their views, and the teachers in whichever form they are there."""

    facts: SupervisionSpec
    source: RowSource
    teachers: tuple[Teacher, ...]
    """Those who are asked online."""
    class_directions: tuple[ClassDirections | None, ...]
    """One a teacher, where the loss needs it."""
    teacher_dims: tuple[int, ...]
    """Widths of the teachers' embeddings."""
    canaries: CanaryReport = field(default_factory=CanaryReport)


def train(config: Config, distributed: DistributedContext | None = None, report: Report = _quiet) -> dict[str, Any]:
    """Trains the student of a config to its end, from wherever its run stands. Returns the run's summary.

    Every rank calls it with the same config; rank 0 writes and reports. Each rank checks everything by itself, so that
    what is wrong stops them all and none waits for another. A finished run is left as it is.

    Raises:
        StillroomError: bad input (config, shards, cache), or a loss that is not finite.
    """
    distributed = distributed or DistributedContext()
    run_url = check_config(config)
    checkpoint.check_begun(run_url, config)
    finished = checkpoint.read_summary(run_url)
    if finished is not None:
        if distributed.is_main_rank:
            report({"kind": "finished", "run": run_url, **finished})
        return finished
    pin_numerics(config.ray.cpus_per_worker)
    retain_freed_memory()
    if config.train.deterministic:
        demand_workspace()
    trainer = _begin(config, distributed, report)
    try:
        with deterministic(config.train.deterministic), killed_loaders():
            return trainer.run()
    finally:
        trainer.close()


def _begin(config: Config, distributed: DistributedContext, report: Report) -> Trainer:
    """A trainer on the state of its caches that counts for this run. Every rank calls it.

    The run is claimed only now that everything is checked: a refused config leaves none behind.
    """
    trainer = Trainer(config, distributed, report)
    try:
        validation = trainer.read_validation()
        compared = trainer.compared_teacher()
        checkpoint.claim_run(trainer.run_url, config)
        opened = tuple(cache.manifest_bytes for cache in trainer.supervision.facts.opened)
        pinned = checkpoint.pin_manifests(trainer.run_url, opened)
    except BaseException:
        trainer.close()
        raise
    if pinned != opened:
        # Another rank opened a cache before or after it was extended, and was first to pin what it saw.
        trainer.close()
        trainer = Trainer(config, distributed, report)
    trainer.validation, trainer.compared = validation, compared
    return trainer


def open_supervision(config: Config, loss: CompositeLoss, device: torch.device) -> Supervision:
    """Opens what the config says the student learns from, and checks that it can teach what the loss asks.

    Raises:
        ConfigError: a loss needs what this teacher mode does not offer, or labels that are missing.
        CacheError: the cache is not usable, or this machine makes other pixels than the teacher saw.
    """
    facts = lesson_facts(config)
    check_caches_serve(loss, facts.caches)
    check_means_serve(config, loss, facts)
    if facts.caches:
        return _cached_supervision(loss, facts, device)
    source = open_indexed(index_url(config), facts.data, facts.plan)
    if _refuses_unlabelled(config, loss):
        source.check_labelled()
    _check_labels(loss, source, facts)
    if config.teacher.mode == "none":
        return Supervision(facts, source, (), (), ())
    return _online_supervision(config, loss, facts, source, device)


def _refuses_unlabelled(config: Config, loss: CompositeLoss) -> bool:
    return loss.needs_labels and config.data.missing_labels == "refuse"


def _check_labels(loss: CompositeLoss, source: RowSource, facts: SupervisionSpec) -> None:
    if loss.needs_labels:
        check_any_labelled(source, facts.data)


def _online_supervision(
    config: Config, loss: CompositeLoss, facts: SupervisionSpec, source: RowSource, device: torch.device
) -> Supervision:
    asked = config.teacher.models
    teachers = tuple(
        load_teacher(section, num_classes=facts.num_classes, size=size, device=device, where=name)
        for (name, section), size in zip(asked.items(), asked_sizes(config), strict=True)
    )
    directions = tuple(
        ClassDirections.of(online_means(cache, teacher, source, section=name).to(device))
        if cache is not None and loss.needs_class_means
        else None
        for name, cache, teacher in zip(asked, facts.means_caches, teachers, strict=True)
    )
    widths = tuple(teacher.module.embedding_dim for teacher in teachers)
    return Supervision(facts, source, teachers, directions, widths)


def _cached_supervision(loss: CompositeLoss, facts: SupervisionSpec, device: torch.device) -> Supervision:
    source = open_cached(facts.caches, facts.data, with_embeddings=loss.needs_teacher_embedding)
    _check_labels(loss, source, facts)
    # On every rank: each may run on another machine, with pixels of its own.
    canaries = check_canaries(source, max_pixels=facts.data.max_pixels, allowed_levels=facts.data.allow_pixel_drift)
    directions = tuple(
        ClassDirections.of(cached_means(cache, source).to(device)) if loss.needs_class_means else None
        for cache in facts.caches
    )
    widths = tuple(cache.header.embedding_dim for cache in facts.caches)
    return Supervision(facts, source, (), directions, widths, canaries)


class Trainer:
    """One run in one process: everything that lives from its first step to its last.

    Making one talks to no other rank and writes nothing; ``run`` does both.
    """

    def __init__(self, config: Config, distributed: DistributedContext, report: Report) -> None:
        assert config.run is not None
        self.config, self.distributed, self.report, self.run_url = config, distributed, report, config.run.url
        self.loss = CompositeLoss(config.loss, where="loss")
        self.supervision = open_supervision(config, self.loss, distributed.device)
        source = self.supervision.source
        self.order = order_of(config.train, source.shard_ids, source.num_ok, self.supervision.facts.plan)
        self.student, loaded = _student(config, self.supervision, self.loss)
        self.spec = loaded.input
        self._model_notes = [*loaded.notes, *(note for one in self.supervision.teachers for note in one.loaded.notes)]
        self.channels_last, self._unsafe = self._layout()
        move_to_device(self.student.train(), distributed.device, channels_last=self.channels_last)
        freeze(self.student.model.network, config.train.freeze)
        # Where workers come and go, a batch that is too small for all of them is refused before the first is lost.
        max_ranks = max(distributed.size, config.ray.num_workers)
        _check_batches(self.order, self.student, max_ranks, config.train.accumulate)
        check_loaders(
            self._dataset(),
            [cache.header for cache in self.supervision.facts.caches],
            num_workers=config.train.num_workers,
            reads_embeddings=self.loss.needs_teacher_embedding,
        )
        if config.train.compile:
            check_compiler(distributed.device)
        self.optimizer_step = OptimizerStep(
            self.student, config.train, total_steps=self.total_steps, device=distributed.device
        )
        networks = (self.student, self.optimizer_step.evaluated) if self.optimizer_step.averaged else (self.student,)
        self.weights = FiniteWeights.of(networks)
        self.module: nn.Module = self.student
        self.evaluator = self._make_evaluator()
        self.validation: ValidationSamples | None = None
        self.compared: Teacher | PrecomputedTeacher | None = None
        self.step = 0
        self.best: Score | None = None
        self._was_evaluated = False
        self.seconds = 0.0
        self._knows_overlap = False
        self._knows_of_leaving = False
        self._mean_C = torch.tensor(self.spec.mean, device=distributed.device)
        self._std_C = torch.tensor(self.spec.std, device=distributed.device)

    @property
    def total_steps(self) -> int:
        return self.config.train.epochs * self.order.num_steps

    def _layout(self) -> tuple[bool, list[str]]:
        """Whether the student lies in channels-last memory, and the layers that are unsafe there."""
        unsafe = unsafe_in_channels_last(self.student, self.distributed.device)
        expected = self.config.train.channels_last
        return not unsafe if expected is None else expected, unsafe

    def _make_evaluator(self) -> Evaluator | None:
        if self.config.data.val_shards is None:
            return None
        return make_evaluator(
            self.config.data.val_shards,
            self.supervision.facts.data,
            self.supervision.facts.student_plan,
            self.distributed,
            num_threads=self.config.ray.cpus_per_worker,
        )

    def _subject(self) -> Subject:
        """What evaluations measure besides what labels allow."""
        terms, one_teacher = self.loss.projected, len(self.supervision.teacher_dims) == 1
        projectors: Any = self.student.projectors[terms[0]] if terms and one_teacher else [None]
        return Subject(head_is_trained(self.config), projectors[0])

    def _best_without_labels(self) -> str | None:
        """The metric that the best checkpoint follows where it cannot be accuracy; None: there is none."""
        subject = self._subject()
        if self.compared is None:
            return None
        if subject.head_trained:
            return "agreement with the teacher"
        return None if subject.projector is None else "cosine to the teacher"

    def read_validation(self) -> ValidationSamples | None:
        """The checked validation samples; None without ``data.val_shards``. Every rank calls it.

        Raises:
            ShardError: a validation shard is damaged, a label cannot be used, or ``data.bad_samples`` refuses a sample.
            ConfigError: there are no images in them.
        """
        if self.evaluator is None:
            return None
        began = time.monotonic()
        found = read_validation(self.evaluator, self.run_url)
        if found.was_read:
            seconds = time.monotonic() - began
            self._say("validation", samples=found.samples, shards=len(found.stamps), read_s=round(seconds, 3))
        return found

    def compared_teacher(self) -> Teacher | PrecomputedTeacher | None:
        """Whom evaluations compare the student with. The teacher of a cache is loaded, asked once and let go.

        Raises:
            StillroomError: the weights of the cache's teacher cannot be read, or are not those that were cached.
        """
        expected, teachers = self.config.train.eval_agreement, self.supervision.teachers
        if self.evaluator is None or expected is False:
            return None
        if teachers or not expected:
            return teachers[0] if len(teachers) == 1 else None
        teacher = teacher_for_agreement(
            self.config, self.supervision.facts, self.distributed.device, or_else="set train.eval_agreement=null"
        )
        assert teacher is not None, "check_config has seen to it"
        began = time.monotonic()
        asked = self.evaluator.ask(teacher, with_embeddings=self._subject().projector is not None)
        seconds = time.monotonic() - began
        self._say("validation-teacher", size_bytes=asked.size_bytes, seconds=round(seconds, 3))
        return asked

    def run(self) -> dict[str, Any]:
        """From the last checkpoint to the end."""
        if self.validation is not None and self.validation.was_read and self.distributed.is_main_rank:
            record_validation(self.validation, self.run_url)
        self._resume()
        if self.distributed.size > 1:
            self.module = DistributedDataParallel(self.student)
        if self.config.train.compile:
            # In place, so that names in a state dict stay what they are.
            self.module.compile()
        self._warn()
        self._say("begin", total_steps=self.total_steps, steps_per_epoch=self.order.num_steps, first_step=self.step)
        with ExitStack() as stack:
            metrics = None
            if self.distributed.is_main_rank:
                metrics = stack.enter_context(
                    MetricsFile(self.run_url, first_step=self.step, tensorboard=self.config.train.tensorboard)
                )
            return self._finish(self._train(metrics), metrics)

    def _warn(self) -> None:
        if self.config.data.allow_pixel_drift:
            drift = self.supervision.canaries.over_ranks(self.distributed)
            if drift.num_drifted:
                self._say("warning", text=drift.warning())
        if not self.distributed.is_main_rank:
            return
        for text in self._model_notes:
            self._say("warning", text=text)
        if self._unsafe:
            self._say("warning", text=_layout_warning(self._unsafe, channels_last=self.channels_last))
        for cache in self.supervision.facts.caches:
            for text in fidelity_warnings(cache.header, cache.manifest.statistics, self.config.loss):
                self._say("warning", text=text)
        for text in advice(
            self.config, self.supervision.facts, self.supervision.source, world_size=self.distributed.size
        ):
            self._say("warning", text=text)
        if self.validation is not None:
            for text in self.validation.warnings(
                head_trained=head_is_trained(self.config), best_by=self._best_without_labels()
            ):
                self._say("warning", text=text)
        text = over_budget(
            self.supervision.source, self.order, rank=self.distributed.rank, world_size=self.distributed.size
        )
        if text is not None:
            self._say("warning", text=text)

    def _train(self, metrics: MetricsFile | None) -> Evaluation | None:
        """All steps that are left. Returns the evaluation after the last epoch, where one was made."""
        began = time.monotonic() - self.seconds
        log, speed = StepLog(self.distributed), ThroughputMeter()
        evaluation = self._evaluate_if_missed(metrics)
        loading = load_batches(
            self._dataset(),
            range(self.step, self.total_steps),
            num_workers=self.config.train.num_workers,
            pin_memory=self.distributed.device.type == "cuda",
        )
        with closing(loading) as batches:
            for batch in speed.watch(batches):
                self._train_step(batch.to(self.distributed.device), log)
                self.seconds = time.monotonic() - began
                if (saves := self._saves_now()) or self._ends_epoch or len(log) >= _FLUSH_STEPS:
                    self._flush(log, speed, metrics)
                    saves = self._saves_in_time() or saves
                if saves and metrics is not None:
                    self._save(metrics)
                # Only now: whatever ends an evaluation, the steps before it are not lost.
                if self._evaluates_now:
                    evaluation = self._evaluate(metrics, publishes=saves)
                if saves or self._ends_epoch:
                    speed.reset()
        return evaluation

    @property
    def _epochs_done(self) -> int:
        return self.step // self.order.num_steps

    @property
    def _ends_epoch(self) -> bool:
        return self.step % self.order.num_steps == 0

    def _saves_now(self) -> bool:
        train = self.config.train
        every_steps = train.checkpoint_every_steps
        return (
            self.step == self.total_steps
            or (every_steps is not None and self.step % every_steps == 0)
            or (self._ends_epoch and self._epochs_done % train.checkpoint_every_epochs == 0)
            or self._keeps_now()
        )

    def _saves_in_time(self) -> bool:
        """Whether a machine is about to be taken away: then nobody waits for the next checkpoint that is due."""
        if not self.distributed.preemption_pending():
            return False
        if not self._knows_of_leaving:
            self._knows_of_leaving = True
            self._say("warning", text=f"a node will be taken away: checkpoints every {_FLUSH_STEPS} steps until then")
        return True

    def _keeps_now(self) -> bool:
        every_epochs = self.config.train.keep_every_epochs
        return every_epochs is not None and self._ends_epoch and self._epochs_done % every_epochs == 0

    def _save(self, metrics: MetricsFile) -> None:
        metrics.publish()
        state = self._state()
        if self._keeps_now():
            checkpoint.save(self.run_url, checkpoint.kept(self._epochs_done), state)
        checkpoint.save(self.run_url, checkpoint.LAST, state)

    def close(self) -> None:
        self.supervision.source.close()

    def _dataset(self) -> StepDataset:
        return StepDataset(
            self.supervision.source,
            self.order,
            rank=self.distributed.rank,
            world_size=self.distributed.size,
            student=_eaten(self.spec),
            teachers=[_eaten(teacher.loaded.input) for teacher in self.supervision.teachers],
            max_pixels=self.supervision.facts.data.max_pixels,
            needs_labels=_refuses_unlabelled(self.config, self.loss),
            temperatures=self.loss.temperatures,
            student_views=self.supervision.facts.student_views,
        )

    def _train_step(self, batch: Batch, log: StepLog) -> None:
        train = self.config.train
        pieces = micro_batches(batch, num_pieces(train.accumulate, batch.num_rows_global, train.global_batch_size))
        num_labelled_global = self._num_labelled_global(batch)
        learnt: list[tuple[Tensor, dict[str, Tensor]]] = []
        for number, piece in enumerate(pieces):
            with self._gathering(last=number == len(pieces) - 1):
                learnt.append(self._learn(piece, number, num_labelled_global))
        total, terms = combined(learnt, [len(piece.labels_B) for piece in pieces])
        update = self.optimizer_step.step()
        log.add(batch.step, batch.epoch, update.lr, total, terms, grad_norm=update.grad_norm, scale=update.scale)
        self.step = batch.step + 1

    def _gathering(self, *, last: bool) -> AbstractContextManager[None]:
        """Ranks exchange gradients once a step: in its last backward pass."""
        if last or not isinstance(self.module, DistributedDataParallel):
            return nullcontext()
        return self.module.no_sync()

    def _learn(self, batch: Batch, number: int, num_labelled_global: int | Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Adds the gradients of a step's micro-batch. Returns its part of the total loss, and its terms."""
        # Dropout must not depend on what ran before, or a resumed run would differ from an undisturbed one.
        key = key_of(
            "dropout", self.config.train.seed, batch.step, self.distributed.rank, *([number] if number else [])
        )
        torch.manual_seed(int(key[0] >> 1))
        images = to_input(
            batch.pixels_BCHW,
            mean_C=self._mean_C,
            std_C=self._std_C,
            partner_B=batch.partner_B,
            lambda_B=batch.lambda_B,
            cutmix_box_B4=batch.cutmix_box_B4,
        )
        if not self.channels_last:
            # A convolution takes the layout of its input, whatever that of its weights.
            images = images.contiguous()
        inputs = self._forward(images, batch)
        total, terms = self.loss(inputs, self._share(inputs, batch, num_labelled_global), epoch=batch.epoch)
        self.optimizer_step.backward(total)
        return total.detach(), terms

    def _forward(self, images: Tensor, batch: Batch) -> LossInputs:
        with autocast(self.distributed.device, self.config.train.precision):
            answer: StudentOutputs = self.module(images)
        heard = self._listen(batch)
        return LossInputs(
            student_BK=answer.logits_BK,
            labels_B=batch.labels_B,
            embedding_BD=answer.embedding_BD,
            teachers=tuple(
                TeacherInputs(
                    words=said,
                    projected={key: of_teachers[number] for key, of_teachers in answer.projected.items()},
                    class_directions=directions,
                    student_maps=answer.maps or None,
                    teacher_maps=teacher_maps or None,
                )
                for number, ((said, teacher_maps), directions) in enumerate(
                    zip(heard, self.supervision.class_directions, strict=True)
                )
            ),
            partner_B=batch.partner_B,
            lambda_B=batch.lambda_B,
            sum_over_ranks=self.distributed.sum_with_gradient,
        )

    def _listen(self, batch: Batch) -> list[tuple[TeacherOutputs, tuple[Tensor, ...]]]:
        """Each teacher's words on a batch, cached or asked for now, and his levels where a loss reviews them."""
        asked = [_ask(teacher, batch, self.student.review) for teacher in self.supervision.teachers]
        return asked or [(words, ()) for words in batch.words]

    def _num_labelled_global(self, batch: Batch) -> int | Tensor:
        """Rows of the step with a label, over all ranks; every one where none may be missing."""
        if not (self.loss.needs_labels and self.config.data.missing_labels == "ignore"):
            return batch.num_rows_global
        mixed_labels_B = None if batch.partner_B is None else batch.labels_B[batch.partner_B]
        return self.distributed.sum(is_labelled(batch.labels_B, mixed_labels_B).sum())

    def _share(self, inputs: LossInputs, batch: Batch, num_labelled_global: int | Tensor) -> BatchShare:
        return BatchShare(
            world_size=self.distributed.size,
            num_rows=len(batch.labels_B),
            num_rows_global=batch.num_rows_global,
            num_labelled=inputs.num_labelled,
            num_labelled_global=num_labelled_global,
        )

    def _flush(self, log: StepLog, speed: ThroughputMeter, metrics: MetricsFile | None) -> None:
        records = log.flush()
        if not records:
            return
        steps = f"between steps {records[0]['step']} and {records[-1]['step']}"
        self.optimizer_step.check(where=steps)
        self._check_finite(steps)
        if metrics is not None:
            measured = speed.read()
            metrics.add(records, measured)
            self._say("step", total_steps=self.total_steps, seconds=self.seconds, **records[-1], **measured)

    def _check_finite(self, steps: str) -> None:
        """Of the weights after these steps: a loss shows only what the steps before it did.

        Raises:
            TrainingError: a parameter or a statistic of BatchNorm is NaN or infinite on any rank.
        """
        broken = self.weights.broken()
        if self.distributed.sum(torch.tensor(len(broken), device=self.distributed.device)):
            raise TrainingError(
                "the weights are not finite",
                code="train.not-finite-weights",
                where=f"changed {steps}",
                got=f"NaN or infinity in {', '.join(broken[:_NUM_NAMED]) or 'those of another rank'}",
                next_step="lower train.lr, set train.clip_norm, or use train.precision=fp32, in another run.url",
            )

    @property
    def _evaluates_now(self) -> bool:
        every_epochs = self.config.train.eval_every_epochs
        return self._ends_epoch and bool(
            self.step == self.total_steps or (every_epochs and self._epochs_done % every_epochs == 0)
        )

    def _evaluate_if_missed(self, metrics: MetricsFile | None) -> Evaluation | None:
        """The evaluation after the step that a run resumes from, where it ended between that checkpoint and it."""
        if not self.step or not self._evaluates_now or self._was_evaluated:
            return None
        return self._evaluate(metrics, publishes=True)

    def _evaluate(self, metrics: MetricsFile | None, *, publishes: bool = False) -> Evaluation | None:
        """Evaluates if there are validation shards, and saves the weights as the best ones if none were better."""
        if self.evaluator is None:
            return None
        # Each rank's BatchNorm has statistics of its own since the last step; the checkpoint holds the leader's.
        self.distributed.copy_from_leader(self.student.buffers())
        self.distributed.copy_from_leader(self.optimizer_step.averaged_buffers())
        seen = SeenImages()
        try:
            evaluation = self.evaluator(
                self.optimizer_step.evaluated, self.spec, self.compared, subject=self._subject(), on_index=seen.add
            )
        except EvaluationError as error:
            # A student's weights are finite, and the numbers that come out of them are not: it began in earlier steps.
            raise TrainingError(
                f"{error.what} in the evaluation after step {self.step - 1}",
                code="train.not-finite-evaluation" if error.code == "evaluate.student-not-finite" else error.code,
                where=error.where,
                got=error.got,
                next_step=error.next_step,
            ) from error
        self._warn_of_overlap(seen)
        self._say("eval", epoch=self._epochs_done, **evaluation.measured())
        if self._improves(evaluation.measured()) and self.distributed.is_main_rank:
            checkpoint.save(self.run_url, checkpoint.BEST, self._state())
        if metrics is not None:
            metrics.add_evaluation(self.step - 1, self._epochs_done, evaluation.measured())
            if publishes:
                metrics.publish_evaluations()
        return evaluation

    def _warn_of_overlap(self, seen: SeenImages) -> None:
        """Once in the life of this process, at its first evaluation, which has read the validation images anyway."""
        if self._knows_overlap:
            return
        self._knows_overlap = True
        overlap = seen.overlap(self.supervision.source, self.distributed)
        if overlap.num_rows:
            self._say("warning", text=overlap.warning())

    @property
    def _best_top1(self) -> float | None:
        return self.best.value if self.best is not None and self.best.metric == "top1" else None

    def _state(self) -> dict[str, Any]:
        raw, evaluated = self.student.model.network, self.optimizer_step.evaluated.network
        return {
            # Whoever opens a checkpoint finds the weights that were evaluated; those that learn are there to go on.
            "model": evaluated.state_dict(),
            "raw": None if evaluated is raw else raw.state_dict(),
            "projectors": self.student.projectors.state_dict(),
            "review": None if self.student.review is None else self.student.review.state_dict(),
            **self.optimizer_step.state_dict(),
            "step": self.step,
            "best_top1": self._best_top1,
            "best": None if self.best is None else asdict(self.best),
            "seconds": self.seconds,
            "order": self._order_id(),
            **input_transform(evaluated),
        }

    def _order_id(self) -> str:
        """What the position in a checkpoint counts in: another order would repeat some rows and skip others."""
        order = self.order
        rows = [*zip(order.shard_ids, order.num_ok_S.tolist(), strict=True)]
        return short([order.seed, order.global_batch_size, order.num_lanes, order.kind, order.tail, rows])

    def _restore_input_transform(self, state: dict[str, Any]) -> None:
        """A run that was begun before torchvision's networks were built as for their weights goes on as it began."""
        assert self.config.student is not None
        if "transform_input" in self.config.student.kwargs:
            return
        networks: tuple[Any, ...] = self.optimizer_step.evaluated.network, self.student.model.network
        for network in networks:
            if input_transform(network):
                network.transform_input = bool(stored_transform_input(state))

    def _resume(self) -> None:
        state = checkpoint.load(self.run_url, checkpoint.LAST)
        if state is None:
            return
        if state["order"] != self._order_id():
            raise ConfigError(
                "the checkpoint's position counts in another order of training",
                where=redact(self.run_url),
                got="other shards, or other rows in them, than when the run was begun",
                next_step="restore the shards and their index, or choose another run.url",
            )
        self.optimizer_step.evaluated.network.load_state_dict(state["model"])
        if state["raw"] is not None:
            self.student.model.network.load_state_dict(state["raw"])
        self._restore_input_transform(state)
        self.student.projectors.load_state_dict(state["projectors"])
        if self.student.review is not None:
            self.student.review.load_state_dict(state["review"])
        self.optimizer_step.load_state_dict(state)
        self.step, self.seconds = state["step"], state["seconds"]
        self._resume_best(state)

    def _resume_best(self, state: dict[str, Any]) -> None:
        """With the evaluation after the checkpoint's step, which is made after the checkpoint."""
        if (best := state.get("best")) is not None:
            self.best = Score(**best)
        elif state["best_top1"] is not None:
            # A run of a version that knew no other metric.
            self.best = Score("top1", state["best_top1"])
        published = published_evaluation(self.run_url, self.step - 1)
        self._was_evaluated = published is not None
        self._improves(published or {})

    def _improves(self, evaluation: Mapping[str, float | int | None]) -> bool:
        """Whether no evaluation before was better; it is then the best one."""
        score = Score.of(evaluation)
        if score is None or not score.beats(self.best):
            return False
        self.best = score
        return True

    def _finish(self, evaluation: Evaluation | None, metrics: MetricsFile | None) -> dict[str, Any]:
        if evaluation is None:
            # Resumed after its last step: the files have this evaluation already.
            evaluation = self._evaluate(None)
        summary = {
            "steps": self.step,
            "epochs": self.config.train.epochs,
            "seconds": round(self.seconds, 3),
            "top1": None if evaluation is None else evaluation.top1,
            "top5": None if evaluation is None else evaluation.top5,
            "ece": None if evaluation is None else evaluation.ece,
            "best_top1": self._best_top1,
            "best_metric": None if self.best is None else self.best.metric,
            "best_value": None if self.best is None else self.best.value,
        }
        if metrics is not None:
            metrics.publish()
            checkpoint.write_summary(self.run_url, summary)
        self.distributed.wait()
        self._say("end", **summary)
        return summary

    def _say(self, kind: str, **values: Any) -> None:
        if self.distributed.is_main_rank:
            self.report({"kind": kind, "run": self.run_url, **values})


def _layout_warning(unsafe: Sequence[str], *, channels_last: bool) -> str:
    cause = f"torch's backward pass of {', '.join(unsafe[:_NUM_NAMED])} in channels-last memory can crash on this CPU"
    if channels_last:
        return f"{cause}, and train.channels_last is true: set it to null or false if the process is killed by a signal"
    return f"{cause}: the student is trained in contiguous memory (train.channels_last)"


def _eaten(spec: InputSpec) -> InputSize:
    return InputSize(spec.size, spec.interpolation)


def _ask(teacher: Teacher, batch: Batch, review: Review | None) -> tuple[TeacherOutputs, tuple[Tensor, ...]]:
    """An online teacher's words on a batch, and its levels where a loss reviews them."""
    pixels_BCHW = batch.teacher_pixels.get(_eaten(teacher.loaded.input), batch.pixels_BCHW)
    named = () if review is None else review.plan.teacher
    asked = pixels_BCHW, batch.partner_B, batch.lambda_B, batch.cutmix_box_B4
    (teacher_BK, teacher_BD), maps = forward_with_maps(named, teacher.forward, *asked)
    levels = () if review is None else review.plan.levels(maps, teacher_BD)
    return TeacherOutputs({None: teacher_BK}, teacher_BD.norm(dim=1), teacher_BD), levels


def _student(config: Config, supervision: Supervision, loss: CompositeLoss) -> tuple[Student, LoadedModel]:
    """The student with its first weights, a function of ``train.seed`` alone, and its network as it was loaded."""
    assert config.student is not None
    loaded = load_model(
        config.student,
        num_classes=supervision.facts.num_classes,
        size=config.student.size or supervision.facts.size,
        seed=config.train.seed,
        where="student",
        allow_new_head=True,
    )
    review = _review(config, loaded, supervision.teachers)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.train.seed)
        student = Student(loaded.module, terms=loss.projected, teacher_dims=supervision.teacher_dims, review=review)
    return student, loaded


def _review(config: Config, student: LoadedModel, teachers: Sequence[Teacher]) -> ReviewPlan | None:
    """What ``review_kd`` compares, with the teacher ready to show it; None where no loss does."""
    section = review_section(config.loss)
    if section is None:
        return None
    assert len(teachers) == 1, "check_config has seen to it"
    teacher = teachers[0]
    plan = plan_review(section, student, teacher.loaded)
    register_map_hooks(teacher.loaded.module.network, plan.teacher)
    return plan


def _check_batches(order: TrainingOrder, student: Student, world_size: int, accumulate: int) -> None:
    """Every rank has enough rows in every step: one without rows could not answer the others' gradients."""
    rows, step = order.smallest_batch(world_size)
    all_rows = order.global_rows(step)
    pieces = num_pieces(accumulate, all_rows, order.global_batch_size)
    fewest = smallest_batch(rows, pieces, rows_per_unit=order.rows_per_unit)
    if fewest >= student.min_rows:
        return
    reason = "; BatchNorm has no statistics of a single row" if fewest else ""
    smaller = "" if accumulate == 1 else ", a smaller train.accumulate"
    change = f"set another train.global_batch_size{smaller}, or fewer ray.num_workers"
    raise ConfigError(
        f"a rank would have too few rows in a {'step' if pieces == 1 else 'micro-batch'}{reason}",
        where=f"step {step} of {order.num_steps} of every epoch",
        got=f"{rows} of its {all_rows} rows, over {world_size} ranks" + (f", cut into {pieces}" if pieces > 1 else ""),
        expected=f"at least {student.min_rows} rows {'on each' if pieces == 1 else 'in each'}",
        next_step=change if all_rows == order.global_batch_size else f"{change}, or train.tail: drop",
    )
