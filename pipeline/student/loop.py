"""Train one student: the same loop for a cached teacher, an online one, or none; for one process or many ranks."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from pipeline import storage
from pipeline.errors import ConfigError
from pipeline.fingerprint import short
from pipeline.models import InputSpec, lay_out, load_model
from pipeline.student import checkpoint
from pipeline.student.advice import advice
from pipeline.student.canaries import check_canaries
from pipeline.student.class_means import cached_means, online_means
from pipeline.student.dataset import Batch, InputSize, StepDataset, load_batches
from pipeline.student.evaluate import Evaluation, Evaluator, make_evaluator
from pipeline.student.facts import LessonFacts, lesson_facts
from pipeline.student.fidelity import fidelity_warnings
from pipeline.student.losses import BatchShare, ClassDirections, CompositeLoss, LossInputs, TeacherInputs
from pipeline.student.metrics import MetricsFile, StepLog
from pipeline.student.network import Student
from pipeline.student.optim import make_optimizer, make_schedule
from pipeline.student.order import TrainingOrder
from pipeline.student.preflight import check_caches_serve, check_config, check_means_serve
from pipeline.student.sources import RowSource, check_any_labelled, index_url, open_cached, open_indexed
from pipeline.student.words import TeacherWords
from pipeline.student.world import World
from pipeline.teacher.infer import Teacher, load_teacher
from pipeline.teacher.runtime import pin_numerics
from pipeline.views.philox import key_of
from pipeline.views.pixels import to_input
from schemas.config import Config, TrainConfig

Report = Callable[[dict[str, Any]], None]
_FLUSH_STEPS = 50


def _quiet(_: dict[str, Any]) -> None: ...


@dataclass(frozen=True, slots=True)
class Lessons:
    """What the student learns from: rows, their views, and the teacher in whichever form it is there."""

    facts: LessonFacts
    source: RowSource
    teacher: Teacher | None
    class_directions: tuple[ClassDirections | None, ...]
    """One a teacher, where the loss needs it."""
    teacher_dims: tuple[int, ...]
    """Widths of the teachers' embeddings."""


def train(config: Config, world: World | None = None, report: Report = _quiet) -> dict[str, Any]:
    """Trains the student of a config to its end, from wherever its run stands. Returns the run's summary.

    Every rank calls it with the same config; rank 0 writes and reports. Each rank checks everything by itself, so that
    what is wrong stops them all and none waits for another. A finished run is left as it is.

    Raises:
        StillroomError: bad input (config, shards, cache), or a loss that is not finite.
    """
    world = world or World()
    run_url = check_config(config)
    checkpoint.check_begun(run_url, config)
    finished = checkpoint.read_summary(run_url)
    if finished is not None:
        if world.leads:
            report({"kind": "finished", "run": run_url, **finished})
        return finished
    pin_numerics(config.ray.cpus_per_worker)
    trainer = _begin(config, world, report)
    try:
        return trainer.run()
    finally:
        trainer.close()


def _begin(config: Config, world: World, report: Report) -> Trainer:
    """A trainer on the state of its caches that counts for this run.

    The run is claimed only now that everything is checked: a refused config leaves none behind.
    """
    trainer = Trainer(config, world, report)
    checkpoint.claim_run(trainer.run_url, config)
    opened = tuple(cache.manifest_bytes for cache in trainer.lessons.facts.opened)
    if checkpoint.pin_manifests(trainer.run_url, opened) == opened:
        return trainer
    # Another rank opened a cache before or after it was extended, and was first to pin what it saw.
    trainer.close()
    return Trainer(config, world, report)


def open_lessons(config: Config, loss: CompositeLoss, device: torch.device) -> Lessons:
    """Opens what the config says the student learns from, and checks that it can teach what the loss asks.

    Raises:
        ConfigError: a loss needs what this teacher mode does not offer, or labels that are missing.
        CacheError: the cache is not usable, or this machine makes other pixels than the teacher saw.
    """
    facts = lesson_facts(config)
    check_caches_serve(loss, facts.caches)
    check_means_serve(loss, facts)
    if facts.caches:
        return _cached_lessons(loss, facts, device)
    source = open_indexed(index_url(config), facts.data, facts.plan)
    if _refuses_unlabelled(config, loss):
        source.check_labelled()
    _check_labels(loss, source, facts)
    if config.teacher.mode == "none":
        return Lessons(facts, source, None, (), ())
    teacher = load_teacher(config.teacher, num_classes=facts.num_classes, size=facts.size, device=device)
    directions = None
    if loss.needs_class_means and facts.means_cache is not None:
        directions = ClassDirections.of(online_means(facts.means_cache, teacher, source).to(device))
    return Lessons(facts, source, teacher, (directions,), (teacher.module.embedding_dim,))


def _refuses_unlabelled(config: Config, loss: CompositeLoss) -> bool:
    return loss.needs_labels and config.data.missing_labels == "refuse"


def _check_labels(loss: CompositeLoss, source: RowSource, facts: LessonFacts) -> None:
    if loss.needs_labels:
        check_any_labelled(source, facts.data)


def _cached_lessons(loss: CompositeLoss, facts: LessonFacts, device: torch.device) -> Lessons:
    source = open_cached(facts.caches, facts.data, keeps_embeddings=loss.needs_teacher_embedding)
    _check_labels(loss, source, facts)
    # On every rank: each may run on another machine, with pixels of its own.
    check_canaries(source, max_pixels=facts.data.max_pixels)
    directions = tuple(
        ClassDirections.of(cached_means(cache, source).to(device)) if loss.needs_class_means else None
        for cache in facts.caches
    )
    return Lessons(facts, source, None, directions, tuple(cache.header.embedding_dim for cache in facts.caches))


class Trainer:
    """One run in one process: everything that lives from its first step to its last.

    Making one talks to no other rank and writes nothing; ``run`` does both.
    """

    def __init__(self, config: Config, world: World, report: Report) -> None:
        assert config.run is not None
        self.config, self.world, self.report, self.run_url = config, world, report, config.run.url
        self.loss = CompositeLoss(config.loss, where="loss")
        self.lessons = open_lessons(config, self.loss, world.device)
        self.order = _order(config.train, self.lessons)
        self.student, self.spec = _student(config, self.lessons, self.loss)
        lay_out(self.student.train(), world.device)
        _check_batches(self.order, self.student, world.size)
        self.optimizer = make_optimizer(self.student, config.train)
        self.schedule = make_schedule(self.optimizer, config.train, total_steps=self.total_steps)
        self.module: nn.Module = self.student
        self.evaluator = self._make_evaluator()
        self.step = 0
        self.best_top1: float | None = None
        self.seconds = 0.0
        self._mean_C = torch.tensor(self.spec.mean, device=world.device)
        self._std_C = torch.tensor(self.spec.std, device=world.device)

    @property
    def total_steps(self) -> int:
        return self.config.train.epochs * self.order.num_steps

    def _make_evaluator(self) -> Evaluator | None:
        if self.config.data.val_shards is None:
            return None
        return make_evaluator(
            self.config.data.val_shards,
            self.lessons.facts.data,
            self.lessons.facts.plan,
            self.world,
            num_threads=self.config.ray.cpus_per_worker,
        )

    def run(self) -> dict[str, Any]:
        """From the last checkpoint to the end."""
        self._resume()
        if self.world.size > 1:
            self.module = DistributedDataParallel(self.student)
        self._warn()
        self._say("begin", total_steps=self.total_steps, steps_per_epoch=self.order.num_steps, first_step=self.step)
        with ExitStack() as stack:
            metrics = None
            if self.world.leads:
                metrics = stack.enter_context(MetricsFile(self.run_url, first_step=self.step))
            return self._finish(self._train(metrics), metrics)

    def _warn(self) -> None:
        if not self.world.leads:
            return
        for cache in self.lessons.facts.caches:
            for text in fidelity_warnings(cache.header, cache.manifest.statistics, self.config.loss):
                self._say("warning", text=text)
        for text in advice(self.config, self.lessons.facts, self.lessons.source, world_size=self.world.size):
            self._say("warning", text=text)

    def _train(self, metrics: MetricsFile | None) -> Evaluation | None:
        """All steps that are left. Returns the evaluation after the last epoch, where one was made."""
        began = time.monotonic() - self.seconds
        log = StepLog(self.world)
        evaluation: Evaluation | None = None
        for batch in load_batches(
            self._dataset(),
            range(self.step, self.total_steps),
            num_workers=self.config.train.num_workers,
            pin_memory=self.world.device.type == "cuda",
        ):
            self._train_step(batch.to(self.world.device), log)
            self.seconds = time.monotonic() - began
            epoch, local_step = divmod(self.step, self.order.num_steps)
            if len(log) >= _FLUSH_STEPS or local_step == 0:
                self._flush(log, metrics)
            if local_step == 0:
                evaluation = self._end_epoch(epoch, metrics)
        return evaluation

    def close(self) -> None:
        self.lessons.source.close()

    def _dataset(self) -> StepDataset:
        teacher = self.lessons.teacher
        return StepDataset(
            self.lessons.source,
            self.order,
            rank=self.world.rank,
            world_size=self.world.size,
            student=InputSize(self.spec.size, self.spec.interpolation),
            teacher=None
            if teacher is None
            else InputSize(teacher.loaded.input.size, teacher.loaded.input.interpolation),
            max_pixels=self.lessons.facts.data.max_pixels,
            needs_labels=_refuses_unlabelled(self.config, self.loss),
            temperatures=self.loss.temperatures,
        )

    def _train_step(self, batch: Batch, log: StepLog) -> None:
        # Dropout must not depend on what ran before, or a resumed run would differ from an undisturbed one.
        torch.manual_seed(int(key_of("dropout", self.config.train.seed, batch.step, self.world.rank)[0] >> 1))
        images = to_input(
            batch.pixels_BCHW,
            mean_C=self._mean_C,
            std_C=self._std_C,
            partner_B=batch.partner_B,
            lambda_B=batch.lambda_B,
            cut_B4=batch.cut_B4,
        )
        inputs = self._forward(images, batch)
        total, terms = self.loss(inputs, self._share(inputs, batch), epoch=batch.epoch)
        total.backward()
        if self.config.train.clip_norm is not None:
            nn.utils.clip_grad_norm_(self.student.parameters(), self.config.train.clip_norm)
        lr = float(self.optimizer.param_groups[0]["lr"])
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.schedule.step()
        log.add(batch.step, batch.epoch, lr, total, terms)
        self.step = batch.step + 1

    def _forward(self, images: Tensor, batch: Batch) -> LossInputs:
        autocast = self.config.train.precision == "bf16"
        with torch.autocast(self.world.device.type, dtype=torch.bfloat16) if autocast else nullcontext():
            student_BK, embedding_BD, projected = self.module(images)
        words = batch.words if self.lessons.teacher is None else (_ask(self.lessons.teacher, batch),)
        return LossInputs(
            student_BK=student_BK,
            labels_B=batch.labels_B,
            embedding_BD=embedding_BD,
            teachers=tuple(
                TeacherInputs(
                    words=said,
                    projected={key: student_BD[number] for key, student_BD in projected.items()},
                    class_directions=directions,
                )
                for number, (said, directions) in enumerate(zip(words, self.lessons.class_directions, strict=True))
            ),
            partner_B=batch.partner_B,
            lambda_B=batch.lambda_B,
            sum_over_ranks=self.world.sum_with_gradient,
        )

    def _share(self, inputs: LossInputs, batch: Batch) -> BatchShare:
        num_labelled = inputs.num_labelled
        num_labelled_global = num_labelled
        if self.loss.needs_labels and self.config.data.missing_labels == "ignore":
            num_labelled_global = self.world.sum(num_labelled.clone())
        elif self.world.size > 1:
            num_labelled_global = batch.num_rows_global
        return BatchShare(
            world_size=self.world.size,
            num_rows=len(batch.labels_B),
            num_rows_global=batch.num_rows_global,
            num_labelled=num_labelled,
            num_labelled_global=num_labelled_global,
        )

    def _flush(self, log: StepLog, metrics: MetricsFile | None) -> None:
        records = log.flush()
        if metrics is not None and records:
            metrics.add(records)
            self._say("step", total_steps=self.total_steps, seconds=self.seconds, **records[-1])

    def _end_epoch(self, epoch: int, metrics: MetricsFile | None) -> Evaluation | None:
        last = self.step == self.total_steps
        train = self.config.train
        evaluation = None
        if last or (train.eval_every_epochs and epoch % train.eval_every_epochs == 0):
            evaluation = self._evaluate(epoch)
        if metrics is not None and (last or epoch % train.checkpoint_every_epochs == 0):
            metrics.publish()
            checkpoint.save(self.run_url, checkpoint.LAST, self._state())
        return evaluation

    def _evaluate(self, epoch: int) -> Evaluation | None:
        """Evaluates where there is something to evaluate on, and keeps the weights if none were better."""
        if self.evaluator is None:
            return None
        # Each rank's BatchNorm has statistics of its own since the last step; the checkpoint holds the leader's.
        self.world.copy_from_leader(self.student.buffers())
        evaluation = self.evaluator(self.student.model, self.spec)
        self._say("eval", epoch=epoch, **evaluation.as_dict())
        if evaluation.top1 is not None and (self.best_top1 is None or evaluation.top1 > self.best_top1):
            self.best_top1 = evaluation.top1
            if self.world.leads:
                checkpoint.save(self.run_url, checkpoint.BEST, self._state())
        return evaluation

    def _state(self) -> dict[str, Any]:
        return {
            "model": self.student.model.network.state_dict(),
            "projectors": self.student.projectors.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "step": self.step,
            "best_top1": self.best_top1,
            "seconds": self.seconds,
            "order": self._order_id(),
        }

    def _order_id(self) -> str:
        """What the position in a checkpoint counts in: another order would repeat some rows and skip others."""
        order = self.order
        rows = [*zip(order.shard_ids, order.num_ok_S.tolist(), strict=True)]
        return short([order.seed, order.global_batch_size, order.num_lanes, order.kind, order.tail, rows])

    def _resume(self) -> None:
        state = checkpoint.load(self.run_url, checkpoint.LAST)
        if state is None:
            return
        if state["order"] != self._order_id():
            raise ConfigError(
                "the checkpoint's position counts in another order of training",
                where=storage.redact(self.run_url),
                got="other shards, or other rows in them, than when the run was begun",
                next_step="restore the shards and their index, or choose another run.url",
            )
        self.student.model.network.load_state_dict(state["model"])
        self.student.projectors.load_state_dict(state["projectors"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step, self.best_top1, self.seconds = state["step"], state["best_top1"], state["seconds"]
        self.schedule.load_state_dict(state["schedule"])

    def _finish(self, evaluation: Evaluation | None, metrics: MetricsFile | None) -> dict[str, Any]:
        if evaluation is None:
            evaluation = self._evaluate(self.config.train.epochs)
        summary = {
            "steps": self.step,
            "epochs": self.config.train.epochs,
            "seconds": round(self.seconds, 3),
            "top1": None if evaluation is None else evaluation.top1,
            "top5": None if evaluation is None else evaluation.top5,
            "best_top1": self.best_top1,
        }
        if metrics is not None:
            metrics.publish()
            checkpoint.write_summary(self.run_url, summary)
        self.world.wait()
        self._say("end", **summary)
        return summary

    def _say(self, kind: str, **values: Any) -> None:
        if self.world.leads:
            self.report({"kind": kind, "run": self.run_url, **values})


def _ask(teacher: Teacher, batch: Batch) -> TeacherWords:
    pixels = batch.pixels_BCHW if batch.teacher_pixels_BCHW is None else batch.teacher_pixels_BCHW
    teacher_BK, teacher_BD = teacher.forward(pixels, batch.partner_B, batch.lambda_B, batch.cut_B4)
    return TeacherWords({None: teacher_BK}, teacher_BD.norm(dim=1), teacher_BD)


def _order(train: TrainConfig, lessons: Lessons) -> TrainingOrder:
    return TrainingOrder.build(
        lessons.source.shard_ids,
        lessons.source.num_ok,
        seed=train.seed,
        global_batch_size=train.global_batch_size,
        lanes=train.lanes,
        kind=train.order,
        tail=train.tail,
        plan=lessons.facts.plan,
    )


def _student(config: Config, lessons: Lessons, loss: CompositeLoss) -> tuple[Student, InputSpec]:
    """The student with its first weights, a function of ``train.seed`` alone, and what it eats."""
    assert config.student is not None
    loaded = load_model(
        config.student,
        num_classes=lessons.facts.num_classes,
        size=config.student.size or lessons.facts.size,
        seed=config.train.seed,
        where="student",
        allow_new_head=True,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.train.seed)
        student = Student(loaded.module, terms=loss.projected, teacher_dims=lessons.teacher_dims)
    return student, loaded.input


def _check_batches(order: TrainingOrder, student: Student, world_size: int) -> None:
    """Every rank has enough rows in every step: one without rows could not answer the others' gradients."""
    rows, step = order.fewest_rows(world_size)
    if rows >= student.min_rows:
        return
    all_rows = order.global_rows(step)
    reason = "; BatchNorm has no statistics of a single row" if rows else ""
    change = "set another train.global_batch_size, or fewer ray.num_workers"
    raise ConfigError(
        f"a rank would have too few rows in a step{reason}",
        where=f"step {step} of {order.num_steps} of every epoch",
        got=f"{rows} of its {all_rows} rows, over {world_size} ranks",
        wanted=f"at least {student.min_rows} rows on each",
        next_step=change if all_rows == order.global_batch_size else f"{change}, or train.tail: drop",
    )
