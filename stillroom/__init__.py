"""Stillroom in Python: read a teacher cache in your own loop, use the losses, load a trained student.

Names are imported at their first use, so that ``import stillroom`` takes no longer than Python itself.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pipeline.cache.read.reader import TeacherCache, open_cache
    from pipeline.core.errors import StillroomError
    from pipeline.models.heads import multi_head
    from pipeline.storage.config_files import load_config
    from pipeline.student import losses
    from pipeline.student.cached_batch import CachedBatch
    from pipeline.student.cached_dataset import CachedDataset
    from pipeline.student.evaluation.loaded_run import load_student
    from schemas.config import Config

__all__ = [
    "CachedBatch",
    "CachedDataset",
    "Config",
    "StillroomError",
    "TeacherCache",
    "load_config",
    "load_student",
    "losses",
    "multi_head",
    "open_cache",
]

_MODULES = {
    "CachedBatch": "pipeline.student.cached_batch",
    "CachedDataset": "pipeline.student.cached_dataset",
    "Config": "schemas.config",
    "StillroomError": "pipeline.core.errors",
    "TeacherCache": "pipeline.cache.read.reader",
    "load_config": "pipeline.storage.config_files",
    "load_student": "pipeline.student.evaluation.loaded_run",
    "losses": "pipeline.student.losses",
    "multi_head": "pipeline.models.heads",
    "open_cache": "pipeline.cache.read.reader",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = import_module(_MODULES[name])
    return module if name == "losses" else getattr(module, name)


def __dir__() -> list[str]:
    return __all__
