"""Students: data, supervision, losses, training, evaluation, export; ``CachedDataset`` is for other training loops.

The names of this package are imported at their first use, so that a module of it loads no more than it needs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pipeline.student.cached_batch import CachedBatch
    from pipeline.student.cached_dataset import CachedDataset

__all__ = ["CachedBatch", "CachedDataset"]


def __getattr__(name: str) -> Any:
    if name == "CachedBatch":
        from pipeline.student.cached_batch import CachedBatch

        return CachedBatch
    if name == "CachedDataset":
        from pipeline.student.cached_dataset import CachedDataset

        return CachedDataset
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
