"""Evaluates a student on validation shards, and compares it with a teacher on the same images.

Always in fp32, whatever the training precision: the metrics are those of the weights, as an export has them.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Generator, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from itertools import zip_longest
from pathlib import Path

import pyarrow as pa
import torch
from torch import Tensor, nn

from pipeline.augment.pixels import to_input
from pipeline.core.errors import ConfigError, ShardError
from pipeline.core.redaction import quoted, redact
from pipeline.models import EmbeddingModel, InputSpec
from pipeline.shards.index import IndexBuilder, ShardIndex, check_samples
from pipeline.shards.shard_urls import report_moved, shard_id, shard_ids, shard_urls
from pipeline.shards.tar import read_samples
from pipeline.student.data.local_store import NodeStore
from pipeline.student.distributed import DistributedContext
from pipeline.student.evaluation.compared_teacher import teacher_for_agreement
from pipeline.student.evaluation.finite import FiniteRows
from pipeline.student.evaluation.images import images_table
from pipeline.student.evaluation.loaded_run import CheckpointName, load_run
from pipeline.student.evaluation.metrics import BACKBONE, Evaluation, EvaluationScope, MetricSums, Outputs, metrics_of
from pipeline.student.evaluation.metrics.reference import Reference
from pipeline.student.evaluation.reference_images import ReferenceImages, check_reference
from pipeline.student.losses import CompositeLoss
from pipeline.student.supervision.standardization import standardizer_of, standardizers_of
from pipeline.tasks import EMBEDDING, task_of
from pipeline.teacher.inference import Teacher
from pipeline.teacher.rendering import GroupViews, Rendering, read_groups
from schemas.cache_format import ViewBlock
from schemas.config import DataConfig, ViewsConfig

BATCH_SIZE = 128
_DEFAULT_SCOPE = EvaluationScope()


@dataclass(frozen=True, slots=True)
class PrecomputedTeacher:
    """A teacher's outputs for one rank's share of the validation images; its network can be released.

    Attributes:
        groups: by the URL of a shard, the sample keys of each mix group and the teacher's outputs for them.
    """

    groups: Mapping[str, list[tuple[list[str], Outputs]]]

    @property
    def size_bytes(self) -> int:
        all_outputs = (outputs for groups in self.groups.values() for _, outputs in groups)
        return sum(values.nbytes for outputs in all_outputs for values in outputs.values())

    def join(self, url: str, groups: Iterator[GroupViews]) -> Iterator[tuple[GroupViews, Outputs]]:
        """Each mix group of a shard with the teacher's outputs.

        Raises:
            ShardError: the samples of the shard have changed since the outputs were computed.
        """
        for group, stored in zip_longest(groups, self.groups[url]):
            if group is None or stored is None or stored[0] != _keys(group):
                raise ShardError(
                    "a validation shard was replaced during the run",
                    code="shard.replaced",
                    where=redact(url),
                    got="other samples than those for which the teacher's outputs were computed before the first step",
                    next_step="run the command again: it continues from its last checkpoint and computes the outputs "
                    "again",
                )
            yield group, stored[1]


def _keys(group: GroupViews) -> list[str]:
    return [sample.key for sample in group.samples]


@dataclass(frozen=True, slots=True)
class _OpenShard:
    """A shard as a file of this node, and the threads that render its images."""

    url: str
    path: Path
    pool: ThreadPoolExecutor
    data: DataConfig
    plan: ViewsConfig

    def new_builder(self) -> IndexBuilder:
        return IndexBuilder(shard_id(self.url), task_of(self.data))

    def groups(self, spec: InputSpec, builder: IndexBuilder) -> Iterator[GroupViews]:
        """The mix groups of the shard, rendered for a network; ``builder`` collects the index of the shard."""
        return read_groups(
            read_samples(self.path, self.data, where=redact(self.url), notes=builder.notes),
            Rendering.of(shard_id(self.url), self.plan, ViewBlock(start=0, stop=1, is_eval=True), spec, self.data),
            self.pool,
            builder=builder,
        )

    def groups_with_teacher(
        self, spec: InputSpec, teacher: Teacher | PrecomputedTeacher | None, builder: IndexBuilder
    ) -> Iterator[tuple[GroupViews, Outputs | None]]:
        """Each mix group rendered for the student, and the teacher's outputs for the same images."""
        groups = self.groups(spec, builder)
        if teacher is None:
            return ((group, None) for group in groups)
        if isinstance(teacher, PrecomputedTeacher):
            return teacher.join(self.url, groups)
        teacher_spec = teacher.loaded.input
        if (teacher_spec.size, teacher_spec.interpolation) == (spec.size, spec.interpolation):
            return ((group, _teacher_outputs(teacher, group)) for group in groups)
        teacher_groups = self.groups(teacher_spec, self.new_builder())
        return zip(groups, (_teacher_outputs(teacher, group) for group in teacher_groups), strict=True)


@dataclass(frozen=True, slots=True)
class Evaluator:
    """Evaluates models on the eval views of validation shards; each rank reads its share of the shards."""

    urls: list[str]
    data: DataConfig
    plan: ViewsConfig
    distributed: DistributedContext
    num_threads: int = 1
    key: str = "data.val_shards"
    """The configuration key or option that names the shards, for messages."""
    reference: Evaluator | None = None
    """Of the labelled shards with whose embeddings metrics compare."""

    def report_moved(self) -> AbstractContextManager[None]:
        """See ``pipeline.shards.shard_urls``."""
        return report_moved(self.urls, f"set {self.key} to their place now, {{}}")

    @property
    def rank_urls(self) -> list[str]:
        """This rank's share of the shards."""
        return self.urls[self.distributed.rank :: self.distributed.size]

    def __call__(
        self,
        model: EmbeddingModel,
        spec: InputSpec,
        teacher: Teacher | PrecomputedTeacher | None = None,
        *,
        scope: EvaluationScope = _DEFAULT_SCOPE,
        on_index: Callable[[ShardIndex], None] | None = None,
        is_last: bool = True,
    ) -> Evaluation:
        """Evaluates a model. Every rank calls it.

        Args:
            scope: which metrics apply, besides what targets and teacher allow.
            on_index: called with the index of each shard that this rank has read.
            is_last: measure also what takes long.

        Raises:
            ConfigError: the shards hold no images, or the reference has no labels of two classes.
            EvaluationError: student or teacher produce outputs that are not finite.
        """
        metrics, distributed = metrics_of(self.data), self.distributed
        images: list[tuple[str, pa.StringArray]] = []
        if self.reference is not None:
            scope = replace(scope, reference=self.reference.embed(model, spec, fits_probe=is_last))
        sums = metrics.sums(self.data, scope, distributed.device)
        with _eval_mode([model] if scope.projector is None else [model, scope.projector]):
            for url in self.rank_urls:
                index = self._add_shard(url, model, spec, teacher, sums, scope)
                images.append((index.shard_id, index.keys.take(pa.array(index.ok))))
                if on_index is not None:
                    on_index(index)
        num_rows = torch.tensor(sum(len(keys) for _, keys in images), device=distributed.device)
        total_rows = int(distributed.sum(num_rows))
        if not total_rows:
            raise ConfigError(
                "there are no images to evaluate on",
                code="data.no-validation-images",
                where=self.key,
                got=f"{len(self.urls)} shards",
            )
        values, names = sums.finish(distributed), task_of(self.data).class_names
        per_class = sums.per_class()
        heads = {key: key.rpartition("/")[0] or None for key in per_class}
        return Evaluation(
            definitions=metrics.metrics,
            num_rows=total_rows,
            metrics={metric.key: values[metric.key] for metric in metrics.metrics},
            untrained=sorted(scope.untrained),
            per_class=per_class,
            class_names={key: names[head] for key, head in heads.items() if head in names},
            by_domain=sums.by_domain(),
            images=images_table(images, sums),
        )

    @torch.inference_mode()
    def embed(self, model: EmbeddingModel, spec: InputSpec, *, fits_probe: bool) -> Reference:
        """The embeddings of the labelled images of all ranks. Every rank calls it.

        Raises:
            ConfigError: the images have no labels of two classes.
            EvaluationError: the model produces outputs that are not finite.
        """
        images = ReferenceImages()
        with _eval_mode([model]):
            for url in self.rank_urls:
                finite = FiniteRows()
                with self._open(url) as shard:
                    builder = shard.new_builder()
                    for group in shard.groups(spec, builder):
                        outputs = _student_outputs(model, spec, group.pixels_VNCHW[0], self.distributed.device, None)
                        if finite.add(_keys(group), outputs, None):
                            images.add(outputs[EMBEDDING], group.targets, group.sample_ids)
                finite.check(where=redact(url))
                check_samples(builder.finish(), self.data, where=url)
        return images.of_all_ranks(self.distributed, model.embedding_dim, fits_probe=fits_probe, where=self.key)

    @torch.inference_mode()
    def precompute(self, teacher: Teacher, *, scope: EvaluationScope = _DEFAULT_SCOPE) -> PrecomputedTeacher:
        """A teacher's outputs for all images of this rank, for later evaluations in this scope."""
        names = metrics_of(self.data).teacher_outputs(scope)
        stored: dict[str, list[tuple[list[str], Outputs]]] = {}
        for url in self.rank_urls:
            with self._open(url) as shard:
                stored[url] = [
                    (_keys(group), _teacher_outputs(teacher, group, names))
                    for group in shard.groups(teacher.loaded.input, shard.new_builder())
                ]
        return PrecomputedTeacher(stored)

    @torch.inference_mode()
    def _add_shard(
        self,
        url: str,
        model: EmbeddingModel,
        spec: InputSpec,
        teacher: Teacher | PrecomputedTeacher | None,
        sums: MetricSums,
        scope: EvaluationScope,
    ) -> ShardIndex:
        finite = FiniteRows()
        with self._open(url) as shard:
            builder = shard.new_builder()
            for group, teacher_outputs in shard.groups_with_teacher(spec, teacher, builder):
                pixels_NCHW = group.pixels_VNCHW[0]
                outputs = _student_outputs(model, spec, pixels_NCHW, self.distributed.device, scope.projector)
                if scope.standardize is not None and teacher_outputs and EMBEDDING in teacher_outputs:
                    embedding_ND = scope.standardize(teacher_outputs[EMBEDDING].to(self.distributed.device)).cpu()
                    teacher_outputs = {**teacher_outputs, EMBEDDING: embedding_ND}
                if finite.add(_keys(group), outputs, teacher_outputs):
                    sums.add(outputs, teacher_outputs, group.targets)
        index = builder.finish()
        finite.check(where=redact(url))
        check_samples(index, self.data, where=url)
        return index

    @contextmanager
    def _open(self, url: str) -> Generator[_OpenShard]:
        with self.report_moved():
            lease = NodeStore.of(self.data).acquire_url(url)
        with lease as file, ThreadPoolExecutor(self.num_threads) as pool:
            yield _OpenShard(url, file.path, pool, self.data, self.plan)


@contextmanager
def _eval_mode(networks: Sequence[nn.Module]) -> Generator[None]:
    """Each module returns to its mode: frozen modules may have another mode than the others."""
    modes = {module: module.training for network in networks for module in network.modules()}
    for network in networks:
        network.eval()
    try:
        yield
    finally:
        for module, was_training in modes.items():
            module.training = was_training


def _student_outputs(
    model: EmbeddingModel, spec: InputSpec, pixels_NCHW: Tensor, device: torch.device, projector: nn.Module | None
) -> Outputs:
    mean_C, std_C = torch.tensor(spec.mean, device=device), torch.tensor(spec.std, device=device)
    batches: list[Outputs] = []
    for pixels_BCHW in pixels_NCHW.split(BATCH_SIZE):
        outputs: dict[str, Tensor] = model(to_input(pixels_BCHW.to(device), mean_C=mean_C, std_C=std_C))
        if projector is not None:
            outputs |= {BACKBONE: outputs[EMBEDDING], EMBEDDING: projector(outputs[EMBEDDING])}
        batches.append({name: values.float().cpu() for name, values in outputs.items()})
    return {name: torch.cat([outputs[name] for outputs in batches]) for name in batches[0]}


def _teacher_outputs(teacher: Teacher, group: GroupViews, names: Container[str] | None = None) -> Outputs:
    """Those of these names; None: all."""
    outputs = teacher.infer_on_device(group.pixels_VNCHW[0])
    return {name: values.cpu() for name, values in outputs.items() if names is None or name in names}


def build_evaluator(
    shards: str | tuple[str, ...],
    data: DataConfig,
    plan: ViewsConfig,
    distributed: DistributedContext,
    *,
    num_threads: int,
    key: str = "data.val_shards",
    reference: str | tuple[str, ...] | None = None,
    reference_key: str = "train.eval_reference",
) -> Evaluator:
    """
    Args:
        reference: labelled shards with whose embeddings metrics compare.

    Raises:
        ConfigError: no metric of the task compares with a reference, or it has a shard that is evaluated.
        ShardError: two shards share a name, or one is no plain tar.
        StorageInputError: a shard does not exist, or its URL is refused.
    """
    urls = shard_urls(shards, key=key)
    shard_ids(urls)
    evaluator = Evaluator(urls, data, plan, distributed, num_threads, key)
    if reference is None:
        return evaluator
    reference_urls = shard_urls(reference, key=reference_key)
    shard_ids(reference_urls)
    check_reference(reference_urls, urls, data, key=reference_key)
    return replace(evaluator, reference=replace(evaluator, urls=reference_urls, key=reference_key))


def evaluate_run(
    run_url: str,
    shards: str | tuple[str, ...],
    *,
    checkpoint_name: CheckpointName,
    num_threads: int,
    device: torch.device,
    with_teacher: bool = True,
    reference: str | tuple[str, ...] | None = None,
    on_index: Callable[[ShardIndex], None] | None = None,
) -> Evaluation:
    """Evaluates the student of a run on validation shards, with its agreement if the run's config names its teacher.

    Args:
        checkpoint_name: ``best`` or ``last``.
        with_teacher: False measures no agreement and needs no teacher weights.
        reference: as in ``build_evaluator``.
        on_index: called with the index of each shard.

    Raises:
        StorageInputError: the teacher's weights cannot be read.
        ConfigError: there is no run, or it has no such checkpoint.
        CacheError: the teacher that the config names is not the one whose outputs the student was trained on.
    """
    loaded = load_run(run_url, checkpoint_name)
    supervision, student = loaded.supervision, loaded.student
    without = f"measure the student alone: stillroom evaluate {quoted(run_url)} --shards … --without-teacher"
    teacher = teacher_for_agreement(loaded.config, supervision, device, or_else=without) if with_teacher else None
    projector = None if teacher is None else loaded.projector(teacher.module.embedding_dim)
    loss = CompositeLoss(loaded.config.loss, task_of(supervision.data), where="loss")
    scope = EvaluationScope(
        loaded.untrained,
        None if projector is None else projector.to(device),
        None if projector is None else standardizer_of(loss, standardizers_of(loaded.config, supervision, device)),
    )
    evaluator = build_evaluator(
        shards,
        supervision.data,
        supervision.student_plan,
        DistributedContext(device=device),
        num_threads=num_threads,
        key="--shards",
        reference=reference,
        reference_key="--reference",
    )
    return evaluator(student.module.to(device), student.input, teacher, scope=scope, on_index=on_index)
