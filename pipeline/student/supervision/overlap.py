"""Training images that are validation images too, found by content hash: accuracy on them measures memorisation."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray

from pipeline.shards.index import ShardIndex
from pipeline.student.data.sources import RowSource
from pipeline.student.distributed import DistributedContext

_NUM_NAMED = 3


@dataclass(frozen=True, slots=True)
class Overlap:
    """``num_rows`` training rows are in the validation shards; ``sample_ids`` names the first."""

    num_rows: int
    sample_ids: tuple[str, ...]

    def warning(self) -> str:
        more = ", …" if self.num_rows > len(self.sample_ids) else ""
        return (
            f"{self.num_rows} training images are also in the validation shards, byte for byte: "
            f"{', '.join(self.sample_ids)}{more}; accuracy on them measures memorisation"
        )


@dataclass(frozen=True, slots=True)
class SeenImages:
    """Content hashes of the validation images that this rank has read, collected while it evaluates; 8 bytes each."""

    _hashes: list[NDArray[np.uint64]] = field(default_factory=list[NDArray[np.uint64]])

    def add(self, index: ShardIndex) -> None:
        self._hashes.append(index.content_hash[index.ok])

    def overlap(self, source: RowSource, distributed: DistributedContext) -> Overlap:
        """Compares all ranks' images with the training rows; each rank reads its share of the training indexes, one at
        a time, and no image. Every rank calls it."""
        hash_N = np.concatenate([np.empty(0, np.uint64), *self._hashes])
        # The collectives have no unsigned integers; the bits are the same.
        all_M = distributed.join(torch.from_numpy(hash_N.view(np.int64)).to(distributed.device)).cpu().numpy()
        validation = np.unique(all_M.view(np.uint64))
        num_rows, first = 0, list[tuple[int, int]]()
        for shard in range(distributed.rank, len(source.shard_ids), distributed.size):
            index = source.index(shard)
            shared = index.ok[_is_among(index.content_hash[index.ok], validation)]
            num_rows += len(shared)
            first += [(shard, int(row)) for row in shared[: _NUM_NAMED - len(first)]]
        return Overlap(_sum(num_rows, distributed), _named(first, source, distributed))


def _is_among(hash_N: NDArray[np.uint64], sorted_M: NDArray[np.uint64]) -> NDArray[np.bool_]:
    """By bisection: sorting both for each of many shards would sort the validation set every time."""
    position_N = np.searchsorted(sorted_M, hash_N)
    equal_N = position_N < len(sorted_M)
    equal_N[equal_N] = sorted_M[position_N[equal_N]] == hash_N[equal_N]
    return equal_N


def _sum(count: int, distributed: DistributedContext) -> int:
    return int(distributed.sum(torch.tensor(count, device=distributed.device)))


def _named(first: list[tuple[int, int]], source: RowSource, distributed: DistributedContext) -> tuple[str, ...]:
    """The names of the first rows, by position, over all ranks."""
    positions = distributed.join(torch.tensor(first, dtype=torch.int64, device=distributed.device).view(-1))
    rows = sorted(map(tuple, positions.view(len(positions) // 2, 2).tolist()))[:_NUM_NAMED]
    return tuple(source.index(shard).sample_ids([row])[0] for shard, row in rows)
