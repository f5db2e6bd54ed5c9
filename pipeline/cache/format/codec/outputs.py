"""From the config's words to the outputs that a header lists."""

from __future__ import annotations

from pipeline.cache.format.codec.dense import dense_output
from pipeline.cache.format.codec.int4 import int4_output
from pipeline.cache.format.codec.int8 import int8_output
from pipeline.cache.format.codec.topk import topk_output
from pipeline.core.errors import ConfigError
from schemas.cache_format import Output
from schemas.config import CacheConfig

_DENSE = {"fp32": "float32", "fp16": "float16"}
# Below this int8 takes no more bytes than int4.
_INT4_CLASSES = 128


def outputs_of(config: CacheConfig, *, num_classes: int, embedding_dim: int) -> tuple[Output, ...]:
    """What a cache with this config keeps of each row.

    Raises:
        ConfigError: an encoding that these classes are too few for.
    """
    expected = (("logits", num_classes, config.logits), ("embedding", embedding_dim, config.embeddings))
    return tuple(_output(name, width, kind) for name, width, kind in expected if kind != "none")


def _output(name: str, width: int, kind: str) -> Output:
    if kind in _DENSE:
        return dense_output(name, width, _DENSE[kind])
    if kind == "int8":
        return int8_output(name, width)
    if kind == "int4":
        _check_classes(kind, width, _INT4_CLASSES)
        return int4_output(name, width)
    k = int(kind.removeprefix("topk:"))
    _check_classes(kind, width, k + 1)
    return topk_output(name, width, k)


def _check_classes(kind: str, num_classes: int, fewest: int) -> None:
    if num_classes < fewest:
        raise ConfigError(
            f"{kind} needs more classes",
            where="cache.logits",
            got=f"{num_classes} classes",
            expected=f"at least {fewest}",
            next_step="set cache.logits=int8" if kind == "int4" else "choose a smaller k, or cache.logits=int8",
        )
