"""Students: data, supervision, losses, training, evaluation, export; ``CachedDataset`` is for other training loops."""

from __future__ import annotations

from typing import Any


def __getattr__(name: str) -> Any:
    # Earlier versions had these names here; their public place is ``stillroom``.
    if name not in ("CachedBatch", "CachedDataset"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from pipeline.student import cached_dataset

    return getattr(cached_dataset, name)
