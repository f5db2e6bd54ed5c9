"""The loader against its lower bound: the same images decoded, cropped and resized by as many processes.

The bare loader knows offsets and boxes beforehand, in memory; it checks, joins and orders nothing. Rates of whole
passes of both, in turn; each starts new processes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from pipeline.augment.pixels import apply_view, stack_views
from pipeline.shards.decode import decode
from pipeline.shards.tar import ShardReader
from pipeline.student.data.batch import InputSize
from pipeline.student.data.dataset import StepDataset, group_by_shard, read_rows
from pipeline.student.data.epoch_order import OrderedRows
from pipeline.student.data.loader import load_batches
from pipeline.student.data.sources import CachedSource, open_cached
from schemas.config import Config
from tests.benchmarks.join import built, random_teacher
from tests.benchmarks.teachers import BENCH
from tests.benchmarks.timing import SHARED, Spread, interleaved, ratio
from tests.pipeline.student.runs import order_of

WORKERS, ROUNDS = 2, 9
_Row = tuple[int, int, int, list[int], bool]
"""Shard, offset and size in bytes, box, flip."""


@dataclass(frozen=True, slots=True)
class _Case:
    config: Config
    batch: int
    steps: int

    @property
    def size(self) -> int:
        assert self.config.views.size is not None
        return self.config.views.size


def _photographs() -> Config:
    config = random_teacher("fp16")
    data = {"shards": f"{SHARED}/imagenet-samples/sample-{{00000..00003}}.tar", "num_classes": 1000}
    cache = {"url": str(BENCH / "photographs1000"), "logits": "fp16"}
    sections = {"data": data, "views": {"kind": "crop", "count": 1, "size": 224}, "cache": cache}
    return Config.model_validate({**config.model_dump(mode="json", exclude_unset=True), **sections})


class _Bare(Dataset[Tensor]):
    """One batch an item."""

    def __init__(self, paths: list[str], rows: list[list[_Row]], size: int) -> None:
        self._rows, self._size = rows, size
        self._readers = [ShardReader(Path(path), where=path) for path in paths]

    def __getitem__(self, step: int) -> Tensor:
        return stack_views([self._view(*row) for row in self._rows[step]])

    def _view(self, shard: int, offset: int, num_bytes: int, box: list[int], flip: bool) -> Tensor:
        image = decode(self._readers[shard].read(offset, num_bytes), max_pixels=64_000_000)
        return apply_view(image, box, flip, size=self._size, interpolation="bilinear")


def run() -> None:
    cases = {
        "imagenet-samples, 224": _Case(_photographs(), batch=32, steps=96),
        "cifar10, 32": _Case(random_teacher("fp16", num_classes=10), batch=256, steps=320),
    }
    for name, case in cases.items():
        rows, variants = _variants(case)
        seconds = interleaved(variants, rounds=ROUNDS)
        print(f"  {name}, {WORKERS} processes, {rows} images a pass")
        for variant, values in seconds.items():
            print(f"    {variant:<6}{Spread.of([rows / value for value in values])} images a second")
        print(f"    ours / bare, rates: {ratio(seconds['bare'], seconds['ours'])}")


def _variants(case: _Case) -> tuple[int, dict[str, Callable[[], int]]]:
    """The images of a pass, and both ways to it."""
    config = case.config
    source = open_cached([built(config)], config.data, reads={"logits": (1.0,)})
    order = order_of(source, config.views, global_batch_size=case.batch)
    dataset = StepDataset(
        source,
        order,
        rank=0,
        world_size=1,
        student=InputSize(case.size, "bilinear"),
        max_pixels=64_000_000,
    )
    listed: list[list[_Row]] = []
    for step in range(case.steps):
        epoch, local_step = divmod(step, order.num_steps)
        rows = order.epoch(epoch, 0).rows(local_step, 0, 1)
        listed.append(list(_rows_of(source, rows, epoch)))
    source.close()
    paths = [source.caches[0].shard_url(shard) for shard in source.caches[0].shards]
    bare = _Bare(paths, listed, case.size)

    def drain_bare() -> int:
        loader: Any = DataLoader(bare, batch_size=None, sampler=range(case.steps), num_workers=WORKERS)
        return sum(len(pixels) for pixels in loader)

    def drain_stillroom() -> int:
        batches = load_batches(dataset, range(case.steps), num_workers=WORKERS, pin_memory=False)
        return sum(batch.num_rows for batch in batches)

    assert drain_bare() == drain_stillroom()
    return sum(map(len, listed)), {"bare": drain_bare, "ours": drain_stillroom}


def _rows_of(source: CachedSource, ordered: OrderedRows, epoch: int) -> Iterator[_Row]:
    by_shard = group_by_shard(ordered)
    rows = read_rows(source, ordered, by_shard, [epoch])
    boxes, flips = (rows.rows_N[name].tolist() for name in ("box", "flip"))
    for shard, position_N in by_shard:
        for row in position_N.tolist():
            offset, num_bytes, _ = rows.byte_ranges[row]
            yield shard, offset, num_bytes, boxes[row], flips[row]
