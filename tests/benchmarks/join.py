"""Teacher columns joined to the 256 rows of a step, against simple file layouts.

One thread, page cache warm. Rows of a step are as the order gives them: some of every shard. ``torch.load``: one file
per image. ``records``: one file per shard of equal records, opened, sought and read for each key. ``memmap``: the same
file, mapped once and kept open, one gather a shard. Each ends with fp32 logits [256, 1000] in the order of the batch.
Stillroom's is the loader's whole join, with norms, boxes, flips, mixup partners, labels, hashes and sample ids as well.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from jobs.build_cache import build_cache
from pipeline.cache.format.codec import raw_rows
from pipeline.cache.read.reader import TeacherCache, open_cache
from pipeline.student.data.dataset import group_by_shard, read_rows
from pipeline.student.data.epoch_order import OrderedRows
from pipeline.student.data.sources import CachedSource, open_cached
from pipeline.student.data.teacher_outputs import decode_outputs
from schemas.config import Config
from tests.benchmarks.teachers import BENCH
from tests.benchmarks.timing import CIFAR, Spread, interleaved, random_resnet, ratio
from tests.pipeline.student.runs import order_of

ROUNDS, BATCH = 40, 256
Values = Callable[[NDArray[np.uint8]], NDArray[np.float32]]


def random_teacher(encoding: str, num_classes: int = 1000) -> Config:
    """Some classes over CIFAR-10's images, by an untrained network: only the number of bytes matters."""
    return Config.model_validate(
        {
            "data": {"shards": f"{CIFAR}/train-{{00000..00009}}.tar", "num_classes": num_classes},
            "teacher": random_resnet(batch_size=256),
            "views": {"kind": "crop", "count": 1, "size": 32},
            "cache": {"url": str(BENCH / f"random{num_classes}-{encoding}"), "logits": encoding},
            "ray": {"address": "none", "cpus_per_task": 2},
        }
    )


def built(config: Config) -> TeacherCache:
    """The finished cache of a config, built once."""
    assert config.cache is not None
    build_cache(config)
    return open_cache(config.cache.url)


def run() -> None:
    for encoding in ("fp16", "int8"):
        config = random_teacher(encoding)
        source = open_cached([built(config)], config.data, reads={"logits": (1.0,)})
        # Only now: a build sets its own.
        torch.set_num_threads(1)
        with tempfile.TemporaryDirectory() as folder:
            _compare(encoding, source, config, Path(folder))
        source.close()


def _compare(encoding: str, source: CachedSource, config: Config, folder: Path) -> None:
    order = order_of(source, config.views, global_batch_size=BATCH, tail="drop")
    rows = order.epoch(0, 0)
    steps = [rows.rows(step % order.num_steps, 0, 1) for step in range(ROUNDS + 1)]
    layouts = _layouts(encoding, source, folder)
    variants: dict[str, Callable[[OrderedRows], torch.Tensor]] = {
        "ours": lambda rows: _all_columns(source, rows),
        **layouts,
    }
    expected = variants["ours"](steps[0])
    for name, call in variants.items():
        assert torch.equal(call(steps[0]), expected), name
    queues = {name: iter(steps) for name in variants}
    seconds = interleaved(
        {name: lambda call=call, name=name: call(next(queues[name])) for name, call in variants.items()}, rounds=ROUNDS
    )
    shards = np.mean([len(np.unique(step.shard_B)) for step in steps])
    print(f"  {encoding}, {BATCH} rows of {shards:.0f} shards, 1000 classes")
    for name, values in seconds.items():
        each = Spread.of([value / BATCH * 1e6 for value in values])
        print(f"    {name:<20}{each} us a row, time / ours {ratio(values, seconds['ours'])}")


def _all_columns(source: CachedSource, rows: OrderedRows) -> torch.Tensor:
    columns = read_rows(source, rows, group_by_shard(rows), [0]).teachers[0]
    return decode_outputs(columns, source.outputs[0], source.reads).tensors["logits", None]


def _layouts(encoding: str, source: CachedSource, folder: Path) -> dict[str, Callable[[OrderedRows], torch.Tensor]]:
    """Each shard's logits in the other layouts, with the bytes of the cache."""
    names: dict[tuple[int, int], str] = {}
    maps: list[NDArray[np.uint8]] = []
    (cache,) = source.caches
    places: dict[str, tuple[Path, int]] = {}
    for shard, num_ok in enumerate(source.num_ok):
        raw_NW = raw_rows(cache.view(cache.shards[shard].shard_id, 0).outputs["logits"].column)
        path = folder / f"{source.shard_ids[shard]}.bin"
        path.write_bytes(raw_NW.tobytes())
        maps.append(np.memmap(path, np.uint8, "r", shape=raw_NW.shape))
        ids = source.rows(shard, np.arange(num_ok, dtype=np.int32), 0).sample_ids
        for row, sample_id in enumerate(ids):
            names[shard, row] = sample_id
            places[sample_id] = path, row * raw_NW.shape[1]
            file = folder / f"{sample_id}.pt"
            file.parent.mkdir(exist_ok=True)
            torch.save(_saved(encoding, raw_NW[row]), file)
    width = maps[0].shape[1]
    values = _fp16 if encoding == "fp16" else _int8

    def ids_of(rows: OrderedRows) -> list[str]:
        return [names[key] for key in zip(rows.shard_B.tolist(), rows.row_B.tolist(), strict=True)]

    def torch_load(rows: OrderedRows) -> torch.Tensor:
        return torch.stack([_loaded(torch.load(folder / f"{name}.pt", weights_only=True)) for name in ids_of(rows)])

    def records(rows: OrderedRows) -> torch.Tensor:
        found = np.empty((len(rows.row_B), width), np.uint8)
        for number, name in enumerate(ids_of(rows)):
            path, offset = places[name]
            with path.open("rb") as file:
                file.seek(offset)
                file.readinto(found[number])
        return torch.from_numpy(values(found))

    def memmap(rows: OrderedRows) -> torch.Tensor:
        found = np.empty((len(rows.row_B), width), np.uint8)
        for shard in np.unique(rows.shard_B).tolist():
            where = np.flatnonzero(rows.shard_B == shard)
            found[where] = maps[shard][rows.row_B[where]]
        return torch.from_numpy(values(found))

    return {"torch.load": torch_load, "records": records, "memmap": memmap}


def _saved(encoding: str, row_W: NDArray[np.uint8]) -> Any:
    if encoding == "fp16":
        return torch.from_numpy(row_W.view(np.float16).copy())
    offset, scale = row_W[:8].view(np.float32).tolist()
    return {"offset": offset, "scale": scale, "codes": torch.from_numpy(row_W[8:].copy())}


def _loaded(saved: Any) -> torch.Tensor:
    if isinstance(saved, torch.Tensor):
        return saved.float()
    return torch.tensor(saved["offset"]) + torch.tensor(saved["scale"]) * saved["codes"].float()


def _fp16(found_NW: NDArray[np.uint8]) -> NDArray[np.float32]:
    # As fast as there is; NumPy takes longer for it than for the rest.
    return torch.from_numpy(found_NW.view(np.float16)).float().numpy()


def _int8(found_NW: NDArray[np.uint8]) -> NDArray[np.float32]:
    numbers_N2 = found_NW[:, :8].copy().view(np.float32)
    return numbers_N2[:, :1] + numbers_N2[:, 1:] * found_NW[:, 8:].astype(np.float32)
