"""Accuracy on validation shards, and agreement with the teacher on the same pictures."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from pipeline import storage
from pipeline.errors import CacheError, ConfigError
from pipeline.fingerprint import weights_digest
from pipeline.models import EmbeddingModel, InputSpec, load_model
from pipeline.shards.index import IndexBuilder, check_samples
from pipeline.shards.names import shard_id, shard_ids
from pipeline.student import checkpoint
from pipeline.student.facts import LessonFacts, lesson_facts
from pipeline.student.node_store import NodeStore
from pipeline.student.world import World
from pipeline.teacher.groups import GroupViews, Rendering, fresh_samples, read_groups
from pipeline.teacher.infer import Teacher, load_teacher
from pipeline.views.pixels import to_input
from schemas.config import Config, DataConfig, ViewsConfig
from schemas.manifest import ViewBlock

_BATCH = 128


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Shares of 1; None where nothing was measured."""

    num_rows: int
    top1: float | None
    top5: float | None
    agreement: float | None
    teacher_top1: float | None

    def as_dict(self) -> dict[str, float | int | None]:
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Evaluator:
    """Evaluates models on the eval views of validation shards; each rank reads its share of the shards."""

    urls: list[str]
    data: DataConfig
    plan: ViewsConfig
    world: World
    num_threads: int = 1

    def __call__(self, model: EmbeddingModel, spec: InputSpec, teacher: Teacher | None = None) -> Evaluation:
        """Leaves the model in the mode it was in.

        Raises:
            ConfigError: the shards hold no images.
        """
        was_training = model.training
        model.eval()
        try:
            counts = torch.zeros(6, dtype=torch.float64)
            for url in self.urls[self.world.rank :: self.world.size]:
                counts += self._shard(url, model, spec, teacher)
        finally:
            model.train(was_training)
        rows, labelled, top1, top5, agreed, teacher_top1 = self.world.sum(counts.to(self.world.device)).tolist()
        if rows == 0:
            raise ConfigError(
                "there are no images to evaluate on", where="data.val_shards", got=f"{len(self.urls)} shards"
            )
        return Evaluation(
            num_rows=int(rows),
            top1=top1 / labelled if labelled else None,
            top5=top5 / labelled if labelled else None,
            agreement=agreed / rows if teacher else None,
            teacher_top1=teacher_top1 / labelled if teacher and labelled else None,
        )

    @torch.inference_mode()
    def _shard(self, url: str, model: EmbeddingModel, spec: InputSpec, teacher: Teacher | None) -> Tensor:
        counts = torch.zeros(6, dtype=torch.float64)
        with ExitStack() as stack:
            pool = stack.enter_context(ThreadPoolExecutor(self.num_threads))
            local = stack.enter_context(NodeStore.of(self.data).hold_url(url)).path
            builder = IndexBuilder(shard_id(url))
            for group in self._groups(local, url, spec, pool, builder):
                logits = _logits(model, spec, group.pixels_VNCHW[0], self.world.device)
                counts += _count(logits, torch.from_numpy(group.label_N))
            check_samples(builder.finish(), self.data, where=storage.redact(url))
            if teacher is not None:
                counts += self._agreement(local, url, model, spec, teacher, pool)
        return counts

    def _groups(
        self, local: Path, url: str, spec: InputSpec, pool: ThreadPoolExecutor, builder: IndexBuilder
    ) -> Iterator[GroupViews]:
        rendering = Rendering(
            plan=self.plan,
            block=ViewBlock(start=0, stop=1, is_eval=True),
            size=spec.size,
            interpolation=spec.interpolation,
        )
        samples = fresh_samples(local, self.data, where=storage.redact(url))
        return read_groups(
            samples, rendering, pool, shard_id=shard_id(url), max_pixels=self.data.max_pixels, builder=builder
        )

    def _agreement(
        self, local: Path, url: str, model: EmbeddingModel, spec: InputSpec, teacher: Teacher, pool: ThreadPoolExecutor
    ) -> Tensor:
        counts = torch.zeros(6, dtype=torch.float64)
        name = shard_id(url)
        own = self._groups(local, url, spec, pool, IndexBuilder(name))
        theirs = self._groups(local, url, teacher.loaded.input, pool, IndexBuilder(name))
        for group, teacher_group in zip(own, theirs, strict=True):
            logits = _logits(model, spec, group.pixels_VNCHW[0], self.world.device)
            words = torch.from_numpy(teacher.answer(teacher_group.pixels_VNCHW[0]).logits_NK)
            label_N = torch.from_numpy(group.label_N)
            counts[4] += (logits.argmax(1) == words.argmax(1)).sum()
            counts[5] += ((words.argmax(1) == label_N) & (label_N >= 0)).sum()
        return counts


def _logits(model: EmbeddingModel, spec: InputSpec, pixels_NCHW: Tensor, device: torch.device) -> Tensor:
    mean_C, std_C = torch.tensor(spec.mean, device=device), torch.tensor(spec.std, device=device)
    batches = [
        model(to_input(pixels.to(device), mean_C=mean_C, std_C=std_C))[0].float().cpu()
        for pixels in pixels_NCHW.split(_BATCH)
    ]
    return torch.cat(batches)


def _count(logits_NK: Tensor, label_N: Tensor) -> Tensor:
    labelled = label_N >= 0
    logits_MK, label_M = logits_NK[labelled], label_N[labelled].long()
    rank_M = (logits_MK > logits_MK.gather(1, label_M[:, None])).sum(1)
    return torch.tensor(
        [len(logits_NK), len(label_M), int((rank_M < 1).sum()), int((rank_M < 5).sum()), 0, 0], dtype=torch.float64
    )


def make_evaluator(
    shards: str | tuple[str, ...], data: DataConfig, plan: ViewsConfig, world: World, *, num_threads: int
) -> Evaluator:
    """
    Raises:
        ShardError: two shards share a name, or one is no plain tar.
        StorageInputError: a shard does not exist, or its URL is refused.
    """
    urls = storage.expand(shards)
    shard_ids(urls)
    return Evaluator(urls, data, plan, world, num_threads)


def evaluate_run(
    run_url: str, shards: str | tuple[str, ...], *, checkpoint_name: str, num_threads: int, device: torch.device
) -> Evaluation:
    """A trained student on validation shards; with the agreement, where the run's config names its teacher.

    Args:
        checkpoint_name: ``best`` or ``last``.

    Raises:
        ConfigError: there is no run, or it has no such checkpoint.
        CacheError: the teacher that the config names is not the one whose words the student learnt.
    """
    config = checkpoint.read_config(run_url)
    lessons = lesson_facts(config)
    assert config.student is not None
    loaded = load_model(
        config.student.model_copy(update={"weights": "random", "sha256": None}),
        num_classes=lessons.num_classes,
        size=config.student.size or lessons.size,
        where="student",
    )
    name = checkpoint.BEST if checkpoint_name == "best" else checkpoint.LAST
    state = checkpoint.load(run_url, name)
    if state is None:
        raise ConfigError(
            f"this run has no {checkpoint_name} checkpoint",
            where=storage.redact(run_url),
            next_step="train it to the end of an epoch" + (", with data.val_shards" if name == checkpoint.BEST else ""),
        )
    loaded.module.network.load_state_dict(state["model"])
    evaluator = make_evaluator(shards, lessons.data, lessons.plan, World(device=device), num_threads=num_threads)
    return evaluator(loaded.module.to(device), loaded.input, teacher_of_run(config, lessons, device))


def teacher_of_run(config: Config, lessons: LessonFacts, device: torch.device) -> Teacher | None:
    """The teacher that a run's config names, if it names one.

    Raises:
        CacheError: it is not the one whose words the run's cache holds.
    """
    if config.teacher.model is None:
        return None
    teacher = load_teacher(
        config.teacher, num_classes=lessons.num_classes, size=config.views.size or lessons.size, device=device
    )
    # Beside several caches no teacher is named.
    cached = [str(cache.header.teacher["weights"]) for cache in lessons.caches]
    if cached and weights_digest(teacher.state()) != cached[0]:
        raise CacheError(
            "the teacher of this config is not the one whose words were cached",
            where="teacher.weights",
            got=storage.redact(config.teacher.weights),
            wanted=f"weights with digest {cached[0][:16]}",
            next_step="name the cache's teacher, or no teacher at all; a cached run needs none",
        )
    return teacher
