"""Accuracy and calibration on validation shards, and agreement with the teacher on the same pictures.

In fp32, whatever a student was trained in: the numbers are those of its weights, as anyone who exports them will see.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity, kl_div

from pipeline.augment.pixels import to_input
from pipeline.cache.build.ranking import class_ranks, predicted_classes
from pipeline.core.errors import CacheError, ConfigError, EvaluationError, ShardError, StorageInputError
from pipeline.core.hashing import weights_digest
from pipeline.core.redaction import quoted, redact
from pipeline.models import EmbeddingModel, InputSpec
from pipeline.shards.index import IndexBuilder, ShardIndex, check_samples
from pipeline.shards.shard_urls import report_moved, shard_id, shard_ids, shard_urls
from pipeline.shards.tar import read_samples
from pipeline.student.data.local_store import NodeStore
from pipeline.student.distributed import DistributedContext
from pipeline.student.evaluation.loaded_run import CheckpointName, load_run
from pipeline.student.supervision.spec import SupervisionSpec
from pipeline.teacher.inference import Teacher, load_teacher
from pipeline.teacher.rendering import GroupViews, Rendering, read_groups
from schemas.cache_format import ViewBlock
from schemas.config import Config, DataConfig, ViewsConfig

if TYPE_CHECKING:
    from torchmetrics.classification import MulticlassCalibrationError

_BATCH = 128
_ECE_BINS = 15
_NUM_NAMED = 3
_BEST_BY = ("top1", "agreement", "cosine")


@dataclass(frozen=True, slots=True)
class Evaluation:
    """None where nothing was measured.

    Attributes:
        top1, top5: shares of the labelled rows, by the rank of ``class_ranks``.
        ece: expected calibration error (Guo 2017): mean over the labelled rows of |accuracy - confidence| in 15 bins.
        agreement: share of the rows on whose class student and teacher agree.
        kl: mean over the rows of KL(teacher ‖ student) at T = 1, in nats.
        teacher_top1: share of the labelled rows.
        cosine: mean over the rows of the cosine between the embeddings of student and teacher, through the projector of
            the first loss that has one; of students that learn from embeddings.
        head_trained: False: no loss read the student's logits, and its head began with random weights. Nothing is
            measured of its logits then.
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
        """The numbers alone."""
        return {name: value for name, value in self.as_dict().items() if name != "head_trained"}


@dataclass(frozen=True, slots=True)
class Score:
    """The metric that selects the best checkpoint; more is better."""

    metric: str
    value: float

    @classmethod
    def of(cls, evaluation: Mapping[str, float | int | None]) -> Score | None:
        """Top-1; without labels agreement with the teacher; without a trained head the cosine to the teacher.

        None where none of these is measured.
        """
        measured = ((name, evaluation.get(name)) for name in _BEST_BY)
        return next((cls(name, value) for name, value in measured if value is not None), None)

    def beats(self, best: Score | None) -> bool:
        """Equal values are no improvement; another metric begins a new comparison."""
        return best is None or best.metric != self.metric or self.value > best.value


@dataclass(frozen=True, slots=True)
class Subject:
    """What is measured of a student.

    Attributes:
        head_trained: see ``Evaluation``.
        projector: from the student's embedding to the teacher's width, where a loss compares embeddings.
    """

    head_trained: bool = True
    projector: nn.Module | None = None


_CLASSIFIER = Subject()


@dataclass(frozen=True, slots=True)
class _Outputs:
    """Of one network for N images, fp32 on the CPU; the student's embedding in the teacher's width."""

    logits_NK: Tensor
    embedding_ND: Tensor


@dataclass(frozen=True, slots=True)
class PrecomputedTeacher:
    """A teacher's outputs for one rank's share of the validation images; its network need not stay in memory.

    Attributes:
        groups: of each shard, by URL: the keys of each mix group's samples, and what the teacher answered.
    """

    groups: Mapping[str, list[tuple[list[str], _Outputs]]]

    @property
    def size_bytes(self) -> int:
        asked = (outputs for groups in self.groups.values() for _, outputs in groups)
        return sum(outputs.logits_NK.nbytes + outputs.embedding_ND.nbytes for outputs in asked)

    def answers(self, url: str, groups: Iterator[GroupViews]) -> Iterator[tuple[GroupViews, _Outputs]]:
        """
        Raises:
            ShardError: the shard no longer holds the samples that the teacher was asked about.
        """
        kept = self.groups[url]
        num_seen = 0
        for group in groups:
            keys = [sample.key for sample in group.samples]
            if num_seen == len(kept) or kept[num_seen][0] != keys:
                raise _changed_shard(url)
            yield group, kept[num_seen][1]
            num_seen += 1
        if num_seen < len(kept):
            raise _changed_shard(url)


def _changed_shard(url: str) -> ShardError:
    return ShardError(
        "a validation shard was replaced while the run goes on",
        code="shard.replaced",
        where=redact(url),
        got="other samples than those that the teacher was asked about before the first step",
        next_step="run the command again: it goes on from its last checkpoint and asks the teacher anew",
    )


@dataclass(slots=True)
class _MetricSums:
    """What one rank has counted."""

    subject: Subject
    calibration: MulticlassCalibrationError
    rows: int = 0
    labelled: int = 0
    top1: int = 0
    top5: int = 0
    agreed: int = 0
    teacher_top1: int = 0
    kl: float = 0.0
    cosine: float = 0.0

    def add(self, student: _Outputs, teacher: _Outputs | None, label_N: Tensor) -> None:
        """Finite outputs alone."""
        self.rows += len(label_N)
        self.labelled += int((label_N >= 0).sum())
        if self.subject.head_trained:
            self._classify(student.logits_NK, label_N)
        if teacher is not None:
            class_N = predicted_classes(teacher.logits_NK.numpy())
            self.teacher_top1 += int((class_N == label_N.numpy()).sum())
            self._compare(student, teacher, class_N)

    def _classify(self, logits_NK: Tensor, label_N: Tensor) -> None:
        labelled_N = label_N >= 0
        logits_MK, label_M = logits_NK[labelled_N], label_N[labelled_N].long()
        rank_M = class_ranks(logits_MK.numpy(), label_M.numpy())
        self.top1 += int((rank_M < 1).sum())
        self.top5 += int((rank_M < 5).sum())
        if len(label_M):
            # As probabilities: logits that happen to lie in [0, 1] would be taken for such.
            device = self.calibration.device
            self.calibration.update(logits_MK.softmax(1).to(device), label_M.to(device))

    def _compare(self, student: _Outputs, teacher: _Outputs, class_N: NDArray[np.int64]) -> None:
        if self.subject.head_trained:
            self.agreed += int((predicted_classes(student.logits_NK.numpy()) == class_N).sum())
            log_p, log_q = (outputs.logits_NK.double().log_softmax(1) for outputs in (teacher, student))
            self.kl += float(kl_div(log_q, log_p, reduction="sum", log_target=True))
        if self.subject.projector is not None:
            self.cosine += float(cosine_similarity(student.embedding_ND.double(), teacher.embedding_ND.double()).sum())

    def finish(self, distributed: DistributedContext, *, compared: bool) -> Evaluation | None:
        """Of all ranks together; None where none of them has seen an image."""
        counts = [self.rows, self.labelled, self.top1, self.top5, self.agreed, self.teacher_top1, self.kl, self.cosine]
        summed = distributed.sum(torch.tensor(counts, dtype=torch.float64, device=distributed.device)).tolist()
        rows, labelled, top1, top5, agreed, teacher_top1, kl, cosine = summed
        if not rows:
            return None
        head_trained = self.subject.head_trained
        classified = head_trained and labelled > 0
        return Evaluation(
            num_rows=int(rows),
            top1=top1 / labelled if classified else None,
            top5=top5 / labelled if classified else None,
            ece=float(self.calibration.compute()) if classified else None,
            agreement=agreed / rows if compared and head_trained else None,
            kl=kl / rows if compared and head_trained else None,
            teacher_top1=teacher_top1 / labelled if compared and labelled else None,
            cosine=cosine / rows if compared and self.subject.projector is not None else None,
            head_trained=head_trained,
        )


@dataclass(slots=True)
class _FiniteRows:
    """Counts the rows of one shard whose outputs are not finite: no rank, confidence or agreement can be read there."""

    rows: int = 0
    bad: dict[str, list[str]] = field(default_factory=lambda: {"student": [], "teacher": []})
    """Keys of the samples."""

    def add(self, group: GroupViews, student: _Outputs, teacher: _Outputs | None) -> bool:
        """Whether all logits and embeddings so far are finite."""
        self.rows += len(group.samples)
        for name, outputs in (("student", student), ("teacher", teacher)):
            if outputs is not None:
                bad_N = ~(outputs.logits_NK.isfinite().all(1) & outputs.embedding_ND.isfinite().all(1))
                self.bad[name] += [group.samples[row].key for row in bad_N.nonzero().flatten().tolist()]
        return not any(self.bad.values())

    def check(self, *, where: str) -> None:
        """
        Raises:
            EvaluationError: there are such rows.
        """
        for name, keys in self.bad.items():
            if keys:
                raise EvaluationError(
                    f"the {name}'s outputs are not finite",
                    code=f"evaluate.{name}-not-finite",
                    where=f"{where}, first keys {', '.join(keys[:_NUM_NAMED])}",
                    got=f"NaN or infinity in {len(keys)} of {self.rows} rows",
                    next_step="train again with a lower train.lr or with train.clip_norm, in another run.url"
                    if name == "student"
                    else "set teacher.precision=fp32, or check teacher.weights",
                )


@dataclass(frozen=True, slots=True)
class Evaluator:
    """Evaluates models on the eval views of validation shards; each rank reads its share of the shards."""

    urls: list[str]
    data: DataConfig
    plan: ViewsConfig
    distributed: DistributedContext
    num_threads: int = 1
    key: str = "data.val_shards"
    """Configuration key or option that names the shards, for messages."""

    def report_moved(self) -> AbstractContextManager[None]:
        """See ``pipeline.shards.shard_urls``."""
        return report_moved(self.urls, f"set {self.key} to their place now, {{}}")

    @property
    def own_urls(self) -> list[str]:
        """This rank's share of the shards."""
        return self.urls[self.distributed.rank :: self.distributed.size]

    def __call__(
        self,
        model: EmbeddingModel,
        spec: InputSpec,
        teacher: Teacher | PrecomputedTeacher | None = None,
        *,
        subject: Subject = _CLASSIFIER,
        on_index: Callable[[ShardIndex], None] | None = None,
    ) -> Evaluation:
        """Leaves each module of the model in the mode it was in: frozen ones may differ from the others.

        Args:
            subject: what is measured, besides what labels and teacher allow.
            on_index: told the index of each shard that this rank has read, which an evaluation makes anyway.

        Raises:
            ConfigError: the shards hold no images.
            EvaluationError: student or teacher produce logits or embeddings that are not finite.
        """
        networks = [model] if subject.projector is None else [model, subject.projector]
        modes = {module: module.training for network in networks for module in network.modules()}
        for network in networks:
            network.eval()
        tally = _MetricSums(subject, self._calibration())
        try:
            for url in self.own_urls:
                index = self._shard(url, model, spec, teacher, tally)
                if on_index is not None:
                    on_index(index)
        finally:
            for module, was_training in modes.items():
                module.training = was_training
        found = tally.finish(self.distributed, compared=teacher is not None)
        if found is None:
            raise ConfigError(
                "there are no images to evaluate on",
                code="data.no-validation-images",
                where=self.key,
                got=f"{len(self.urls)} shards",
            )
        return found

    @torch.inference_mode()
    def ask(self, teacher: Teacher, *, with_embeddings: bool) -> PrecomputedTeacher:
        """A teacher's outputs for all images of this rank, for evaluations that come later."""
        asked: dict[str, list[tuple[list[str], _Outputs]]] = {}
        for url in self.own_urls:
            with self._held(url) as local, ThreadPoolExecutor(self.num_threads) as pool:
                groups = self._groups(local, url, teacher.loaded.input, pool, IndexBuilder(shard_id(url)))
                asked[url] = [
                    (
                        [sample.key for sample in group.samples],
                        _outputs_of_teacher(teacher, group, with_embeddings=with_embeddings),
                    )
                    for group in groups
                ]
        return PrecomputedTeacher(asked)

    def _calibration(self) -> MulticlassCalibrationError:
        """Gathers confidences over all ranks by itself, also from ranks without any."""
        # Seconds that no process pays that does not evaluate.
        from torchmetrics.classification import MulticlassCalibrationError

        assert self.data.num_classes is not None
        metric = MulticlassCalibrationError(self.data.num_classes, n_bins=_ECE_BINS, norm="l1")
        return metric.to(self.distributed.device)

    @torch.inference_mode()
    def _shard(
        self,
        url: str,
        model: EmbeddingModel,
        spec: InputSpec,
        teacher: Teacher | PrecomputedTeacher | None,
        tally: _MetricSums,
    ) -> ShardIndex:
        builder = IndexBuilder(shard_id(url))
        finite = _FiniteRows()
        with self._held(url) as local, ThreadPoolExecutor(self.num_threads) as pool:
            for group, of_teacher in self._pairs(local, url, spec, teacher, pool, builder):
                outputs = _outputs(model, spec, group.pixels_VNCHW[0], self.distributed.device, tally.subject.projector)
                if finite.add(group, outputs, of_teacher):
                    tally.add(outputs, of_teacher, torch.from_numpy(group.label_N))
        index = builder.finish()
        finite.check(where=redact(url))
        check_samples(index, self.data, where=url)
        return index

    @contextmanager
    def _held(self, url: str) -> Generator[Path]:
        """The local file of a shard."""
        with self.report_moved():
            file = NodeStore.of(self.data).acquire_url(url)
        with file as held:
            yield held.path

    def _pairs(
        self,
        local: Path,
        url: str,
        spec: InputSpec,
        teacher: Teacher | PrecomputedTeacher | None,
        pool: ThreadPoolExecutor,
        builder: IndexBuilder,
    ) -> Iterator[tuple[GroupViews, _Outputs | None]]:
        """Each mix group as the student sees it, and the teacher's outputs for the same images."""
        own = self._groups(local, url, spec, pool, builder)
        if teacher is None:
            return ((group, None) for group in own)
        if isinstance(teacher, PrecomputedTeacher):
            return teacher.answers(url, own)
        if _rendering(teacher.loaded.input) == _rendering(spec):
            return ((group, _outputs_of_teacher(teacher, group)) for group in own)
        theirs = self._groups(local, url, teacher.loaded.input, pool, IndexBuilder(shard_id(url)))
        return zip(own, (_outputs_of_teacher(teacher, group) for group in theirs), strict=True)

    def _groups(
        self, local: Path, url: str, spec: InputSpec, pool: ThreadPoolExecutor, builder: IndexBuilder
    ) -> Iterator[GroupViews]:
        rendering = Rendering(
            plan=self.plan,
            block=ViewBlock(start=0, stop=1, is_eval=True),
            size=spec.size,
            interpolation=spec.interpolation,
        )
        samples = read_samples(local, self.data, where=redact(url), notes=builder.notes)
        return read_groups(
            samples, rendering, pool, shard_id=shard_id(url), max_pixels=self.data.max_pixels, builder=builder
        )


def _rendering(spec: InputSpec) -> tuple[int, str]:
    """What the pixels that a network eats depend on."""
    return spec.size, spec.interpolation


def _outputs(
    model: EmbeddingModel, spec: InputSpec, pixels_NCHW: Tensor, device: torch.device, projector: nn.Module | None
) -> _Outputs:
    mean_C, std_C = torch.tensor(spec.mean, device=device), torch.tensor(spec.std, device=device)
    logits: list[Tensor] = []
    embeddings: list[Tensor] = []
    for pixels_BCHW in pixels_NCHW.split(_BATCH):
        logits_BK, embedding_BD = model(to_input(pixels_BCHW.to(device), mean_C=mean_C, std_C=std_C))
        logits.append(logits_BK.float().cpu())
        embeddings.append((embedding_BD if projector is None else projector(embedding_BD)).float().cpu())
    return _Outputs(torch.cat(logits), torch.cat(embeddings))


def _outputs_of_teacher(teacher: Teacher, group: GroupViews, *, with_embeddings: bool = True) -> _Outputs:
    logits_NK, embedding_ND = teacher.infer_on_device(group.pixels_VNCHW[0])
    return _Outputs(logits_NK.cpu(), (embedding_ND if with_embeddings else embedding_ND[:, :0]).cpu())


def make_evaluator(
    shards: str | tuple[str, ...],
    data: DataConfig,
    plan: ViewsConfig,
    distributed: DistributedContext,
    *,
    num_threads: int,
    key: str = "data.val_shards",
) -> Evaluator:
    """
    Raises:
        ShardError: two shards share a name, or one is no plain tar.
        StorageInputError: a shard does not exist, or its URL is refused.
    """
    urls = shard_urls(shards, key=key)
    shard_ids(urls)
    return Evaluator(urls, data, plan, distributed, num_threads, key)


def evaluate_run(
    run_url: str,
    shards: str | tuple[str, ...],
    *,
    checkpoint_name: CheckpointName,
    num_threads: int,
    device: torch.device,
    with_teacher: bool = True,
    on_index: Callable[[ShardIndex], None] | None = None,
) -> Evaluation:
    """A trained student on validation shards; with the agreement, where the run's config names its teacher.

    Args:
        checkpoint_name: ``best`` or ``last``.
        with_teacher: False measures no agreement, and needs no weights of the teacher.
        on_index: called with the index of each shard.

    Raises:
        StorageInputError: the teacher's weights cannot be read.
        ConfigError: there is no run, or it has no such checkpoint.
        CacheError: the teacher that the config names is not the one whose words the student learnt.
    """
    trained = load_run(run_url, checkpoint_name)
    supervision, student = trained.supervision, trained.student
    alone = f"measure the student alone: stillroom evaluate {quoted(run_url)} --shards … --without-teacher"
    teacher = teacher_for_agreement(trained.config, supervision, device, or_else=alone) if with_teacher else None
    projector = None if teacher is None else trained.projector(teacher.module.embedding_dim)
    subject = Subject(trained.head_trained, None if projector is None else projector.to(device))
    evaluator = make_evaluator(
        shards,
        supervision.data,
        supervision.student_plan,
        DistributedContext(device=device),
        num_threads=num_threads,
        key="--shards",
    )
    return evaluator(student.module.to(device), student.input, teacher, subject=subject, on_index=on_index)


def teacher_for_agreement(
    config: Config, supervision: SupervisionSpec, device: torch.device, *, or_else: str
) -> Teacher | None:
    """As ``teacher_of_run``; ``or_else`` is what to do where its weights are gone."""
    try:
        return teacher_of_run(config, supervision, device)
    except StorageInputError as error:
        raise StorageInputError(
            "the teacher's weights cannot be read, so agreement and KL cannot be measured",
            code=error.code,
            where=error.where,
            got=error.got,
            next_step=f"restore the file, or {or_else}",
        ) from error


def teacher_of_run(config: Config, supervision: SupervisionSpec, device: torch.device) -> Teacher | None:
    """The teacher that a run's config names with its weights, if it names one and no others.

    Raises:
        CacheError: it is not the one whose words the run's cache holds.
    """
    # Agreement is measured with one teacher alone.
    if config.teacher.model is None or config.teacher.weights is None or config.teacher.others:
        return None
    teacher = load_teacher(
        config.teacher, num_classes=supervision.num_classes, size=config.views.size or supervision.size, device=device
    )
    # Beside several caches no teacher is named.
    cached = [str(cache.header.teacher["weights"]) for cache in supervision.caches]
    if cached and weights_digest(teacher.state()) != cached[0]:
        raise CacheError(
            "the teacher of this config is not the one whose words were cached",
            code="cache.other-teacher",
            where="teacher.weights",
            got=redact(str(config.teacher.weights)),
            expected=f"weights with digest {cached[0][:16]}",
            next_step="name the cache's teacher, or no teacher at all; a cached run needs none",
        )
    return teacher
