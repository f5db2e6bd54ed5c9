"""Everything that a training needs, built and checked before its run is claimed. Writes nothing."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from pipeline.core.errors import ConfigError
from pipeline.models import (
    InputSpec,
    LoadedModel,
    load_model,
    move_to_device,
    register_map_hooks,
    unsafe_in_channels_last,
)
from pipeline.student.data.batch import InputSize
from pipeline.student.data.dataset import StepDataset
from pipeline.student.data.loader import check_loaders
from pipeline.student.data.order import TrainingOrder, order_of
from pipeline.student.distributed import DistributedContext
from pipeline.student.losses import CompositeLoss
from pipeline.student.networks.freeze import freeze
from pipeline.student.networks.review import ReviewPlan, plan_review, review_section
from pipeline.student.networks.student import Student
from pipeline.student.networks.tokens import token_maps
from pipeline.student.supervision.class_frequencies import RowWeights, balanced_head
from pipeline.student.supervision.pixel_inputs import cache_inputs, check_same_input, input_of
from pipeline.student.supervision.spec import SupervisionSpec, resolve_spec
from pipeline.student.supervision.supervision import Supervision, open_supervision, required_targets
from pipeline.student.supervision.two_classes import check_two_classes
from pipeline.student.training.micro_batches import num_micro_batches, smallest_micro_batch
from pipeline.student.training.optimizer_step import OptimizerStep
from pipeline.student.training.teacher_checks import check_standardized
from pipeline.student.training.torch_switches import check_compiler, check_sync_batch_norm
from pipeline.tasks import task_of
from pipeline.teacher.inference import Teacher
from schemas.config import Config


@dataclass(frozen=True, slots=True)
class BuiltStudent:
    """A student on its device, with its initial weights.

    Attributes:
        channels_last: whether weights and images lie in channels-last memory.
        unsafe_layers: layers whose backward pass in channels-last memory can crash on this CPU.
        warnings: about the student's weights and memory layout.
        random_outputs: names of the outputs whose heads begin with random values.
    """

    module: Student
    input_spec: InputSpec
    channels_last: bool
    unsafe_layers: Sequence[str]
    warnings: tuple[str, ...]
    random_outputs: frozenset[str]


@dataclass(frozen=True, slots=True)
class TrainingSetup:
    """The parts of one training in one process, checked against each other.

    Attributes:
        dataset: this rank's batches, by global step.
        row_weights: None: all rows have the same weight.
    """

    config: Config
    distributed: DistributedContext
    loss: CompositeLoss
    supervision: Supervision
    order: TrainingOrder
    student: BuiltStudent
    dataset: StepDataset
    optimizer_step: OptimizerStep
    row_weights: RowWeights | None

    @property
    def run_url(self) -> str:
        assert self.config.run is not None
        return self.config.run.url

    @property
    def spec(self) -> SupervisionSpec:
        return self.supervision.spec

    @property
    def untrained(self) -> frozenset[str]:
        """Names of the student's outputs whose heads are not trained: they begin with random values, and no loss reads
        them."""
        return self.student.random_outputs - self.loss.student_outputs

    @property
    def total_steps(self) -> int:
        return self.config.train.epochs * self.order.num_steps

    def reopened(self) -> TrainingSetup:
        """The same networks on the states of the caches that the run has pinned."""
        self.close()
        teachers, device = self.supervision.teachers, self.distributed.device
        supervision = open_supervision(self.config, resolve_spec(self.config), self.loss, device, teachers=teachers)
        return _assemble(self.config, self.distributed, self.loss, supervision, student=self.student)

    def close(self) -> None:
        self.supervision.source.close()


def prepare(config: Config, distributed: DistributedContext) -> TrainingSetup:
    """Builds and checks all parts of a training. Every rank calls it; no rank waits for another.

    Raises:
        StillroomError: bad input: config, shards, index, cache, models, or this machine's resources.
    """
    spec = resolve_spec(config)
    loss = CompositeLoss(config.loss, task_of(spec.data), where="loss")
    check_standardized(config, loss)
    assert config.run is not None, "ensured by check_config"
    check_two_classes(loss, run_url=config.run.url)
    supervision = open_supervision(config, spec, loss, distributed.device)
    try:
        return _assemble(config, distributed, loss, supervision)
    except BaseException:
        supervision.source.close()
        raise


def _assemble(
    config: Config,
    distributed: DistributedContext,
    loss: CompositeLoss,
    supervision: Supervision,
    *,
    student: BuiltStudent | None = None,
) -> TrainingSetup:
    train, source, spec = config.train, supervision.source, supervision.spec
    order = order_of(train, source.shard_ids, source.num_ok, spec.plan, num_views=source.num_views)
    student = student or build_student(config, supervision, loss, distributed)
    inputs = {f"the teacher of {name}": input_of(teacher.loaded.input) for name, teacher in _named(config, supervision)}
    check_same_input(spec.plan, {**cache_inputs(spec.caches), **inputs, "the student": input_of(student.input_spec)})
    # With elastic workers, a batch that is too small for all of them is refused before the first is lost.
    _check_batches(order, student.module, max(distributed.size, config.ray.num_workers), train.accumulate)
    dataset = StepDataset(
        source,
        order,
        rank=distributed.rank,
        world_size=distributed.size,
        student=input_size(student.input_spec),
        teachers=[input_size(teacher.loaded.input) for teacher in supervision.teachers],
        max_pixels=spec.data.max_pixels,
        required_targets=required_targets(config, loss),
        student_views=spec.student_views,
    )
    check_loaders(dataset, num_workers=train.num_workers)
    if train.compile:
        check_compiler(distributed.device)
    total_steps = train.epochs * order.num_steps
    optimizer_step = OptimizerStep(student.module, train, total_steps=total_steps, device=distributed.device)
    balance, device = train.balance, distributed.device
    row_weights = None
    if balance is not None:
        column = balanced_head(balance, source.task).column
        row_weights = RowWeights.of(balance, column, supervision.class_counts[column], device)
    return TrainingSetup(config, distributed, loss, supervision, order, student, dataset, optimizer_step, row_weights)


def _named(config: Config, supervision: Supervision) -> Iterator[tuple[str, Teacher]]:
    """The online teachers, with their sections."""
    return zip(config.teacher.models, supervision.teachers, strict=False)


def input_size(spec: InputSpec) -> InputSize:
    return InputSize(spec.size, spec.interpolation)


def build_student(
    config: Config, supervision: Supervision, loss: CompositeLoss, distributed: DistributedContext
) -> BuiltStudent:
    """The student with its initial weights, which are a function of ``train.seed`` alone.

    Raises:
        StillroomError: the network cannot be built, or not with the options of ``train`` on this device.
    """
    assert config.student is not None
    device = distributed.device
    if config.train.sync_batch_norm:
        check_sync_batch_norm(device)
    loaded = load_model(
        config.student,
        widths=task_of(supervision.spec.data).widths,
        size=config.student.size or supervision.spec.size,
        seed=config.train.seed,
        where="student",
        allow_new_head=True,
    )
    review, maps = _review(config, loaded, supervision.teachers), token_maps(loss.token_layers, loaded)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.train.seed)
        student = Student(
            loaded.module,
            terms=loss.projected,
            teacher_dims=supervision.teacher_dims,
            token_maps=maps,
            teacher_tokens=supervision.teacher_tokens,
            review=review,
            sync_batch_norm=config.train.sync_batch_norm and distributed.size > 1,
        )
    unsafe_layers = unsafe_in_channels_last(student, device)
    channels_last = not unsafe_layers if config.train.channels_last is None else config.train.channels_last
    move_to_device(student.train(), device, channels_last=channels_last)
    freeze(student.model.network, config.train.freeze)
    return BuiltStudent(student, loaded.input, channels_last, unsafe_layers, tuple(loaded.notes), loaded.random_outputs)


def _review(config: Config, student: LoadedModel, teachers: Sequence[Teacher]) -> ReviewPlan | None:
    """The feature maps that ``review_kd`` compares; the teacher observes its own from now on. None without it."""
    section = review_section(config.loss)
    if section is None:
        return None
    assert len(teachers) == 1, "ensured by check_config"
    teacher = teachers[0]
    plan = plan_review(section, student, teacher.loaded)
    register_map_hooks(teacher.loaded.module.network, plan.teacher)
    return plan


def _check_batches(order: TrainingOrder, student: Student, world_size: int, accumulate: int) -> None:
    """Every rank has enough rows in every step: one without rows could not take part in the exchange of gradients."""
    rows, step = order.smallest_batch(world_size)
    all_rows = order.global_rows(step)
    num_chunks = num_micro_batches(accumulate, all_rows, order.global_batch_size)
    min_rows = smallest_micro_batch(rows, num_chunks, rows_per_unit=order.images_per_unit)
    if min_rows >= student.min_rows:
        return
    reason = "; BatchNorm has no statistics of a single row" if min_rows else ""
    smaller = "" if accumulate == 1 else ", a smaller train.accumulate"
    change = f"set another train.global_batch_size{smaller}, or fewer ray.num_workers"
    raise ConfigError(
        f"a rank would have too few rows in a {'step' if num_chunks == 1 else 'micro-batch'}{reason}",
        code="train.batch-too-small",
        where=f"step {step} of {order.num_steps} of every epoch",
        got=f"{rows} of its {all_rows} rows, over {world_size} ranks"
        + (f", split into {num_chunks}" if num_chunks > 1 else ""),
        expected=f"at least {student.min_rows} rows {'on each' if num_chunks == 1 else 'in each'}",
        next_step=change if all_rows == order.global_batch_size else f"{change}, or train.tail: drop",
    )
