"""Trains one student: one loop for a cached teacher, online teachers or labels alone, on one rank or many."""

from __future__ import annotations

import time
from contextlib import closing
from typing import Any

import torch

from pipeline.core.errors import TrainingError
from pipeline.student.data.loader import killed_loaders, load_batches
from pipeline.student.data.prefetcher import budget_warnings
from pipeline.student.distributed import DistributedContext
from pipeline.student.evaluation.finite import FiniteWeights
from pipeline.student.evaluation.metrics import Evaluation, metrics_of
from pipeline.student.run import checkpoint
from pipeline.student.supervision.loss_warnings import fidelity_warnings, loss_warnings
from pipeline.student.training.checkpointer import Checkpointer, Progress
from pipeline.student.training.config_checks import check_config
from pipeline.student.training.run_log import Report, RunLog
from pipeline.student.training.setup import BuiltStudent, TrainingSetup, prepare
from pipeline.student.training.torch_switches import demand_workspace, deterministic
from pipeline.student.training.train_step import TrainStep
from pipeline.student.training.validator import Validator
from pipeline.teacher.numerics import pin_numerics, precision_warnings, retain_freed_memory
from schemas.config import Config, Precision

FLUSH_STEPS = 50
"""Steps between two checks of losses and weights, each of which waits for the device."""
_NUM_NAMED = 3


def _ignore(_: dict[str, Any]) -> None: ...


def train(config: Config, distributed: DistributedContext | None = None, report: Report = _ignore) -> dict[str, Any]:
    """Trains the student of a config to its end, from the last checkpoint of its run. Returns the run's summary.

    Every rank calls it with the same config; the main rank writes and reports. Each rank checks everything itself, so
    that bad input stops all ranks and none waits for another. A finished run stays as it is.

    Raises:
        StillroomError: bad input (config, shards, cache), or a loss that is not finite.
    """
    distributed = distributed or DistributedContext()
    run_url = check_config(config)
    checkpoint.check_same_config(run_url, config)
    finished = checkpoint.read_summary(run_url)
    if finished is not None:
        if distributed.is_main_rank:
            report({"kind": "finished", "run": run_url, **finished})
        return finished
    pin_numerics(config.ray.cpus_per_worker)
    retain_freed_memory()
    if config.train.deterministic:
        demand_workspace()
    setup = prepare(config, distributed)
    try:
        log = RunLog(run_url, distributed, report, views_per_image=config.train.views_per_image)
        validator = Validator(setup, log.emit)
        validator.prepare(run_url)
        setup = _claimed(setup)
        with deterministic(config.train.deterministic), killed_loaders():
            return Trainer(setup, validator, log).run()
    finally:
        setup.close()


def _claimed(setup: TrainingSetup) -> TrainingSetup:
    """Claims the run and pins the states of its caches, now that all is checked: a refused config leaves no run behind.

    Another rank may have opened a cache before or after it was extended, and pinned that state first; the caches are
    then opened again, in the state that was pinned.
    """
    checkpoint.claim_run(setup.run_url, setup.config)
    spec = setup.spec
    pinned = checkpoint.pin_manifests(setup.run_url, spec.manifests)
    moments = checkpoint.pin_moments(setup.run_url, spec.moments_records)
    return setup if (pinned, moments) == (spec.manifests, spec.moments_records) else setup.reopened()


class Trainer:
    """Runs a training from its last checkpoint to its end. Building one writes nothing and waits for no rank."""

    def __init__(self, setup: TrainingSetup, validator: Validator, log: RunLog) -> None:
        self.setup, self.validator, self.log = setup, validator, log
        self.train_step, self.checkpointer = TrainStep(setup), Checkpointer(setup)
        self.progress, self._metrics = Progress(), metrics_of(setup.spec.data, setup.config.train.best)
        student, optimizer_step = setup.student.module, setup.optimizer_step
        networks = (student, optimizer_step.evaluated) if optimizer_step.averaged else (student,)
        self._weights = FiniteWeights.of(networks)
        self._preemption_reported = False

    def run(self) -> dict[str, Any]:
        """Returns the run's summary."""
        setup = self.setup
        if setup.distributed.is_main_rank:
            self.validator.record_samples(setup.run_url)
        self.progress = self.checkpointer.restore()
        self.train_step.wrap()
        for text in [*_start_warnings(setup, self.validator), *self._changed_selection()]:
            self.log.emit("warning", text=text)
        self.log.emit(
            "begin",
            total_steps=setup.total_steps,
            steps_per_epoch=setup.order.num_steps,
            first_step=self.progress.step,
            **_teachers(setup),
            **_num_views(setup),
            **_images_and_views(setup),
        )
        with self.log.files(first_step=self.progress.step, tensorboard=setup.config.train.tensorboard):
            return self._finish(self._train())

    def _changed_selection(self) -> list[str]:
        former = self.progress.former_best
        if former is None:
            return []
        return [
            f"best.pt followed {former.metric} ({former.value:.4g}); from now on {self._metrics.main.key} selects it, "
            "and the next evaluation replaces it"
        ]

    def _train(self) -> Evaluation | None:
        """Takes all steps that are left. Returns the evaluation after the last epoch, if there was one."""
        setup, progress, device = self.setup, self.progress, self.setup.distributed.device
        began = time.monotonic() - progress.seconds
        evaluation = self._evaluate_if_missed()
        loading = load_batches(
            setup.dataset,
            range(progress.step, setup.total_steps),
            num_workers=setup.config.train.num_workers,
            pin_memory=device.type == "cuda",
        )
        with closing(loading) as batches:
            for batch in self.log.speed.watch(batches):
                self.log.add_step(batch, self.train_step(batch.to(device)))
                progress.step, progress.seconds = batch.step + 1, time.monotonic() - began
                if (saves := self._saves_now()) or self._ends_epoch or len(self.log.steps) >= FLUSH_STEPS:
                    self._flush()
                    saves = self._saves_in_time() or saves
                if saves and setup.distributed.is_main_rank:
                    self._save()
                # After the checkpoint: if the evaluation fails, the steps before it are not lost.
                if self._evaluates_now:
                    evaluation = self._evaluate(publish=saves)
                if saves or self._ends_epoch:
                    self.log.speed.reset()
        return evaluation

    @property
    def _epochs_done(self) -> int:
        return self.progress.step // self.setup.order.num_steps

    @property
    def _ends_epoch(self) -> bool:
        return self.progress.step % self.setup.order.num_steps == 0

    @property
    def _is_last_step(self) -> bool:
        return self.progress.step == self.setup.total_steps

    def _saves_now(self) -> bool:
        train = self.setup.config.train
        every_steps = train.checkpoint_every_steps
        return (
            self._is_last_step
            or (every_steps is not None and self.progress.step % every_steps == 0)
            or (self._ends_epoch and self._epochs_done % train.checkpoint_every_epochs == 0)
            or self._saves_for_good()
        )

    def _saves_for_good(self) -> bool:
        """Whether the checkpoint of this step is never replaced."""
        every_epochs = self.setup.config.train.keep_every_epochs
        return every_epochs is not None and self._ends_epoch and self._epochs_done % every_epochs == 0

    def _saves_in_time(self) -> bool:
        """Whether a node is about to be preempted, so that the next scheduled checkpoint may come too late."""
        if not self.setup.distributed.preemption_pending():
            return False
        if not self._preemption_reported:
            self._preemption_reported = True
            text = f"a node will be preempted: checkpoints every {FLUSH_STEPS} steps until then"
            self.log.emit("warning", text=text)
        return True

    def _save(self) -> None:
        self.log.publish()
        permanent = [checkpoint.epoch_checkpoint(self._epochs_done)] if self._saves_for_good() else []
        self.checkpointer.save(self.progress, *permanent, checkpoint.LAST)

    def _flush(self) -> None:
        records = self.log.steps.flush()
        if not records:
            return
        steps = f"between steps {records[0]['step']} and {records[-1]['step']}"
        self.setup.optimizer_step.check(where=steps)
        self._check_finite(steps)
        self.log.write(records, total_steps=self.setup.total_steps, seconds=self.progress.seconds)

    def _check_finite(self, steps: str) -> None:
        """Checks the weights after these steps: a loss shows only what the steps before it did.

        Raises:
            TrainingError: a parameter or a statistic of BatchNorm is NaN or infinite on any rank.
        """
        names, distributed = self._weights.not_finite(), self.setup.distributed
        if distributed.sum(torch.tensor(len(names), device=distributed.device)):
            raise TrainingError(
                "the weights are not finite",
                code="train.not-finite-weights",
                where=f"changed {steps}",
                got=f"NaN or infinity in {', '.join(names[:_NUM_NAMED]) or 'those of another rank'}",
                next_step="lower train.lr, set train.clip_norm, or use train.precision=fp32, in another run.url",
            )

    @property
    def _evaluates_now(self) -> bool:
        every_epochs = self.setup.config.train.eval_every_epochs
        return self._ends_epoch and bool(self._is_last_step or (every_epochs and self._epochs_done % every_epochs == 0))

    def _evaluate_if_missed(self) -> Evaluation | None:
        """The evaluation after the last checkpoint, if the run ended between the two."""
        if not self.progress.step or not self._evaluates_now or self.progress.was_evaluated:
            return None
        return self._evaluate(publish=True)

    def _evaluate(self, *, record: bool = True, publish: bool = False) -> Evaluation | None:
        """Evaluates if there are validation shards, and saves the weights as the best ones if none were better."""
        if not self.validator.is_enabled:
            return None
        setup, step = self.setup, self.progress.step
        # Each rank's BatchNorm has its own statistics since the last step; the checkpoint holds those of the main rank.
        setup.distributed.copy_from_main_rank(setup.student.module.buffers())
        setup.distributed.copy_from_main_rank(setup.optimizer_step.averaged_buffers())
        evaluation = self.validator.evaluate(setup.optimizer_step.evaluated, setup.supervision.source, step=step)
        domains = {"by_domain": evaluation.by_domain} if evaluation.by_domain else {}
        self.log.emit("eval", epoch=self._epochs_done, **evaluation.measured(), **domains)
        if self.progress.improves(evaluation.measured(), self._metrics) and setup.distributed.is_main_rank:
            self.checkpointer.save(self.progress, checkpoint.BEST)
        if record:
            self.log.write_evaluation(step - 1, self._epochs_done, evaluation, publish=publish)
        return evaluation

    def _finish(self, evaluation: Evaluation | None) -> dict[str, Any]:
        if evaluation is None:
            # Resumed after its last step: the files have this evaluation already.
            evaluation = self._evaluate(record=False)
        measured = {} if evaluation is None else evaluation.metrics
        tables = {} if evaluation is None else evaluation.tables()
        best, main = self.progress.best, self._metrics.main.key
        summary = {
            "steps": self.progress.step,
            "epochs": self.setup.config.train.epochs,
            "seconds": round(self.progress.seconds, 3),
            **_num_views(self.setup),
            **_images_and_views(self.setup),
            **{metric.key: measured.get(metric.key) for metric in self._metrics.without_teacher},
            f"best_{main}": self.progress.best_value(main),
            "best_metric": None if best is None else best.metric,
            "best_value": None if best is None else best.value,
            **tables,
        }
        if self.setup.distributed.is_main_rank:
            self.log.publish()
            checkpoint.write_summary(self.setup.run_url, summary)
        self.setup.distributed.wait()
        self.log.emit("end", **summary)
        return summary


def _teachers(setup: TrainingSetup) -> dict[str, Any]:
    """How the losses take the teachers, where that is not as they are and with weight 1."""
    supervision, teacher = setup.supervision, setup.config.teacher
    fields: dict[str, Any] = {}
    if any(supervision.standardizers):
        fields["standardize"] = teacher.standardizations(len(supervision.standardizers))
        fields["moments"] = [record and record.table.sha256[:16] for record in setup.spec.moments]
    if teacher.loss_weights:
        fields["teacher_weights"] = supervision.weights
    return fields


def _num_views(setup: TrainingSetup) -> dict[str, int]:
    """Of a training that shows fewer views than its caches have."""
    num_views, caches = setup.config.data.num_views, setup.spec.caches
    if num_views is None:
        return {}
    return {"num_views": num_views, "num_cached_views": min(cache.num_views for cache in caches)}


def _images_and_views(setup: TrainingSetup) -> dict[str, int]:
    """Of an epoch, in a training whose batches hold several views of an image."""
    order = setup.order
    if order.views_per_image == 1:
        return {}
    rows = order.num_rows - order.rows_dropped
    return {"images_per_epoch": rows // order.views_per_image, "views_per_image": order.views_per_image}


def _start_warnings(setup: TrainingSetup, validator: Validator) -> list[str]:
    """One line each. Every rank calls it; all but the main rank get only what all ranks measure together."""
    texts: list[str] = []
    if setup.config.data.allow_pixel_drift:
        drift = setup.supervision.canaries.over_ranks(setup.distributed)
        texts += [drift.warning()] if drift.num_drifted else []
    if not setup.distributed.is_main_rank:
        return texts
    config, source, world_size = setup.config, setup.supervision.source, setup.distributed.size
    texts += setup.student.warnings
    texts += [] if setup.row_weights is None else [setup.row_weights.warning()]
    texts += [note for teacher in setup.supervision.teachers for note in teacher.loaded.notes]
    texts += _layout_warnings(setup.student)
    online = config.teacher.models if config.teacher.mode == "online" else {}
    precisions: dict[str, Precision] = {"train.precision": config.train.precision}
    precisions |= {f"{section}.precision": teacher.precision for section, teacher in online.items()}
    texts += precision_warnings(setup.distributed.device, precisions)
    for cache in setup.spec.caches:
        texts += fidelity_warnings(cache.header, cache.manifest.statistics, config.loss)
    texts += loss_warnings(config, setup.spec, source, setup.supervision.class_counts, world_size=world_size)
    texts += validator.warnings()
    texts += budget_warnings(source, setup.order, rank=setup.distributed.rank, world_size=world_size)
    return texts


def _layout_warnings(student: BuiltStudent) -> list[str]:
    if not student.unsafe_layers:
        return []
    named = ", ".join(student.unsafe_layers[:_NUM_NAMED])
    cause = f"torch's backward pass of {named} in channels-last memory can crash on this CPU"
    remedy = ": the student is trained in contiguous memory (train.channels_last)"
    if student.channels_last:
        remedy = ", and train.channels_last is true: set it to null or false if the process is killed by a signal"
    return [cause + remedy]
