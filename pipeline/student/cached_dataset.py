"""A finished cache as a PyTorch dataset, for training loops outside Stillroom."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Sequence
from itertools import product
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils.data import Dataset, get_worker_info

from pipeline.cache.format.codec import config_key
from pipeline.cache.read.reader import open_cache
from pipeline.core.config_loading import build_section, require
from pipeline.core.errors import ConfigError, OrderError
from pipeline.models import InputSpec
from pipeline.student.cached_batch import CachedBatch
from pipeline.student.data.batch import InputSize
from pipeline.student.data.dataset import StepDataset
from pipeline.student.data.order import TrainingOrder, order_of
from pipeline.student.data.sources import CachedSource, RowSource, check_any_labelled, open_cached, views_in_use
from pipeline.student.data.teacher_outputs import Reads
from pipeline.student.supervision.canaries import check_canaries
from pipeline.student.supervision.class_means import cached_means
from pipeline.student.supervision.pixel_inputs import cache_inputs, check_same_input, input_of
from pipeline.student.supervision.requirements import CLASS_MEANS, Requirement
from pipeline.student.supervision.spec import SupervisionSpec, spec_of_caches
from pipeline.tasks import EMBEDDING, TOKENS, Task, task_of
from schemas.config import DataConfig, Interpolation, Section, Size, StudentConfig, TrainConfig, Triple


class _Options(Section):
    """Arguments of a dataset that mean the same as keys of a config."""

    data: DataConfig
    student: StudentConfig
    train: TrainConfig


Location = str | Path


class CachedDataset(Dataset[CachedBatch]):
    """``dataset[i]`` is this rank's batch of one step of an epoch: image views, labels and teacher outputs.

    Items are whole batches in the order of training, so a loader must not batch, shuffle or sample:
    ``DataLoader(dataset, batch_size=None, num_workers=8)``. Batches are the same for any number of workers, global
    batches for any world size. docs/tutorials/your-own-loop.md has an example.
    """

    def __init__(
        self,
        cache: Location | Sequence[Location],
        shards: Location | Sequence[Location] | None = None,
        *,
        epoch: int = 0,
        start_step: int = 0,
        rank: int = 0,
        world_size: int = 1,
        global_batch_size: int = 256,
        seed: int = 0,
        order: Literal["global", "pinned"] = "global",
        tail: Literal["drop", "short"] = "drop",
        lanes: int | None = None,
        num_views: int | None = None,
        views_per_image: int = 1,
        size: Size | None = None,
        interpolation: Interpolation | None = None,
        mean: Triple | None = None,
        std: Triple | None = None,
        temperatures: Sequence[float] = (1.0,),
        embeddings: bool = False,
        tokens: bool = False,
        require_labels: bool = False,
        verify_canaries: bool = True,
        allow_pixel_drift: int = 0,
    ) -> None:
        """Opens the caches, and verifies on a few views that this machine reproduces their pixels.

        Arguments with the name of a config key (``train.*``, ``student.*``, ``data.*``) have its meaning, and errors
        name that key.

        Args:
            cache: URL or path of a finished cache, or a list: one for each teacher, all over the same views.
            shards: URLs or paths with ``{a..b}`` braces; default: all shards of the cache, at the URLs of its build.
            epoch, start_step: see ``set_epoch``.
            global_batch_size: rows of a step over all ranks.
            num_views: the first n views of the caches alone; default: all.
            views_per_image: k, views of each image in a batch, which is decoded once. Rows of one image have the same
                sample id; an epoch has k rows of each image.
            size, interpolation: of the student's input, in pixels, height and width in one number or (height,
                width); default: the teacher's.
            mean, std: per channel, of [0,1] RGB, for ``CachedBatch.images``; default: the teacher's.
            temperatures: at which ``topk`` and ``sampled`` logits are decoded; other encodings need no list. Empty:
                decode no logits.
            embeddings: whether to read the teachers' embeddings, for ``CachedBatch.teacher_embeddings``.
            tokens: whether to read the teachers' patch tokens, for ``CachedBatch.teacher_tokens``.
            require_labels: whether a row without a label is an error.
            verify_canaries: False starts sooner, but a different decoder or resize goes unnoticed.

        Raises:
            ConfigError: an option is wrong, or contradicts another or the cache.
            CacheError: a cache is unfinished or damaged, the caches differ in their views or samples, or this machine
                computes other pixels.
        """
        data = {"cache": _plain(cache), "shards": _plain(shards), "num_views": num_views}
        data["allow_pixel_drift"] = allow_pixel_drift
        student = {"size": size, "interpolation": interpolation, "mean": mean, "std": std}
        train = {"global_batch_size": global_batch_size, "seed": seed, "order": order, "tail": tail, "lanes": lanes}
        train["views_per_image"] = views_per_image
        options = build_section(_Options, {"data": data, "student": student, "train": train}, where="CachedDataset")
        require(options, "data.cache", command="CachedDataset")
        _check_rank(rank, world_size)
        _check_temperatures(temperatures)
        caches = tuple(open_cache(url) for url in options.data.caches)
        self._spec = spec_of_caches(caches, options.data, options.student)
        others = [name for name, is_read in ((EMBEDDING, embeddings), (TOKENS, tokens)) if is_read]
        reads = _reads(task_of(self._spec.data), temperatures, others)
        for opened, name in product(caches, others):
            Requirement.of_output(name, remedy=f"set {config_key(name)}=False").check_stored(opened)
        self._source = _open_rows(self._spec, reads, verify_canaries=verify_canaries, require_labels=require_labels)
        self._order = _checked_order(options.train, self._spec, self._source, world_size)
        self._input = _input_spec(options.student, self._spec)
        check_same_input(self._spec.plan, {**cache_inputs(caches), "the student": input_of(self._input)})
        self._steps = StepDataset(
            self._source,
            self._order,
            rank=rank,
            world_size=world_size,
            student=InputSize(self._input.size, self._input.interpolation),
            max_pixels=self._spec.data.max_pixels,
            required_targets=_required(self._source, require_labels=require_labels),
        )
        # In shared memory, so that loader processes that outlive an epoch see the next one: epoch, start step, and
        # whether the first and the last remaining step of that epoch were taken, in any order where processes race.
        self._position = torch.zeros(4, dtype=torch.int64).share_memory_()
        self._last: tuple[tuple[int, ...], int] | None = None
        self.set_epoch(epoch, start_step=start_step)

    @property
    def num_classes(self) -> int:
        """K, the number of classes."""
        return self._source.task.num_classes

    @property
    def num_views(self) -> int:
        """V, the number of views that are shown; epoch e shows view e mod V, or k views from e·k mod V on."""
        return views_in_use(self._spec.caches, self._spec.data)

    @property
    def steps_per_epoch(self) -> int:
        """The same for every rank, epoch and number of workers."""
        return self._order.num_steps

    def class_means(self, *, teacher: int = 0, head: str | None = None) -> Tensor:
        """fp32 [K,D]: the teacher's mean embedding of each class, an input of ``nd``.

        Args:
            teacher: position of the cache in the list.
            head: its name, where the data have several; default: the classes of all, in the order of their names.

        Raises:
            ConfigError: that cache has no class means.
            CacheError: they are damaged, or a class occurs in the labels and has no mean.
        """
        cache = self._spec.caches[teacher]
        CLASS_MEANS.check_stored(cache)
        heads = [found for found in self._source.task.heads if found.kind == "class" and head in (None, found.name)]
        return torch.cat([*cached_means(cache, self._source, heads).values()])

    def set_epoch(self, epoch: int, *, start_step: int = 0) -> None:
        """Selects an epoch, with its order and view. Call it before you iterate over the loader.

        Args:
            start_step: number of steps to skip, which were taken before an interruption.

        Raises:
            ConfigError: there is no such epoch or step.
        """
        if epoch < 0:
            raise ConfigError(
                "there is no such epoch", code="data.no-such-step", where="epoch", got=epoch, expected="0 or more"
            )
        if not 0 <= start_step <= self.steps_per_epoch:
            raise ConfigError(
                "there is no such step",
                code="data.no-such-step",
                where="start_step",
                got=start_step,
                expected=f"0 to {self.steps_per_epoch}",
            )
        self._position.copy_(torch.tensor([epoch, start_step, 0, 0]))

    def __len__(self) -> int:
        """Remaining steps of the epoch."""
        return self.steps_per_epoch - int(self._position[1])

    def __getitems__(self, _indices: Sequence[int]) -> None:
        """A ``DataLoader`` with a batch size calls it.

        Raises:
            ConfigError: always, since the items are batches.
        """
        raise ConfigError(
            "the items of CachedDataset are batches",
            code="data.batched-twice",
            where="DataLoader",
            got="a batch size (by default 1)",
            expected="DataLoader(dataset, batch_size=None), and global_batch_size of CachedDataset",
        )

    def __getitem__(self, index: int) -> CachedBatch:
        """
        Raises:
            OrderError: another item is next: the loader shuffles, or has a sampler.
            CacheError: a row's image is not that of the cache.
        """
        epoch, start_step, took_first, took_last = self._position.tolist()
        # Python's own loop over a sequence ends at an IndexError.
        if not 0 <= index < self.steps_per_epoch - start_step:
            raise IndexError(
                f"step {index} of the {self.steps_per_epoch - start_step} remaining steps of epoch {epoch}"
            )
        self._check_turn(epoch, start_step, index)
        if index == 0:
            if took_first and took_last:
                warnings.warn(_repeated(epoch), stacklevel=2)
            self._position[2] = 1
        if index == self.steps_per_epoch - start_step - 1:
            self._position[3] = 1
        rows = self._steps[epoch * self.steps_per_epoch + start_step + index]
        return CachedBatch(
            rows=rows,
            mean_C=torch.tensor(self._input.mean),
            std_C=torch.tensor(self._input.std),
            num_classes=self.num_classes,
            ddp_weight=rows.num_rows * self._steps.world_size / rows.num_rows_global,
        )

    def _check_turn(self, epoch: int, start_step: int, index: int) -> None:
        """Refuses an item that neither starts a pass over the epoch nor continues it. The same item again is allowed.

        A loader deals items to its processes in turn.
        """
        worker = get_worker_info()
        first, stride = (0, 1) if worker is None else (worker.id, worker.num_workers)
        this_pass = (epoch, start_step, first, stride)
        last = self._last[1] if self._last is not None and self._last[0] == this_pass else None
        expected = first if last is None else last + stride
        if index not in (first, last, expected):
            raise OrderError(
                "items of a CachedDataset were requested in an order that differs from that of training",
                code="data.out-of-order",
                where=f"epoch {epoch}, from step {start_step}",
                got=f"item {index}" + ("" if last is None else f" after item {last}"),
                expected=f"item {expected}: every rank takes all items, in order",
                next_step="give the DataLoader neither shuffle nor a sampler; for Lightning: "
                "Trainer(use_distributed_sampler=False); for accelerate: do not prepare the loader; to resume, or to "
                "change the epoch: set_epoch, before the loader starts",
            )
        self._last = this_pass, index

    def close(self) -> None:
        """Closes the shards; they open again when they are read."""
        self._source.close()

    def __getstate__(self) -> dict[str, Any]:
        # Open files cannot go to a loader process that is spawned.
        self.close()
        return self.__dict__


def _repeated(epoch: int) -> str:
    return (
        f"CachedDataset repeats epoch {epoch}: the same views in the same order. Call set_epoch(epoch) before each "
        f"epoch; set_epoch({epoch}) repeats it without this warning"
    )


def _plain(urls: Location | Sequence[Location] | None) -> str | list[str] | None:
    if urls is None:
        return None
    return str(urls) if isinstance(urls, str | Path) else [str(url) for url in urls]


def _check_rank(rank: int, world_size: int) -> None:
    if not 0 <= rank < world_size:
        raise ConfigError(
            "there is no such rank",
            code="data.no-such-rank",
            where="rank, world_size",
            got=f"{rank}, {world_size}",
            expected="0 <= rank < world_size",
        )


def _check_temperatures(temperatures: Sequence[float]) -> None:
    if not all(0 < temperature < math.inf for temperature in temperatures):
        raise ConfigError(
            "a temperature is not above 0", code="data.bad-temperature", where="temperatures", got=list(temperatures)
        )


def _reads(task: Task, temperatures: Sequence[float], others: Iterable[str]) -> Reads:
    logits = {head.output: tuple(temperatures) for head in task.heads} if temperatures else {}
    return {**logits, **dict.fromkeys(others, (1.0,))}


def _required(source: RowSource, *, require_labels: bool) -> list[str]:
    """The columns in which a row without a target is an error."""
    return [head.column for head in source.task.heads] if require_labels else []


def _open_rows(spec: SupervisionSpec, reads: Reads, *, verify_canaries: bool, require_labels: bool) -> CachedSource:
    source = open_cached(spec.caches, spec.data, reads=reads, name_shards="give CachedDataset shards={}")
    check_any_labelled(source, _required(source, require_labels=require_labels))
    if verify_canaries:
        canaries = check_canaries(source, spec.data)
        if canaries.num_drifted:
            warnings.warn(canaries.warning(), stacklevel=3)
    return source


def _checked_order(train: TrainConfig, spec: SupervisionSpec, source: CachedSource, world_size: int) -> TrainingOrder:
    order = order_of(train, source.shard_ids, source.num_ok, spec.plan, num_views=source.num_views)
    rows, step = order.smallest_batch(world_size)
    if rows == 0:
        raise ConfigError(
            "a rank would have no rows in a step",
            code="train.batch-too-small",
            where=f"step {step} of {order.num_steps} of every epoch",
            got=f"{order.global_rows(step)} rows over {world_size} ranks",
            next_step="set another global_batch_size, fewer ranks, or tail='drop'",
        )
    return order


def _input_spec(student: StudentConfig, spec: SupervisionSpec) -> InputSpec:
    """The student's input where it is given, else that of the first teacher."""
    teacher = spec.caches[0].header.teacher
    assert spec.size is not None, "a cache has a size"
    return InputSpec(
        size=student.size or spec.size,
        mean=student.mean or tuple(teacher["mean"]),
        std=student.std or tuple(teacher["std"]),
        interpolation=student.interpolation or teacher["interpolation"],
    )
